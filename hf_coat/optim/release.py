"""Gradient release: parameters are stepped inside the backward, and their gradients freed, once these are complete.

The gradients of the whole model then never exist together: 2 bytes per BF16 parameter less at the peak. It is the same
arithmetic as ``optimizer.step()`` after the backward, to the bit. A step of one parameter costs the host about as much
as one of many, so gradients wait for each other until they are ``batch_bytes`` together, and the last ones are stepped
as the backward ends. (FSDP2 computes gradients on a stream of its own: sharded parameters are stepped one by one.)

What a backward cannot know:

- Whether another one follows. A parameter is stepped once between two calls of ``optimizer.step()``; a second gradient
  of it raises. So gradient accumulation is refused, and so is a parameter that two segments under reentrant gradient
  checkpointing share: each segment is a backward of its own. Tied weights and modules used twice are right otherwise:
  autograd adds their gradients up first.
- The norm of the whole gradient. With ``max_norm`` each parameter's gradient is clipped by its own norm instead. That
  is looser than clipping by the common norm, which may reach ``max_norm * sqrt(parameters)``: a spike in a few
  parameters is clipped, one that is spread evenly over all of them is not. It also turns the direction of the whole
  gradient, as clipping by the common norm does not. With ``max_norm`` above every norm it changes nothing.
- What other processes have. DDP averages gradients after this, and is refused. FSDP2 (parameters that are DTensors)
  averages them before; norms are then those of the whole parameter.
- Whether gradients are scaled. ``torch.amp.GradScaler`` finds no gradients and stops at its first step.
"""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from .adamw import CoatOptimizer, check_gradient
from .sharding import is_sharded, local

BATCH_BYTES = 2**28  # three launches for a layer of 7 B parameters' 9 tensors


class GradientRelease:
    """Steps the parameters of an optimizer inside the backward, until :meth:`remove`; see the head of this file.

        >>> optimizer = CoatAdamW(model.parameters(), lr=1e-5)
        >>> release = GradientRelease(optimizer)
        >>> for batch in batches:
        ...     model(batch).backward()  # steps the parameters
        ...     optimizer.step()  # ends the step; steps what got a gradient in another way
        ...     scheduler.step()

    The learning rate and all other settings are those of the parameter's group at the time of the backward. Parameters
    that require no gradient yet, or are added to the optimizer later, are stepped by ``optimizer.step()`` as ever.

    Args:
        optimizer: The optimizer; its parameters must have no gradients. Under FSDP2 make this after ``fully_shard``.
        max_norm: Clip each parameter's gradient to this norm. ``inf`` measures norms and clips nothing; None, the
            default, does not measure either.
        batch_bytes: How many bytes of gradients may wait to be stepped together, in one launch; with 0 none waits.

    Raises:
        TypeError: For an optimizer that is none of COAT's.
        ValueError: For a ``max_norm`` that is not above 0, a ``batch_bytes`` below 0, gradients that are there
            already, or parameters that several processes train together without FSDP2.
    """

    def __init__(self, optimizer: CoatOptimizer, *, max_norm: float | None = None, batch_bytes: int = BATCH_BYTES):
        if not isinstance(optimizer, CoatOptimizer):
            raise TypeError(f"GradientRelease steps COAT's optimizers, not {type(optimizer).__name__}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}; expected a number above 0, or None to clip nothing")
        if batch_bytes < 0:
            raise ValueError(f"batch_bytes is {batch_bytes}; expected 0 or more")
        self.optimizer, self.max_norm, self.batch_bytes = optimizer, max_norm, batch_bytes
        owned = ((i, p) for i, group in enumerate(optimizer.param_groups) for p in group["params"])
        self._places = {p: (i, number) for number, (i, p) in enumerate(owned)}
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        for p in self._places:
            if p.grad is not None:
                raise ValueError(
                    f"a parameter of shape {list(p.shape)} has a gradient already, which would not be stepped: make "
                    "GradientRelease before the first backward, or after optimizer.zero_grad()"
                )
            if together and not is_sharded(p):
                raise ValueError(
                    "gradients cannot be released inside the backward while several processes train together, unless "
                    "FSDP2 shards the parameters: DDP averages gradients only after that. Use fully_shard, or leave "
                    "gradient release out"
                )
        self._stepped: set[torch.Tensor] = set()  # those that wait are among them
        self._waiting: list[torch.Tensor] = []
        self._waiting_bytes = 0
        self._squares: list[torch.Tensor] = []
        self._norm: torch.Tensor | None = None
        self._handles = [p.register_post_accumulate_grad_hook(self._release) for p in self._places if p.requires_grad]
        self._handles.append(optimizer.register_step_pre_hook(self._refuse_closure))
        self._handles.append(optimizer.register_step_post_hook(self._end_step))

    def remove(self) -> None:
        """Leave the optimizer and its parameters as they were: gradients stay until ``optimizer.step()`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def gradient_norm(self) -> torch.Tensor | None:
        """The norm of the whole gradient of the last step, float32, before any clipping; None if not measured."""
        return self._norm

    @torch.no_grad()
    def _release(self, param: torch.Tensor) -> None:
        if param in self._stepped:
            raise RuntimeError(
                f"a parameter of shape {list(param.shape)} got a second gradient before optimizer.step(), and was "
                "stepped with the first already. Gradient release does not go with gradient accumulation, nor with "
                "parameters that two segments under reentrant gradient checkpointing share: leave it out, make one "
                "backward per step, or use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        check_gradient(param)
        self._stepped.add(param)
        if not self._waiting:  # as the backward that this is a part of ends
            torch.autograd.Variable._execution_engine.queue_callback(self._step_waiting)
        self._waiting.append(param)
        self._waiting_bytes += local(param.grad).nbytes
        if self._waiting_bytes >= self.batch_bytes or is_sharded(param):
            self._step_waiting()

    @torch.no_grad()
    def _step_waiting(self) -> None:
        params, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if self.max_norm is not None and params:
            self._clip([param.grad for param in params])
        of_group = defaultdict(list)
        for param in params:
            group, number = self._places[param]
            of_group[group].append((number, param))
        for group, members in of_group.items():
            self.optimizer.step_params(self.optimizer.param_groups[group], members)
        for param in params:
            param.grad = None

    def _clip(self, grads: list[torch.Tensor]) -> None:
        """Measure the norm of each gradient, and clip it as ``clip_grad_norm_`` does."""
        by_device = defaultdict(list)
        for grad in grads:
            by_device[grad.device].append(grad)
        for of_device in by_device.values():
            norms = torch._foreach_norm(of_device, 2.0, torch.float32)
            norms = torch.stack([norm.full_tensor() if is_sharded(norm) else norm for norm in norms])
            self._squares.append(norms.square().sum())
            if self.max_norm != float("inf"):
                factors = (self.max_norm / (norms + 1e-6)).clamp_(max=1.0)
                for grad, factor in zip(of_device, factors, strict=True):
                    local(grad).mul_(factor)

    def _refuse_closure(self, optimizer: CoatOptimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise ValueError(
                "optimizer.step(closure) runs the backward in the middle of a step, which gradient release ends: call "
                "the closure yourself, then optimizer.step()"
            )

    def _end_step(self, *_: Any) -> None:
        self._stepped.clear()
        self._waiting, self._waiting_bytes = [], 0  # what a backward left that failed, step() has stepped
        if self.max_norm is not None:
            device = self._squares[0].device if self._squares else None
            squares = [square.to(device) for square in self._squares]
            self._norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
            self._squares.clear()

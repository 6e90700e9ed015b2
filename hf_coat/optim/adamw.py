"""AdamW with its states in FP8: COAT's dynamic range expansion (arXiv 2410.19313, section 3) as a torch optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from coat_kernels.adamw import MAX_GROUP_SIZE, MIN_EPS, NO_EXPANSION, PARAMETER_DTYPES, adamw_step, group_shape
from torch.optim import Optimizer

from .sharding import (
    check_placement,
    check_sharding,
    local,
    local_gradient,
    local_rows,
    placed_as,
    rows_shape,
    state_rows,
)

SETTINGS = ("lr", "betas", "eps", "weight_decay", "group_size", "expand")
# What is kept per parameter beside "step", in the order in which the kernel takes it.
MOMENTS = tuple(moment + part for moment in ("exp_avg", "exp_avg_sq") for part in ("", "_scale", "_expansion"))


def _check_options(options: dict[str, Any]) -> None:
    lr, betas, eps, decay, size, expand = (options[key] for key in SETTINGS)
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of shape {list(lr.shape)}; expected a number or a tensor of one number")
    if not isinstance(lr, torch.Tensor) and not 0 <= lr < math.inf:
        raise ValueError(f"lr is {lr}; expected a finite number, 0 or more")
    if len(betas) != 2 or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas!r}; expected two numbers, each at least 0 and below 1")
    if not MIN_EPS <= eps < math.inf:
        raise ValueError(f"eps is {eps}; expected at least {MIN_EPS}, to outweigh second moments too small for FP8")
    if not 0 <= decay < math.inf:
        raise ValueError(f"weight_decay is {decay}; expected a finite number, 0 or more")
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_GROUP_SIZE:
        raise ValueError(f"group_size is {size!r}; expected an integer from 1 to {MAX_GROUP_SIZE}")
    if not isinstance(expand, bool):
        raise ValueError(f"expand is {expand!r}; expected True or False")


def check_gradient(param: torch.Tensor) -> None:
    """Refuse a sparse gradient."""
    if param.grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of a parameter of shape {list(param.shape)} is {param.grad.layout}; CoatAdamW needs dense "
            "gradients: use sparse=False in nn.Embedding, or torch.optim.SparseAdam for that parameter"
        )


class CoatAdamW(Optimizer):
    r"""AdamW with both moments in FP8, a drop-in for ``torch.optim.AdamW`` at 2.08 bytes of state per parameter.

    A moment is one E4M3 code per value and, for every ``group_size`` neighbours along the last dimension, a float32
    scale and an 8-bit expansion: the power that stretches or squeezes the group to the range of E4M3 before it is
    rounded (paper section 3). A step decodes the moments to float32, does what AdamW does, rounds the parameter once,
    and encodes the new moments.

    A group with a gradient that is not finite is skipped: neither its parameters nor its moments change.
    :meth:`skipped_groups` says how often that happened; the step itself never waits for the device.

    The state of a parameter is ``step``, a float32 scalar on the CPU; ``exp_avg`` and ``exp_avg_sq``, uint8 codes of
    the parameter's shape; and for each of the two ``_scale``, float32, and ``_expansion``, uint8, both of the
    parameter's shape with ``ceil(last / group_size)`` for the last dimension. A vector counts as a column: each of its
    values is a group, and hardly rounded.

    Parameters may be DTensors (FSDP2), and so are their states then; see :mod:`hf_coat.optim.sharding`.

        >>> optimizer = CoatAdamW(model.parameters(), lr=1e-5)  # any model, BF16 or FP32
        >>> schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ...     optimizer.step()
        ...     schedule.step()
        ...     optimizer.zero_grad()
        >>> torch.save(optimizer.state_dict(), "optimizer.pt")  # load_state_dict goes on bit for bit

    Args:
        params: Parameters, named parameters or parameter groups: BF16 or FP32, of any shape. Gradients may be either.
        lr: Learning rate, a number or a tensor of one number (for schedulers that change it in place).
        betas: Decay rates of the two moments.
        eps: Added to the denominator; at least 1e-15.
        weight_decay: Decoupled weight decay.
        group_size: Values that share a scale and an expansion, 1 to 1024.
        expand: Whether to expand the range; False keeps plain E4M3.

    Raises:
        TypeError: For parameters that are neither BF16 nor FP32.
        ValueError: For a setting out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        group_size: int = 128,
        expand: bool = True,
    ):
        defaults = dict(zip(SETTINGS, (lr, betas, eps, weight_decay, group_size, expand), strict=True))
        _check_options(defaults)
        self._skipped: dict[torch.device, torch.Tensor] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_skipped", {})  # a pickled or copied optimizer counts from zero

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim``; settings that it lacks are the optimizer's defaults."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for i, param in enumerate(self.param_groups[-1]["params"]):
            if param.dtype not in PARAMETER_DTYPES:
                self.param_groups.pop()
                raise TypeError(
                    f"parameter {i} of the group, {list(param.shape)}, is {param.dtype}; CoatAdamW trains "
                    "torch.bfloat16 and torch.float32: load the model in one of them, and use bf16 rather than fp16"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure``, if given, first computes the gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for p in (p for _, params in groups for p in params):
            check_gradient(p)
        for group, params in groups:
            self.step_params(group, params)
        return loss

    @torch.no_grad()
    def step_params(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        """Step only these parameters of ``group``, which have gradients."""
        by_device = defaultdict(list)
        for p in params:
            by_device[p.device].append(p)
        for device, params in by_device.items():
            states = [self.state[p] or self._new_state(p, group) for p in params]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            adamw_step(
                [local_rows(p) for p in params],
                [local_gradient(p) for p in params],
                *([state_rows(p, s[key]) for p, s in zip(params, states, strict=True)] for key in MOMENTS),
                steps,
                self._skipped_on(device),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                group_size=group["group_size"],
                expand=group["expand"],
            )

    def _layout(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor in the state of ``param``."""
        layout = {"step": (torch.float32, ())}
        groups = group_shape(rows_shape(param), group["group_size"])
        for key in MOMENTS:
            if key.endswith("_scale"):
                layout[key] = (torch.float32, groups)
            elif key.endswith("_expansion"):
                layout[key] = (torch.uint8, groups)
            else:
                layout[key] = (torch.uint8, tuple(param.shape))
        return layout

    def _new_state(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        """All moments zero, distributed as the parameter is."""
        check_sharding(param, group["group_size"])
        here = local_rows(param.detach())
        state = self.state[param]
        for key, (dtype, shape) in self._layout(param, group).items():
            if key == "step":
                state[key] = torch.zeros(shape, dtype=dtype, device="cpu")
                continue
            local_shape = local(param).shape if shape == param.shape else group_shape(here.shape, group["group_size"])
            fill = NO_EXPANSION if key.endswith("_expansion") else 0
            state[key] = placed_as(param, torch.full(local_shape, fill, dtype=dtype, device=here.device), shape)
        return state

    def _skipped_on(self, device: torch.device) -> torch.Tensor:
        """The count of skipped groups on a device."""
        if device not in self._skipped:
            self._skipped[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._skipped[device]

    def skipped_groups(self) -> int:
        """How many groups this process skipped so far for gradients that are not finite. Waits for the device."""
        return sum(int(count) for count in self._skipped.values())

    def state_bytes(self) -> int:
        """Bytes of all states, side data included. A parameter has none before its first gradient."""
        return sum(tensor.nbytes for state in self.state.values() for tensor in state.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states bit for bit, as copies on the parameters' devices.

        Args:
            state_dict: What :meth:`state_dict` returned, here or on another device. As in ``torch.optim``, its
                settings replace those of this optimizer; but ``group_size`` and ``expand`` must be the same.

        Raises:
            ValueError: For states that do not fit. The message says which parameter and what differs; nothing has
                changed then.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        missing = [key for key in ("state", "param_groups") if key not in state_dict]
        if missing:
            raise ValueError(f"the state dict lacks {' and '.join(missing)}: it is no optimizer's, or it is damaged")
        saved_groups = deepcopy(state_dict["param_groups"])
        self._check_groups(saved_groups)
        names, owners = {}, {}
        for i, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            for j, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
                names[key] = group["param_names"][j] if "param_names" in group else f"parameter {j} of group {i}"
                owners[key] = param, group
            saved["params"] = group["params"]
            if "param_names" in group:
                saved.setdefault("param_names", group["param_names"])
        unknown = [key for key in state_dict["state"] if key not in owners]
        if unknown:
            raise ValueError(f"the state dict has states of parameters {unknown}, which are in none of its groups")
        for key, saved in state_dict["state"].items():
            self._check_state(names[key], *owners[key], saved)
        state = defaultdict(dict)
        for key, saved in state_dict["state"].items():
            param, _ = owners[key]
            for name, value in saved.items():
                device = "cpu" if name == "step" else param.device
                copy = local(value).detach().to(device, copy=True, memory_format=torch.contiguous_format)
                state[param][name] = copy if name == "step" else placed_as(param, copy, value.shape)
        self.__setstate__({"state": state, "param_groups": saved_groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _check_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        if sizes != saved_sizes:
            raise ValueError(
                f"the state dict has parameter groups of {saved_sizes} parameters, this optimizer of {sizes}: it is "
                "of another model, or the parameters were grouped in another way"
            )
        for i, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            missing = [key for key in SETTINGS if key not in saved]
            if missing:
                raise ValueError(
                    f"group {i} of the state dict lacks {', '.join(missing)}: it is of another optimizer. Of AdamW, "
                    "convert it: hf_coat.optim.from_adamw_state_dict(state_dict) gives what can be loaded here, or is "
                    "saved again as a Trainer's optimizer.pt. Else start without it, or go on with that optimizer"
                )
            for key in ("group_size", "expand"):
                if saved[key] != group[key]:
                    raise ValueError(
                        f"group {i} of the state dict has {key}={saved[key]!r}, this optimizer {key}={group[key]!r}: "
                        f"construct it with CoatAdamW(..., {key}={saved[key]!r})"
                    )
            _check_options(saved)

    def _check_state(self, name: str, param: torch.Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
        layout = self._layout(param, group)
        if set(saved) != set(layout):
            raise ValueError(
                f"the state of {name} has the entries {sorted(saved)}, expected {sorted(layout)}: it is of another "
                "optimizer, or it is damaged"
            )
        for key, (dtype, shape) in layout.items():
            value = saved[key]
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"the state of {name}: {key} is a {type(value).__name__}, expected a {dtype} tensor")
            if value.dtype != dtype or tuple(value.shape) != shape:
                raise ValueError(
                    f"the state of {name}: {key} is {value.dtype} {list(value.shape)}, expected {dtype} {list(shape)} "
                    f"for a parameter of shape {list(param.shape)} in groups of {group['group_size']}: "
                    "it is of another model"
                )
            if key != "step":
                check_placement(f"the state of {name}: {key}", value, param)

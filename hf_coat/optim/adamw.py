"""AdamW with its states in 8 bits per value (arXiv 2410.19313, section 3, and beyond) as a torch optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, ClassVar

import torch
from coat_kernels.adamw import adamw_step
from coat_kernels.states import (
    MAX_GROUP_SIZE,
    MIN_EPS,
    NO_EXPANSION,
    PARAMETER_DTYPES,
    StateFormat,
    Weights,
    group_shape,
    join_master,
)
from torch.optim import Optimizer

from ..functional.amax import amax_asked, hand_amax
from .sharding import (
    check_placement,
    check_sharding,
    first_index,
    is_sharded,
    local,
    local_gradient,
    local_rows,
    placed_as,
    rows_shape,
    state_rows,
)

RESIDUAL = "weight_residual"
CHOICES = {"format": StateFormat, "weights": Weights}
FIXED = ("group_size", "format", "weights")  # what states are made for: a checkpoint must have the same


def _check_options(options: dict[str, Any]) -> None:
    """Refuse settings out of their range; in place, turn members of choices into their names."""
    for key in ("amsgrad", "maximize"):
        if options.get(key):
            raise ValueError(f"{key} is {options[key]!r} in a parameter group; COAT's optimizers do not have it")
    lr, betas, decay, size, seed = (options[key] for key in ("lr", "betas", "weight_decay", "group_size", "seed"))
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of shape {list(lr.shape)}; expected a number or a tensor of one number")
    if not isinstance(lr, torch.Tensor) and not 0 <= lr < math.inf:
        raise ValueError(f"lr is {lr}; expected a finite number, 0 or more")
    if len(betas) != 2 or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas!r}; expected two numbers, each at least 0 and below 1")
    if "eps" in options and not MIN_EPS <= options["eps"] < math.inf:
        raise ValueError(
            f"eps is {options['eps']}; expected at least {MIN_EPS}, to outweigh second moments too small for 8 bits"
        )
    if not 0 <= decay < math.inf:
        raise ValueError(f"weight_decay is {decay}; expected a finite number, 0 or more")
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_GROUP_SIZE:
        raise ValueError(f"group_size is {size!r}; expected an integer from 1 to {MAX_GROUP_SIZE}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed is {seed!r}; expected an integer")
    for key, kind in CHOICES.items():
        value, names = options[key], [choice.value for choice in kind]
        if value not in names:
            raise ValueError(f"{key} is {value!r}; expected one of {', '.join(map(repr, names))}")
        options[key] = kind(value).value  # a plain string, which every checkpoint can hold
    if not isinstance(options["capturable"], bool):
        raise ValueError(f"capturable is {options['capturable']!r}; expected True or False")


def check_gradient(param: torch.Tensor) -> None:
    """Refuse a sparse gradient."""
    if param.grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of a parameter of shape {list(param.shape)} is {param.grad.layout}; COAT's optimizers need "
            "dense gradients: use sparse=False in nn.Embedding, or torch.optim.SparseAdam for that parameter"
        )


def state_layout(
    moments: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, group_size: int, format: StateFormat,
    weights: Weights,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:  # fmt: skip
    """Dtype and shape of each tensor in the state of a parameter of this shape and dtype."""
    layout = {"step": (torch.float32, ())}
    side = group_shape(rows_shape(shape), group_size)
    for moment in moments:
        layout[f"{moment}_codes"] = torch.uint8, tuple(shape)
        layout[f"{moment}_scale"] = torch.float32, side
        if format.expands:
            layout[f"{moment}_expansion"] = torch.uint8, side
    if weights is Weights.MASTER and dtype == torch.bfloat16:
        layout[RESIDUAL] = torch.uint8, tuple(shape)
    return layout


class CoatOptimizer(Optimizer):
    """What :class:`CoatAdamW` and :class:`CoatLion` share: settings, states, checkpoints; see there.

    A subclass names its ``MOMENTS`` and ``SETTINGS``, and steps the parameters of a device in ``_step_device``.
    """

    MOMENTS: ClassVar[tuple[str, ...]]
    SETTINGS: ClassVar[tuple[str, ...]]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        _check_options(defaults)
        self._skipped: dict[torch.device, torch.Tensor] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_skipped", {})  # a pickled or copied optimizer counts from zero

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim``; settings that it lacks are the optimizer's defaults."""
        options = {**self.defaults, **param_group}
        _check_options(options)
        param_group |= {key: options[key] for key in CHOICES}
        super().add_param_group(param_group)
        for i, param in enumerate(self.param_groups[-1]["params"]):
            if param.dtype not in PARAMETER_DTYPES:
                self.param_groups.pop()
                raise TypeError(
                    f"parameter {i} of the group, {list(param.shape)}, is {param.dtype}; {type(self).__name__} trains "
                    "torch.bfloat16 and torch.float32: load the model in one of them, and use bf16 rather than fp16"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure``, if given, first computes the gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbered, count = [], 0
        for group in self.param_groups:
            members = enumerate(group["params"], start=count)
            numbered.append((group, [(i, p) for i, p in members if p.grad is not None]))
            count += len(group["params"])
        for p in (p for _, members in numbered for _, p in members):
            check_gradient(p)
        for group, members in numbered:
            self.step_params(group, members)
        return loss

    @torch.no_grad()
    def step_params(self, group: dict[str, Any], members: list[tuple[int, torch.Tensor]]) -> None:
        """Step only these parameters of ``group``, which have gradients; each comes with its number among all."""
        together = defaultdict(list)
        for i, p in members:
            # Not of a piece of a weight, nor where a CUDA graph may step, which moves no version counter.
            asked = amax_asked(p) and not is_sharded(p) and not group["capturable"]
            together[p.device, asked].append((i, p))
        for (device, asked), numbered in together.items():
            numbers, params = map(list, zip(*numbered, strict=True))
            states = [self.state[p] or self._new_state(p, group) for p in params]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            owned = list(zip(params, states, strict=True))
            moments = [
                tuple(
                    [state_rows(p, state[name + part]) for p, state in owned if name + part in state]
                    for part in ("_codes", "_scale", "_expansion")
                )
                for name in self.MOMENTS
            ]
            residuals = []
            if group["weights"] == Weights.MASTER:
                none = torch.empty(0, dtype=torch.uint8, device=device)
                residuals = [state_rows(p, state[RESIDUAL]) if RESIDUAL in state else none for p, state in owned]
            amax = torch.empty(len(params), dtype=torch.float32, device=device) if asked else None
            others = {"numbers": numbers, "firsts": [first_index(p) for p in params], "amax": amax}
            values, grads = [local_rows(p) for p in params], [local_gradient(p) for p in params]
            self._step_device(group, values, grads, moments, residuals, steps, self._skipped_on(device), others)
            if asked:
                for p, of_one in zip(params, amax.view(-1, 1, 1).unbind(), strict=True):
                    hand_amax(p, of_one)

    def _step_device(self, group, params, grads, moments, residuals, steps, skipped, others) -> None:
        raise NotImplementedError

    def _layout(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        settings = group["group_size"], StateFormat(group["format"]), Weights(group["weights"])
        return state_layout(self.MOMENTS, param.shape, param.dtype, *settings)

    def _new_state(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        """All moments zero, distributed as the parameter is."""
        check_sharding(param, group["group_size"])
        here = local_rows(param.detach())
        state = self.state[param]
        for key, (dtype, shape) in self._layout(param, group).items():
            if key == "step":
                state[key] = torch.zeros((), dtype=dtype, device=param.device if group["capturable"] else "cpu")
                continue
            local_shape = local(param).shape if shape == param.shape else group_shape(here.shape, group["group_size"])
            fill = NO_EXPANSION if key.endswith("_expansion") else 0
            state[key] = placed_as(param, torch.full(local_shape, fill, dtype=dtype, device=here.device), shape)
        return state

    def master_weights(self) -> dict[torch.Tensor, torch.Tensor]:
        """The weights as the optimizer knows them, float32, by parameter.

        With ``weights="master"`` those are the 24 bits of a BF16 parameter that has taken a step, whose nearest BF16
        numbers are what the model sees; everything else is the parameter itself.
        """
        weights = {}
        for p in (p for group in self.param_groups for p in group["params"]):
            residual = self.state[p].get(RESIDUAL) if p in self.state else None
            weights[p] = p.detach().float() if residual is None else join_master(p.detach(), residual)
        return weights

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
                settings replace those of this optimizer; but ``group_size``, ``format`` and ``weights`` must be the
                same.

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
            param, group = owners[key]
            for name, value in saved.items():
                device = param.device if name != "step" or group["capturable"] else "cpu"
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
            missing = [key for key in self.SETTINGS if key not in saved]
            if missing:
                raise ValueError(
                    f"group {i} of the state dict lacks {', '.join(missing)}: it is of another optimizer. AdamW's, "
                    "convert: hf_coat.optim.from_adamw_state_dict(state_dict) gives what CoatAdamW loads, and may be "
                    "saved again as a Trainer's optimizer.pt. Else start without it, or go on with that optimizer"
                )
            for key in FIXED:
                if saved[key] != group[key]:
                    raise ValueError(
                        f"group {i} of the state dict has {key}={saved[key]!r}, this optimizer {key}={group[key]!r}: "
                        f"construct it with {type(self).__name__}(..., {key}={saved[key]!r})"
                    )
            _check_options(saved)
            saved["capturable"] = group["capturable"]  # where steps are counted is this process's affair

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
                    f"for a parameter of shape {list(param.shape)} in groups of {group['group_size']}: it is of "
                    "another model"
                )
            if key != "step":
                check_placement(f"the state of {name}: {key}", value, param)


class CoatAdamW(CoatOptimizer):
    r"""AdamW with both moments in 8 bits, a drop-in for ``torch.optim.AdamW`` at 2.06 bytes of state per parameter.

    A moment is one byte per value and a scale for every ``group_size`` neighbours along the last dimension. The format
    ``lean`` keeps m / sqrt(v), what the step uses, and the fourth root of v, both in equal steps; ``paper`` E4M3 codes
    and an expansion per group, the power that stretches or squeezes it to the range of E4M3 (paper section 3, 2.08
    bytes); ``e4m3`` E4M3 codes alone. A step decodes the moments to float32, does what AdamW does, rounds the weights
    once, and encodes the new moments.

    A group with a gradient that is not finite is skipped: neither its parameters nor its moments change.
    :meth:`skipped_groups` says how often that happened; the step itself never waits for the device.

    The state of a parameter is ``step``, a float32 scalar; ``exp_avg_codes`` and ``exp_avg_sq_codes``, uint8 of the
    parameter's shape; for each of the two ``_scale`` and in ``paper`` ``_expansion``, of the parameter's shape with
    ``ceil(last / group_size)`` for the last dimension; and with ``weights="master"`` of a BF16 parameter
    ``weight_residual``, uint8 of its shape. A vector counts as a column: each of its values is a group, and hardly
    rounded.

    LoRA's b [N, r] has a group for each row. In ``lean`` its states take 2 + 8 / r bytes a value, at most the 8 of
    FP32 states down to a rank of 2 (6; 2.5 at 16), and a [r, K] takes 2.06. Only a rank of 1 and vectors (DoRA's
    magnitudes, biases) would be cheaper in FP32, 8 bytes against 10: kilobytes, for which there is no second path.

    Parameters may be DTensors (FSDP2), and so are their states then; see :mod:`hf_coat.optim.sharding`.

    Linears with one FP8 scale per tensor (the preset "paper") find in the optimizer the amax of each new weight, and
    need not read the weight for it; see :mod:`hf_coat.functional.amax`. A graph's steps (``capturable``), and those of
    DTensors, hand over none.

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
        group_size: Values that share a scale, 1 to 1024.
        format: How moments are kept, a :class:`~coat_kernels.states.StateFormat` or its name.
        weights: How BF16 parameters are rounded, a :class:`~coat_kernels.states.Weights` or its name: ``"nearest"``
            loses every update below half of the distance to the next BF16 number, ``"stochastic"`` keeps them on
            average, ``"master"`` keeps 8 more bits in the state (a byte per parameter). FP32 parameters are exact.
        seed: What stochastic rounding depends on, beside step, parameter and place.
        capturable: Whether steps are counted on the device, so that a CUDA graph may hold ``step()``; give ``lr`` as
            a tensor on the device then, too.

    Raises:
        TypeError: For parameters that are neither BF16 nor FP32.
        ValueError: For a setting out of its range.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq")
    SETTINGS = ("lr", "betas", "eps", "weight_decay", "group_size", "format", "weights", "seed", "capturable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        group_size: int = 128,
        format: StateFormat | str = StateFormat.LEAN,
        weights: Weights | str = Weights.STOCHASTIC,
        seed: int = 0,
        capturable: bool = False,
    ):
        values = (lr, betas, eps, weight_decay, group_size, format, weights, seed, capturable)
        super().__init__(params, dict(zip(self.SETTINGS, values, strict=True)))

    def _step_device(self, group, params, grads, moments, residuals, steps, skipped, others) -> None:
        adamw_step(
            params,
            grads,
            *moments,
            residuals,
            steps,
            skipped,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            group_size=group["group_size"],
            format=StateFormat(group["format"]),
            weights=Weights(group["weights"]),
            seed=group["seed"],
            **others,
        )

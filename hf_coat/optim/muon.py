"""Muon for the matrices inside a model, AdamW for everything else; all states in 8 bits.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix by the nearest matrix
whose singular values are all about one:

    m = momentum m + (1 - momentum) g        u = momentum m + (1 - momentum) g  (Nesterov; else u = m)
    p = (1 - lr weight_decay) p - lr s orthogonal(u)

It keeps one moment where AdamW keeps two: here an E4M3 code per value and a power-of-two scale, one byte, per group,
which is 1.01 bytes per parameter. Rounding m is all that sets it apart from ``torch.optim.Muon``: u comes from the m
that is not rounded yet, weights are computed in float32 and rounded once, as ``weights`` says.
"""

import enum
import math
from collections.abc import Iterable
from typing import Any

import torch
from coat_kernels import Granularity, dequantize, quantize
from coat_kernels.states import StateFormat, Weights, read_weights, round_weights, weight_key
from torch import nn

from .adamw import RESIDUAL, CoatAdamW, CoatOptimizer
from .sharding import first_index, is_sharded, local, local_gradient, placed_as

E4M3 = torch.float8_e4m3fn
# Chosen by Keller Jordan for speed: singular values end between about 0.7 and 1.2, not at 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7
# How words in the names of modules begin whose matrices map from or to a vocabulary or labels.
ENDS = ("embed", "wte", "wpe", "head", "score", "classifier")


class MuonScale(str, enum.Enum):
    """The factor s of a matrix [A, B].

    ``original``: sqrt(max(1, A / B)), Keller Jordan's, for learning rates around 0.02. ``match_rms_adamw``:
    0.2 sqrt(max(A, B)), which makes a step about as large as AdamW's (arXiv 2502.16982), so that all parameters share
    one learning rate and one weight decay.
    """

    ORIGINAL = "original"
    MATCH_RMS_ADAMW = "match_rms_adamw"

    def factor(self, rows: int, columns: int) -> float:
        if self is MuonScale.ORIGINAL:
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The orthogonal factor of ``x``, roughly: U S V^T becomes U S' V^T with S' about one, by Newton-Schulz in BF16.

    Args:
        x: A matrix [A, B].
        steps: Iterations.

    Returns:
        BF16 [A, B].
    """
    a, b, c = QUINTIC
    tall = x.shape[0] > x.shape[1]
    y = x.bfloat16().T if tall else x.bfloat16()
    y = y / y.norm().clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if tall else y


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of a model as :class:`CoatMuon` takes them: matrices, other tensors, and vectors.

    AdamW trains all that is not a matrix, what belongs to an ``nn.Embedding``, a transformers model's output
    embeddings, and modules with names such as ``lm_head`` or ``classifier``. For another choice make groups yourself.
    Parameters that are frozen are left out.

    Returns:
        Parameter groups with names, ``use_muon``, and ``weight_decay`` 0 for the last; empty ones are left out.
    """
    ends = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    ends |= {id(p) for p in head.parameters()} if head is not None else set()
    matrices, others, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        named_end = any(word.startswith(ENDS) for word in name.replace(".", "_").split("_"))
        if p.dim() < 2:
            vectors.append((name, p))
        elif p.dim() > 2 or id(p) in ends or named_end:
            others.append((name, p))
        else:
            matrices.append((name, p))
    groups = [
        {"params": matrices, "use_muon": True},
        {"params": others, "use_muon": False},
        {"params": vectors, "use_muon": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class CoatMuon(CoatAdamW):
    """Muon with FP8 momentum for groups with ``use_muon=True``, :class:`CoatAdamW` for groups with ``use_muon=False``.

        >>> optimizer = CoatMuon(muon_groups(model), lr=3e-4)

    A matrix with a gradient that is not finite is skipped as a whole. The state of a matrix is ``step``, a float32
    scalar; ``momentum_codes``, uint8 of its shape; ``momentum_scale``, uint8 [A, ceil(B / group_size)]; and with
    ``weights="master"`` of a BF16 matrix ``weight_residual``, uint8 of its shape.
    Under FSDP2 a step gathers each matrix's u and every process orthogonalizes it whole.

    Args:
        params: Parameter groups, each with ``use_muon``; :func:`muon_groups` makes them. BF16 or FP32.
        lr: Learning rate, a number or a tensor of one number.
        momentum: Decay rate of the momentum of matrices.
        nesterov: Whether the gradient is mixed into the momentum once more.
        ns_steps: Newton-Schulz iterations.
        scale: How a matrix's step depends on its shape, see :class:`MuonScale`.
        betas, eps: As :class:`CoatAdamW`, for the groups that it trains.
        weight_decay: Decoupled weight decay.
        group_size: Values that share a scale, a power of two up to 1024.
        format: As :class:`CoatAdamW`, for the groups that it trains.
        weights, seed, capturable: As :class:`CoatAdamW`, for all groups.

    Raises:
        TypeError: For parameters that are neither BF16 nor FP32.
        ValueError: For a setting out of its range, a group without ``use_muon``, or one with it that has a parameter
            that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        scale: MuonScale | str = MuonScale.MATCH_RMS_ADAMW,
        group_size: int = 128,
        format: StateFormat | str = StateFormat.LEAN,
        weights: Weights | str = Weights.STOCHASTIC,
        seed: int = 0,
        capturable: bool = False,
    ):
        values = (lr, betas, eps, weight_decay, group_size, format, weights, seed, capturable)
        defaults = dict(zip(self.SETTINGS, values, strict=True))
        defaults |= {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "scale": scale}
        _check_muon(defaults)
        defaults["scale"] = MuonScale(scale).value  # a plain string, which every checkpoint can hold
        CoatOptimizer.__init__(self, params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim``; it must have ``use_muon``."""
        if not isinstance(param_group.get("use_muon"), bool):
            raise ValueError(
                "CoatMuon takes parameter groups that each say use_muon=True or False: CoatMuon(muon_groups(model)) "
                "chooses for you, and leaves embeddings, heads and vectors to AdamW"
            )
        _check_muon({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["scale"] = MuonScale(group["scale"]).value
        for i, p in enumerate(group["params"]):
            if group["use_muon"] and p.dim() != 2:
                self.param_groups.pop()
                raise ValueError(
                    f"parameter {i} of the group has the shape {list(p.shape)}; Muon trains matrices: put it into a "
                    "group with use_muon=False"
                )

    @torch.no_grad()
    def step_params(self, group: dict[str, Any], members: list[tuple[int, torch.Tensor]]) -> None:
        """Step only these parameters of ``group``, which have gradients; each comes with its number among all."""
        if not group["use_muon"]:
            return super().step_params(group, members)
        for number, param in members:
            self._step_matrix(group, param, self.state[param] or self._new_state(param, group), number)

    def _step_matrix(self, group: dict[str, Any], param: torch.Tensor, state: dict[str, torch.Tensor], number: int):
        here, residual = local(param), None if RESIDUAL not in state else local(state[RESIDUAL])
        codes, stored_scale = local(state["momentum_codes"]), local(state["momentum_scale"])
        size, rest = group["group_size"], 1 - group["momentum"]
        state["step"] += 1
        if param.numel() == 0:
            return
        g = local_gradient(param).float()
        m = dequantize(codes.view(E4M3), stored_scale, group_size=size, dtype=torch.float32).lerp_(g, rest)
        u = placed_as(param, g.lerp(m, group["momentum"]) if group["nesterov"] else m, param.shape)
        whole = u.full_tensor() if is_sharded(u) else u
        finite = whole.isfinite().all()
        step = local(_distributed(orthogonal(whole, group["ns_steps"]), param)).float()
        new = read_weights(here, residual) * (1 - group["lr"] * group["weight_decay"])
        new -= group["lr"] * MuonScale(group["scale"]).factor(*param.shape) * step
        key = weight_key(group["seed"], number, state["step"])
        new, new_residual = round_weights(new, here.dtype, Weights(group["weights"]), key, first_index(param))
        new_codes, _, new_scale = quantize(
            m, E4M3, Granularity.GROUP, group_size=size, power_of_two=True, scale_dtype=torch.uint8
        )
        kept = [(here, new), (codes, new_codes.view(torch.uint8)), (stored_scale, new_scale)]
        for old, fresh in [*kept, *([] if residual is None else [(residual, new_residual)])]:
            old.copy_(torch.where(finite, fresh, old))
        self._skipped_on(here.device).add_(~finite * new_scale.numel())

    def _layout(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if not group["use_muon"]:
            return super()._layout(param, group)
        rows, columns = param.shape
        layout = {
            "step": (torch.float32, ()),
            "momentum_codes": (torch.uint8, (rows, columns)),
            "momentum_scale": (torch.uint8, (rows, -(-columns // group["group_size"]))),
        }
        if group["weights"] == Weights.MASTER and param.dtype == torch.bfloat16:
            layout[RESIDUAL] = torch.uint8, (rows, columns)
        return layout

    def _check_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        super()._check_groups(saved_groups)
        for i, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            if saved.get("use_muon") != group["use_muon"]:
                raise ValueError(
                    f"group {i} of the state dict has use_muon={saved.get('use_muon')}, this optimizer "
                    f"use_muon={group['use_muon']}: make the groups as they were"
                )


def _distributed(whole: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has, distributed as ``param`` is."""
    if not is_sharded(param):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)


def _check_muon(options: dict[str, Any]) -> None:
    momentum, nesterov, steps, scale, size = (
        options[key] for key in ("momentum", "nesterov", "ns_steps", "scale", "group_size")
    )
    if not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum!r}; expected a number, at least 0 and below 1")
    if not isinstance(nesterov, bool):
        raise ValueError(f"nesterov is {nesterov!r}; expected True or False")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps < 100:
        raise ValueError(f"ns_steps is {steps!r}; expected an integer from 1 to 99")
    choices = [choice.value for choice in MuonScale]
    if scale not in choices:
        raise ValueError(f"scale is {scale!r}; expected one of {', '.join(map(repr, choices))}")
    if isinstance(size, int) and size & (size - 1):
        raise ValueError(f"group_size is {size}; expected a power of two, for the matrices")

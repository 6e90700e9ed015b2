"""AdamW whose two moments are kept as E4M3 codes with dynamic range expansion (arXiv 2410.19313, section 3).

The last dimension of a parameter is cut into groups of G values (the last group of a row may be shorter). A group of a
moment is one code per value, one float32 scale and one uint8 expansion: 5 bytes of side data per group.

    scale      s = max |x|
    expansion  e = floor(16 * log2(448**2 / 2) / log2(max |x| / min |x|)), held between 1 and 255; the power k = e / 16
    code       q = E4M3 of sign(x) * 448 * (|x| / s)**k             decoded:  x = s * sign(q) * (|q| / 448)**(1 / k)

The minimum is over the values that are not zero. The power stretches (k > 1) or squeezes (k < 1) the group until it
fills the range of E4M3: its largest value lands on 448, its smallest at 448 * 2**-16.61 = 2.3 * 2**-9 or above, never
on zero. The paper recentres a group by sqrt(max * min) before the power; that cancels out. Plain E4M3 follows the same
convention with k = 1 (e = 16): s is then 448 times the scale of ``x ≈ x_q * x_s``.

Encoding what was decoded gives the same codes under the same s and e. Chosen anew, e may differ by a step or two: the
smallest value was rounded, since 2.3 * 2**-9 is no code. Groups that span more than 2**8 settle after a few rounds;
narrower ones need not, and their smallest values may wander.

Stated outcomes:

- Magnitudes below the smallest normal float32 number, 2**-126, count as zero. Zeros stay zero and have no part in the
  choice of e. A group of zeros has s = 0, e = 16. A constant group has e = 255 and keeps its magnitude and its signs.
- A second moment that is not zero gets no code of zero: it is rounded up to the smallest code at least, so that a step
  may be too small but never explodes (plain E4M3 needs that, expanded groups do not). It may still decode to zero,
  below 2**-126; that takes a second moment below 2**-108, whose root is a twentieth of the smallest eps allowed.
- A group in which a gradient, or a moment that follows from it, is not finite is skipped: its parameters and moments
  stay as they are, bit for bit, and ``skipped`` counts it.
- A parameter is computed in float32 from moments that are not rounded yet, and rounded once, to nearest even.
"""

import torch
from torch.nn.functional import hardshrink, pad, threshold

from ._registry import register
from .formats import SMALLEST_NORMAL, largest, round_up

PARAMETER_DTYPES = (torch.bfloat16, torch.float32)
CODES = torch.float8_e4m3fn
LARGEST = largest(CODES)
LOG2_LARGEST = 8.807354922057604  # log2(448)
EXPANSION_BITS = 16 * (2 * LOG2_LARGEST - 1)  # 16 * log2(448**2 / 2)
SMALLEST_CODE = 2.0**-9
LARGEST_SUBNORMAL = SMALLEST_NORMAL - 2.0**-149
_CODE_VALUES = torch.arange(256, dtype=torch.uint8, device="cpu").view(CODES).double()
LOG2_CODES = (_CODE_VALUES.abs() / LARGEST).log2().float()  # log2(|q| / 448), -inf for zero
NO_EXPANSION = 16  # k = 1
MAX_GROUP_SIZE = 1024
MIN_EPS = 1e-15


def group_shape(shape: tuple[int, ...], group_size: int) -> tuple[int, ...]:
    """The shape of a moment's scales and expansions: one per group along the last dimension of ``shape``."""
    return (*shape[:-1], -(-shape[-1] // group_size)) if len(shape) else (1,)


def _to_groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """``x`` as [groups, values of a group], with zeros where the last group of a row is shorter."""
    columns = x.shape[-1] if x.dim() else 1
    width = min(group_size, max(columns, 1))
    x = x.reshape(x.numel() // max(columns, 1), columns)
    return pad(x, (0, -columns % width)).reshape(-1, width)


def _from_groups(groups: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of :func:`_to_groups`."""
    columns = shape[-1] if len(shape) else 1
    padded = max(round_up(columns, groups.shape[1]), 1)
    return groups.reshape(groups.numel() // padded, padded)[:, :columns].reshape(shape)


def choose_expansion(magnitude: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The expansions, uint8 [N], of groups with magnitudes [N, W], the largest of each being ``scale`` [N]."""
    smallest = threshold(magnitude, 0.0, float("inf")).amin(dim=1).double()
    expansion = torch.floor(EXPANSION_BITS / (scale.double().log2() - smallest.log2())).clamp(1, 255)
    return torch.where(scale > 0, expansion, NO_EXPANSION).to(torch.uint8)


def encode_groups(groups: torch.Tensor, scale: torch.Tensor, expansion: torch.Tensor, positive: bool) -> torch.Tensor:
    """Codes, uint8, of float32 ``groups`` [N, W] without subnormal numbers, under given scales and expansions [N]."""
    log_scale = scale.clamp(min=SMALLEST_NORMAL).log2()[:, None]
    y = groups.abs().log2_().sub_(log_scale).mul_(expansion.float()[:, None] / 16).add_(LOG2_LARGEST).exp2_()
    y.clamp_(max=LARGEST)
    if positive:
        y = torch.where(groups > 0, y.clamp_(min=SMALLEST_CODE), 0.0)
    return y.copysign_(groups).to(CODES).view(torch.uint8)


def decode_groups(codes: torch.Tensor, scale: torch.Tensor, expansion: torch.Tensor) -> torch.Tensor:
    """The float32 values of uint8 ``codes`` [N, W] under scales and expansions [N]."""
    log_codes = LOG2_CODES.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
    root = log_codes.mul_(8 / expansion.float()[:, None]).exp2_()  # its square may be below 2**-126
    return root.copysign(codes.view(torch.int8)).mul_(scale[:, None]).mul_(root)


def encode_moment(
    x: torch.Tensor, group_size: int, *, expand: bool = True, positive: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode a moment by groups along its last dimension, as the head of this file says.

    Args:
        x: Float32 values of any shape.
        group_size: Values per group.
        expand: Whether each group gets an expansion of its own; k = 1 otherwise.
        positive: Whether no value but zero may get a code of zero: what a second moment needs.

    Returns:
        ``(codes, scale, expansion)``: uint8 of the shape of ``x``, then float32 and uint8 of :func:`group_shape`. A
        group with a value that is not finite has such a scale, and codes and expansion that mean nothing.
    """
    groups = hardshrink(_to_groups(x, group_size), LARGEST_SUBNORMAL)
    magnitude = groups.abs()
    scale = magnitude.amax(dim=1)
    if expand:
        expansion = choose_expansion(magnitude, scale)
    else:
        expansion = torch.full_like(scale, NO_EXPANSION, dtype=torch.uint8)
    codes = encode_groups(groups, scale, expansion, positive)
    shape = group_shape(x.shape, group_size)
    return _from_groups(codes, x.shape), scale.view(shape), expansion.view(shape)


def decode_moment(codes: torch.Tensor, scale: torch.Tensor, expansion: torch.Tensor, group_size: int) -> torch.Tensor:
    """The float32 values of a moment, of the shape of ``codes``; undoes :func:`encode_moment` but for the rounding."""
    groups = decode_groups(_to_groups(codes, group_size), scale.flatten(), expansion.flatten())
    return _from_groups(groups, codes.shape)


def _spread(groups: torch.Tensor, shape: tuple[int, ...], group_size: int) -> torch.Tensor:
    """One value per group, of :func:`group_shape`, as one for each value of a tensor of ``shape``."""
    if not len(shape):
        return groups.view(())
    return groups.repeat_interleave(group_size, dim=-1)[..., : shape[-1]]


def adamw_step_ref(
    params, grads, exp_avgs, exp_avg_scales, exp_avg_expansions, exp_avg_sqs, exp_avg_sq_scales, exp_avg_sq_expansions,
    steps, skipped, lr, beta1, beta2, eps, weight_decay, group_size, expand,
):  # fmt: skip
    lr = lr.item()
    first = zip(exp_avgs, exp_avg_scales, exp_avg_expansions, strict=True)
    second = zip(exp_avg_sqs, exp_avg_sq_scales, exp_avg_sq_expansions, strict=True)
    for param, grad, m_state, v_state, step in zip(params, grads, first, second, steps, strict=True):
        g = grad.float()
        m = decode_moment(*m_state, group_size).mul_(beta1).add_(g, alpha=1 - beta1)
        v = decode_moment(*v_state, group_size).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction1, correction2 = 1 - beta1 ** step.item(), 1 - beta2 ** step.item()
        denominator = v.sqrt().div_(correction2**0.5).add_(eps)
        new = param.float() * (1 - lr * weight_decay)
        new.addcdiv_(m, denominator, value=-lr / correction1)

        m_new = encode_moment(m, group_size, expand=expand)
        v_new = encode_moment(v, group_size, expand=expand, positive=True)
        broken = ~(m_new[1].isfinite() & v_new[1].isfinite())
        skipped += broken.sum()
        broken_values = _spread(broken, param.shape, group_size)
        param.copy_(torch.where(broken_values, param, new.to(param.dtype)))
        for old, fresh in zip((*m_state, *v_state), (*m_new, *v_new), strict=True):
            old.copy_(torch.where(broken_values if old.shape == param.shape else broken, old, fresh))


_adamw_step = register(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_scales, "
    "Tensor(d!)[] exp_avg_expansions, Tensor(e!)[] exp_avg_sqs, Tensor(f!)[] exp_avg_sq_scales, "
    "Tensor(g!)[] exp_avg_sq_expansions, Tensor[] steps, Tensor(h!) skipped, Tensor lr, float beta1, float beta2, "
    "float eps, float weight_decay, int group_size, bool expand) -> ()",
    adamw_step_ref,
    lambda *args: None,
    "adamw_triton:adamw_step",
)


def _check_adamw_step(params, grads, moments, steps, skipped, lr, group_size):
    if not 1 <= group_size <= MAX_GROUP_SIZE:
        raise ValueError(f"adamw_step: group_size is {group_size}, expected 1 to {MAX_GROUP_SIZE}")
    for name, tensors in (("grads", grads), ("steps", steps), *moments.items()):
        if len(tensors) != len(params):
            raise ValueError(f"adamw_step: {len(tensors)} {name} for {len(params)} params")
    if skipped.dtype != torch.int64 or skipped.numel() != 1:
        raise ValueError(
            f"adamw_step: skipped is {skipped.dtype} {list(skipped.shape)}, expected one torch.int64 count"
        )
    if lr.numel() != 1:
        raise ValueError(f"adamw_step: lr has the shape {list(lr.shape)}, expected one number")
    for name, tensors in (("params", params), ("grads", grads)):
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            if tensor.dtype not in PARAMETER_DTYPES or tensor.layout != torch.strided:
                raise TypeError(
                    f"adamw_step: {name}[{i}] is {tensor.dtype} ({tensor.layout}), expected dense torch.bfloat16 or "
                    "torch.float32"
                )
            if tensor.shape != param.shape or tensor.device != skipped.device:
                raise ValueError(
                    f"adamw_step: {name}[{i}] is {list(tensor.shape)} on {tensor.device}, expected "
                    f"{list(param.shape)} on {skipped.device} as its parameter and the count of skipped groups"
                )
    group_shapes = [group_shape(param.shape, group_size) for param in params]
    for name, tensors in moments.items():
        shapes = group_shapes if name.endswith(("_scales", "_expansions")) else [param.shape for param in params]
        dtype = torch.float32 if name.endswith("_scales") else torch.uint8
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            fits = tensor.dtype == dtype and tensor.shape == shape and tensor.device == skipped.device
            if not fits or not tensor.is_contiguous():
                raise ValueError(
                    f"adamw_step: {name}[{i}] is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected "
                    f"contiguous {dtype} {list(shape)} on {skipped.device}"
                )
    for i, step in enumerate(steps):
        if step.device.type != "cpu" or step.numel() != 1:
            raise ValueError(
                f"adamw_step: steps[{i}] is {list(step.shape)} on {step.device}, expected one number on the CPU"
            )


def adamw_step(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_scales: list[torch.Tensor],
    exp_avg_expansions: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    exp_avg_sq_scales: list[torch.Tensor],
    exp_avg_sq_expansions: list[torch.Tensor],
    steps: list[torch.Tensor],
    skipped: torch.Tensor,
    *,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    group_size: int = 128,
    expand: bool = True,
) -> None:
    """One AdamW step of many parameters of one device, in place, moments kept as E4M3 codes (paper section 3).

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g**2
        p = (1 - lr weight_decay) p - lr m / (1 - beta1**step) / (sqrt(v / (1 - beta2**step)) + eps)

    Args:
        params: BF16 or FP32 parameters of any shapes and strides.
        grads: Their gradients, BF16 or FP32 each.
        exp_avgs, exp_avg_sqs: uint8 codes of the two moments, contiguous, shaped as the parameters. All zero at first.
        exp_avg_scales, exp_avg_sq_scales: float32, of :func:`group_shape`. All zero at first.
        exp_avg_expansions, exp_avg_sq_expansions: uint8, of :func:`group_shape`. All 16 at first.
        steps: The number of each parameter's step, this one included: one number each, on the CPU.
        skipped: One int64 on the device; the number of groups that were skipped for lack of finiteness is added to it.
        lr: Learning rate, a number or a tensor of one number; on the device it is read without waiting for it.
        beta1, beta2, eps, weight_decay: As in ``torch.optim.AdamW``.
        group_size: Values per group, 1 to 1024.
        expand: Dynamic range expansion; False keeps plain E4M3 and expansions of 16.

    Raises:
        TypeError, ValueError: For dtypes, shapes or devices that do not fit; the message names the tensor.
    """
    moments = {
        "exp_avgs": exp_avgs,
        "exp_avg_scales": exp_avg_scales,
        "exp_avg_expansions": exp_avg_expansions,
        "exp_avg_sqs": exp_avg_sqs,
        "exp_avg_sq_scales": exp_avg_sq_scales,
        "exp_avg_sq_expansions": exp_avg_sq_expansions,
    }
    if not isinstance(lr, torch.Tensor):
        lr = torch.tensor(lr, dtype=torch.float64, device="cpu")
    _check_adamw_step(params, grads, moments, steps, skipped, lr, group_size)
    scalars = map(float, (beta1, beta2, eps, weight_decay))
    _adamw_step(params, grads, *moments.values(), steps, skipped, lr, *scalars, group_size, expand)

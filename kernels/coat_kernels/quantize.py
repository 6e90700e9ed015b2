"""FP8 quantization: codes with one scale per tensor, per token or per group; per tensor, transposed too.

    x [T, H]  ->  x_q [T, H] codes,  x_qt [H, round_up(T, 16)] the same codes transposed,  x_s scales

Scales are float32: [1, 1] per tensor, [T, 1] per token and [T, ceil(H / G)] per group; those of groups can be stored
in BF16 or as E8M0 bytes too (formats.ScaleFormat). The matrix product that uses transposed codes (the weight
gradient) reduces over T: they have one scale, and end in zeros up to a multiple of 16 tokens, because tensor cores
read 16 bytes at a time.

Several tensors can be quantized as one, as if they had been concatenated: the weights of q, k and v along their rows,
the gradients of q, k and v along their columns.

COAT quantizes the operands of matrix products per tensor and the inputs of non-linear layers per 1 x 16 group
(arXiv 2410.19313, section 4); a scale per token is as cheap for the matrix product and needs no second pass over
``x``.
"""

from collections.abc import Sequence

import torch

from ._registry import register
from .formats import (
    FP8_DTYPES,
    SCALE_DTYPES,
    SMALLEST_NORMAL,
    Granularity,
    encode,
    pack_scale,
    round_up,
    scale_from_amax,
    unpack_scale,
)

SOURCE_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def scale_shape(tokens: int, width: int, granularity: str, group_size: int) -> tuple[int, int]:
    """The shape of the scales of values [tokens, width]."""
    if granularity == Granularity.TENSOR:
        return 1, 1
    if granularity == Granularity.TOKEN:
        return tokens, 1
    return tokens, -(-width // group_size)


def _per_value(scale: torch.Tensor, width: int, group_size: int) -> torch.Tensor:
    """Scales [*, S] spread over the values they belong to: [*, width] per group, else as they are (they broadcast)."""
    return scale.repeat_interleave(group_size, dim=1)[:, :width] if group_size else scale


def _transposed(codes: torch.Tensor) -> torch.Tensor:
    """Codes [T, H] as [H, round_up(T, 16)], zero beyond T."""
    tokens, width = codes.shape
    out = torch.zeros(width, round_up(tokens, 16), dtype=torch.uint8, device=codes.device)
    out[:, :tokens] = codes.view(torch.uint8).t()
    return out.view(codes.dtype)


def joint_shape(parts: Sequence[torch.Tensor], dim: int) -> tuple[int, int]:
    """The shape of matrices concatenated along ``dim``."""
    tokens, width = parts[0].shape
    for part in parts[1:]:
        tokens, width = (tokens + part.shape[0], width) if dim == 0 else (tokens, width + part.shape[1])
    return tokens, width


def _check_quantize(
    parts, dtype, granularity, group_size, power_of_two, scale, codes, transposed, scale_dtype, dim, amax
):
    first = parts[0]
    if first.dtype not in SOURCE_DTYPES:
        raise TypeError(f"quantize: x is {first.dtype}, expected one of {', '.join(map(str, SOURCE_DTYPES))}")
    if dtype not in FP8_DTYPES:
        raise TypeError(f"quantize: dtype is {dtype}, expected torch.float8_e4m3fn or torch.float8_e5m2")
    if granularity not in ("tensor", "token", "group"):
        raise ValueError(f"quantize: granularity is {granularity!r}, expected 'tensor', 'token' or 'group'")
    if (granularity == Granularity.GROUP) != (group_size > 0) or (group_size & (group_size - 1)):
        raise ValueError(
            f"quantize: group_size is {group_size} with granularity {granularity!r}; expected a power of two with "
            "'group', 0 otherwise"
        )
    if not (codes or transposed):
        raise ValueError("quantize: codes and transposed are both False, expected one of them at least")
    if transposed and granularity != Granularity.TENSOR:
        raise ValueError(
            f"quantize: transposed is True with granularity {granularity!r}; whoever uses transposed codes sums over "
            "tokens, with one scale for all: expected 'tensor', or transpose(x_q, x_s) of codes per token"
        )
    if dim not in (0, 1):
        raise ValueError(f"quantize: dim is {dim}, expected 0 (rows) or 1 (columns)")
    for part in parts[1:]:
        if part.dtype != first.dtype or part.device != first.device or part.shape[1 - dim] != first.shape[1 - dim]:
            raise ValueError(
                f"quantize: {part.dtype} {list(part.shape)} on {part.device} cannot be joined along dim {dim} with "
                f"{first.dtype} {list(first.shape)} on {first.device}; dtype, device and the other size must be equal"
            )
    if scale_dtype != torch.float32:
        if scale_dtype not in SCALE_DTYPES:
            raise TypeError(
                f"quantize: scale_dtype is {scale_dtype}, expected one of {', '.join(map(str, SCALE_DTYPES))}"
            )
        if granularity != Granularity.GROUP:
            raise ValueError(f"quantize: scale_dtype is {scale_dtype}, expected torch.float32 for {granularity!r}")
        if scale_dtype == torch.uint8 and not power_of_two:
            raise ValueError("quantize: power_of_two is False, but E8M0 scales (torch.uint8) are powers of two")
    if amax is not None:
        if granularity != Granularity.TENSOR or scale is not None:
            raise ValueError(
                f"quantize: amax is what a measured scale of the whole tensor is made from, but granularity is "
                f"{granularity!r} and scale {'None' if scale is None else 'given'}"
            )
        if amax.dtype != torch.float32 or amax.numel() != 1 or amax.device != first.device:
            raise ValueError(
                f"quantize: amax is {amax.dtype} {list(amax.shape)} on {amax.device}, expected one torch.float32 "
                f"number on {first.device} as x"
            )
    if scale is not None:
        shape = joint_shape(parts, dim)
        expected = scale_shape(*shape, granularity, group_size)
        if scale.dtype != scale_dtype or tuple(scale.shape) != expected:
            raise ValueError(
                f"quantize: scale is {scale.dtype} {list(scale.shape)}, expected {scale_dtype} {list(expected)} for "
                f"granularity {granularity!r} and x {list(shape)}"
            )


def quantize_ref(
    x, dtype, granularity, group_size, power_of_two, scale, codes, transposed, scale_dtype=torch.float32, dim=0,
    amax=None,
):  # fmt: skip
    x = (x if isinstance(x, torch.Tensor) else torch.cat(list(x), dim)).float()
    tokens, width = x.shape
    if scale is None:
        magnitude = x.abs()
        if x.numel() == 0:
            amax = x.new_zeros(scale_shape(tokens, width, granularity, group_size))
        elif granularity == Granularity.TENSOR:
            amax = (magnitude.amax() if amax is None else amax.abs()).reshape(1, 1)
        elif granularity == Granularity.TOKEN:
            amax = magnitude.amax(dim=1, keepdim=True)
        else:
            padded = torch.nn.functional.pad(magnitude, (0, -width % group_size))
            amax = padded.view(tokens, -1, group_size).amax(dim=2)
        scale = new_scale = pack_scale(scale_from_amax(amax, dtype, power_of_two), scale_dtype)
    else:
        new_scale = x.new_empty(0, dtype=scale_dtype)
    x_q = encode(x, _per_value(1.0 / unpack_scale(scale), width, group_size), dtype)
    nothing = x.new_empty(0, dtype=dtype)
    return x_q if codes else nothing, _transposed(x_q) if transposed else nothing.clone(), new_scale


def _quantize_fake(
    parts, dtype, granularity, group_size, power_of_two, scale, codes, transposed, scale_dtype, dim, amax=None
):
    tokens, width = joint_shape(parts, dim)
    shape = scale_shape(tokens, width, granularity, group_size)
    x = parts[0]
    return (
        x.new_empty((tokens, width) if codes else 0, dtype=dtype),
        x.new_empty((width, round_up(tokens, 16)) if transposed else 0, dtype=dtype),
        x.new_empty(shape if scale is None else 0, dtype=scale_dtype),
    )


_quantize = register(
    "quantize(Tensor[] x, ScalarType dtype, str granularity, int group_size, bool power_of_two, Tensor? scale, "
    "bool codes, bool transposed, ScalarType scale_dtype, int dim, Tensor? amax=None) -> (Tensor, Tensor, Tensor)",
    quantize_ref,
    _quantize_fake,
    "quantize_triton:quantize",
)


def quantize(
    x: torch.Tensor | Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float8_e4m3fn,
    granularity: Granularity = Granularity.TOKEN,
    *,
    group_size: int = 0,
    power_of_two: bool = True,
    scale: torch.Tensor | None = None,
    codes: bool = True,
    transposed: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    dim: int = 0,
    amax: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Quantize ``x`` to FP8: ``x ≈ x_q * x_s``, ``x_s = amax / largest``, rounded up to a power of two if asked.

    Args:
        x: BF16, FP32 or FP16 values [..., H]; the leading dimensions are flattened to T tokens. Of several tensors,
            their concatenation along ``dim`` is quantized, without copying them together where ``dim`` is 0, or 1 with
            up to four tensors and a measured scale per token.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        granularity: What shares a scale: the tensor, a token, or ``group_size`` neighbours along H.
        group_size: Values per scale with granularity "group", a power of two; 0 otherwise.
        power_of_two: Round each scale up to a power of two.
        scale: Scales to use instead of measured ones, ``scale_dtype``, of the shape that ``granularity`` gives.
        codes: Whether to return the codes.
        transposed: Whether to return the transposed codes, with granularity "tensor"; one of the two at least.
        scale_dtype: How the scales of groups are stored: ``torch.float32``, ``torch.bfloat16`` or ``torch.uint8`` for
            E8M0, which needs ``power_of_two``. The codes belong to the stored scale.
        dim: Along what several tensors are joined: 0 for rows (tokens), 1 for columns (one scale for a token of all).
        amax: With granularity "tensor" the largest magnitude of all values, one float32 number, if somebody knows it:
            that saves the pass over them which finds it, and changes no result. It is not checked; values above it
            would be cut off.

    Returns:
        ``(x_q, x_qt, x_s)``: codes [T, H], transposed codes [H, round_up(T, 16)] with zeros beyond T, and scales,
        float32 [1, 1], [T, 1] or ``scale_dtype`` [T, ceil(H / G)]. What was not asked for is None.

    Raises:
        TypeError, ValueError: For dtypes, shapes, granularities or scales that do not fit; the message names the
            value and what was expected.
    """
    granularity = getattr(granularity, "value", granularity)
    if isinstance(x, torch.Tensor):
        parts = (x.reshape(-1, x.shape[-1]),)
    elif x:
        parts = tuple(part.reshape(-1, part.shape[-1]) for part in x)
    else:
        raise ValueError("quantize: x is an empty sequence, expected a tensor or at least one")
    _check_quantize(
        parts, dtype, granularity, group_size, power_of_two, scale, codes, transposed, scale_dtype, dim, amax
    )
    x_q, x_qt, x_s = _quantize(
        parts, dtype, granularity, group_size, power_of_two, scale, codes, transposed, scale_dtype, dim, amax
    )
    return x_q if codes else None, x_qt if transposed else None, x_s if scale is None else scale


def quantize_each_ref(x):
    made = [quantize_ref(part, torch.float8_e4m3fn, "token", 0, True, None, True, False) for part in x]
    codes = torch.cat([q.view(torch.uint8).flatten() for q, _, _ in made]).view(torch.float8_e4m3fn)
    return codes, torch.cat([s.flatten() for _, _, s in made])


_quantize_each = register(
    "quantize_each(Tensor[] x) -> (Tensor, Tensor)",
    quantize_each_ref,
    lambda x: (
        x[0].new_empty(sum(part.numel() for part in x), dtype=torch.float8_e4m3fn),
        x[0].new_empty(sum(part.shape[0] for part in x), dtype=torch.float32),
    ),
    "quantize_triton:quantize_each",
)


def quantize_each(x: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Many matrices at once, each quantized by itself to E4M3 with a power-of-two scale per token, in one launch.

    Args:
        x: Matrices [T_i, H_i] of one dtype, BF16, FP32 or FP16, on one device.

    Returns:
        ``(x_q [T_i, H_i], x_s [T_i, 1])`` of each, as :func:`quantize` gives them. They are pieces of two tensors.

    Raises:
        TypeError, ValueError: For dtypes or shapes that do not fit; the message names the value and what was expected.
    """
    x = list(x)
    if not x:
        raise ValueError("quantize_each: x is an empty sequence, expected at least one matrix")
    first = x[0]
    if first.dtype not in SOURCE_DTYPES:
        raise TypeError(f"quantize_each: x is {first.dtype}, expected one of {', '.join(map(str, SOURCE_DTYPES))}")
    for part in x:
        if part.dim() != 2 or part.dtype != first.dtype or part.device != first.device:
            raise ValueError(
                f"quantize_each: {part.dtype} {list(part.shape)} on {part.device}, expected matrices of the first "
                f"one's dtype and device, {first.dtype} on {first.device}"
            )
    codes, scales = _quantize_each(x)
    codes, scales = codes.split([part.numel() for part in x]), scales.split([part.shape[0] for part in x])
    return [(q.view(part.shape), s.view(-1, 1)) for part, q, s in zip(x, codes, scales, strict=True)]


def dequantize_ref(x_q, x_s, group_size, dtype):
    return (x_q.float() * _per_value(unpack_scale(x_s), x_q.shape[1], group_size)).to(dtype)


_dequantize = register(
    "dequantize(Tensor x_q, Tensor x_s, int group_size, ScalarType dtype) -> Tensor",
    dequantize_ref,
    lambda x_q, x_s, group_size, dtype: x_q.new_empty(x_q.shape, dtype=dtype),
    "quantize_triton:dequantize",
)


def _check_codes(name, x_q, x_s, group_size):
    if x_q.dtype not in FP8_DTYPES or x_q.dim() != 2:
        raise TypeError(f"{name}: x_q is {x_q.dtype} {list(x_q.shape)}, expected FP8 codes [T, H]")
    tokens, width = x_q.shape
    shapes = [(tokens, -(-width // group_size))] if group_size else [(1, 1), (tokens, 1)]
    dtypes = SCALE_DTYPES if group_size else (torch.float32,)
    if x_s is not None and (x_s.dtype not in dtypes or tuple(x_s.shape) not in shapes):
        raise ValueError(
            f"{name}: x_s is {x_s.dtype} {list(x_s.shape)}, expected {' or '.join(map(str, dtypes))} of shape "
            f"{' or '.join(str(list(s)) for s in shapes)} for codes {list(x_q.shape)} and group_size {group_size}"
        )


def dequantize(
    x_q: torch.Tensor, x_s: torch.Tensor, *, group_size: int = 0, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Values [T, H] in ``dtype`` of codes [T, H] and their scales: ``x_q * x_s``.

    Args:
        x_q: FP8 codes [T, H].
        x_s: Float32 scales [1, 1] or [T, 1]; with ``group_size`` G [T, ceil(H / G)], float32, BF16 or E8M0 (uint8).
        group_size: Values per scale along H; 0 for scales per tensor or per token.
        dtype: ``torch.bfloat16``, ``torch.float32`` or ``torch.float16``.
    """
    _check_codes("dequantize", x_q, x_s, group_size)
    if dtype not in SOURCE_DTYPES:
        raise TypeError(f"dequantize: dtype is {dtype}, expected one of {', '.join(map(str, SOURCE_DTYPES))}")
    return _dequantize(x_q, x_s, group_size, dtype)


def transpose_ref(x_q, x_s):
    if not isinstance(x_q, torch.Tensor):
        x_q = torch.cat([part.view(torch.uint8) for part in x_q]).view(x_q[0].dtype)  # autocast knows no FP8
    if x_s is None:
        return _transposed(x_q), x_q.new_empty(0, dtype=torch.float32)
    scale = x_s.amax(dim=(0, 1), keepdim=True)
    # no ratio of scales is above 1, so no code leaves its range
    return _transposed((x_q.float() * (x_s / scale.clamp(min=SMALLEST_NORMAL))).to(x_q.dtype)), scale


_transpose = register(
    "transpose(Tensor[] x_q, Tensor? x_s) -> (Tensor, Tensor)",
    transpose_ref,
    lambda x_q, x_s: (
        x_q[0].new_empty((x_q[0].shape[1], round_up(joint_shape(x_q, 0)[0], 16))),
        x_q[0].new_empty(0 if x_s is None else (1, 1), dtype=torch.float32),
    ),
    "quantize_triton:transpose",
)


def _check_transpose(parts, x_s):
    first = parts[0]
    for part in parts:
        _check_codes("transpose", part, None, 0)
        if part.dtype != first.dtype or part.device != first.device or part.shape[1] != first.shape[1]:
            raise ValueError(
                f"transpose: {part.dtype} {list(part.shape)} on {part.device} cannot stand below {first.dtype} "
                f"{list(first.shape)} on {first.device}; dtype, device and width must be equal"
            )
    tokens = joint_shape(parts, 0)[0]
    if x_s is not None and (x_s.dtype != torch.float32 or tuple(x_s.shape) != (tokens, 1)):
        raise ValueError(
            f"transpose: x_s is {x_s.dtype} {list(x_s.shape)}, expected torch.float32 [{tokens}, 1], a scale for each "
            "row of codes"
        )


def transpose(
    x_q: torch.Tensor | Sequence[torch.Tensor], x_s: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Transpose codes [T, H]; with a scale per token, move them to one scale on the way, the largest of the scales.

    Where the scales are powers of two nothing is rounded again, except what falls below the format's smallest normal
    number under the common scale: a token 2**15 (E4M3) smaller than the largest one begins to lose bits, as it would
    have lost them under a scale per tensor.

    Args:
        x_q: FP8 codes [T, H]; or several of one width, which are transposed as if they stood below each other.
        x_s: Scales [T, 1] of all rows, powers of two, or None to leave the codes as they are.

    Returns:
        Codes [H, round_up(T, 16)] with zeros beyond T, and their scale [1, 1], or None without ``x_s``.

    Raises:
        TypeError, ValueError: For dtypes, shapes or scales that do not fit; the message names the value.
    """
    parts = (x_q,) if isinstance(x_q, torch.Tensor) else tuple(x_q)
    if not parts:
        raise ValueError("transpose: x_q is an empty sequence, expected FP8 codes [T, H] or several of them")
    _check_transpose(parts, x_s)
    if x_s is not None and x_s.shape[0] == 0:
        return parts[0].new_empty(parts[0].shape[1], 0), x_s.new_ones(1, 1)
    x_qt, scale = _transpose(parts, x_s)
    return x_qt, None if x_s is None else scale

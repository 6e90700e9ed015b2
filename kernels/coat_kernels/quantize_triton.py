"""Triton twins of quantize.py: each reads its input from memory once."""

import functools

import torch
import triton
import triton.language as tl

from .formats import MAX_EXPONENT, round_up
from .quantize import scale_shape
from .tiles_triton import magnitude_bits, scale_from_bits, to_float, to_fp8, to_fp8_bits


@triton.jit
def _amax_kernel(x_ptr, amax_ptr, tokens, width, stride, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """Bits of the largest magnitude of x [T, H] into amax [1]. One program a tile; an integer maximum has no order."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    x = tl.load(x_ptr + t * stride + h, mask=(t < tokens) & (h < width), other=0.0).to(tl.float32)
    tl.atomic_max(amax_ptr, tl.max(magnitude_bits(x)), sem="relaxed")


@triton.jit
def _store_transposed(bits, qt_ptr, t, h, width, stride):
    """Write a tile of codes, as uint8, to [H, stride]: zeros behind the last token, as masked values are zero."""
    address = h[:, None].to(tl.int64) * stride + t[None, :]
    tl.store(qt_ptr + address, tl.trans(bits), mask=(h[:, None] < width) & (t[None, :] < stride))


@triton.jit
def _quantize_tiles_kernel(
    x_ptr, s_ptr, q_ptr, qt_ptr, tokens, width, stride, stride_qt,
    GRANULARITY: tl.constexpr, GROUP: tl.constexpr, GIVEN: tl.constexpr, EMAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, CODES: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Codes of one tile [BLOCK_T, BLOCK_H]. Scales are read (GIVEN; always so per tensor), or found per group here."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    x = tl.load(
        x_ptr + t[:, None] * stride + h[None, :], mask=(t[:, None] < tokens) & (h[None, :] < width), other=0.0
    ).to(tl.float32)
    if GRANULARITY == "group":
        GROUPS: tl.constexpr = BLOCK_H // GROUP
        x = tl.reshape(x, [BLOCK_T, GROUPS, GROUP])
        g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        groups = tl.cdiv(width, GROUP)
        where = t[:, None] * groups + g[None, :]
        inside = (t[:, None] < tokens) & (g[None, :] < groups)
        if GIVEN:
            s = tl.load(s_ptr + where, mask=inside, other=1.0)
        else:
            s = scale_from_bits(tl.max(magnitude_bits(x), axis=2), EMAX, POWER_OF_TWO)
            tl.store(s_ptr + where, s, mask=inside)
        x = tl.reshape(x * tl.div_rn(1.0, s)[:, :, None], [BLOCK_T, BLOCK_H])
    elif GRANULARITY == "token":  # given
        x *= tl.div_rn(1.0, tl.load(s_ptr + t, mask=t < tokens, other=1.0))[:, None]
    else:
        x *= tl.div_rn(1.0, tl.load(s_ptr))
    bits = to_fp8_bits(x, EMAX) if TRANSPOSED else to_fp8(x, EMAX).to(tl.uint8, bitcast=True)
    if CODES:
        address = t[:, None] * width + h[None, :]
        tl.store(q_ptr + address, bits, mask=(t[:, None] < tokens) & (h[None, :] < width))
    if TRANSPOSED:
        _store_transposed(bits, qt_ptr, t, h, width, stride_qt)


@triton.jit
def _quantize_tokens_kernel(
    x_ptr, s_ptr, q_ptr, tokens, width, stride,
    EMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Scales and codes of BLOCK_T whole tokens. A row wider than a block is read twice, the second time from cache."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)[None, :]
    row, q_row = x_ptr + t[:, None] * stride, q_ptr + t[:, None] * width
    here = t[:, None] < tokens
    if ONE_BLOCK:
        x = tl.load(row + h, mask=here & (h < width), other=0.0).to(tl.float32)
        amax = tl.max(magnitude_bits(x), axis=1)
    else:
        amax = tl.zeros([BLOCK_T], tl.int32)
        for h0 in tl.range(0, width, BLOCK_H):
            x = tl.load(row + h0 + h, mask=here & (h0 + h < width), other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(magnitude_bits(x), axis=1))
    s = scale_from_bits(amax, EMAX, POWER_OF_TWO)
    tl.store(s_ptr + t, s, mask=t < tokens)
    inverse = tl.div_rn(1.0, s)[:, None]
    if ONE_BLOCK:
        tl.store(q_row + h, to_fp8(x * inverse, EMAX), mask=here & (h < width))
    else:
        for h0 in tl.range(0, width, BLOCK_H):
            x = tl.load(row + h0 + h, mask=here & (h0 + h < width), other=0.0).to(tl.float32)
            tl.store(q_row + h0 + h, to_fp8(x * inverse, EMAX), mask=here & (h0 + h < width))


@triton.jit
def _dequantize_kernel(
    q_ptr, s_ptr, y_ptr, tokens, width, stride_s,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Values of one tile [BLOCK_T, BLOCK_H]. stride_s is 0 for one scale, else the number of scales in a row."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (t[:, None] < tokens) & (h[None, :] < width)
    address = t[:, None] * width + h[None, :]
    x = tl.load(q_ptr + address, mask=inside, other=0.0).to(tl.float32)
    if GROUP > 0:
        GROUPS: tl.constexpr = BLOCK_H // GROUP
        g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        s = tl.load(
            s_ptr + t[:, None] * stride_s + g[None, :], mask=(t[:, None] < tokens) & (g[None, :] < stride_s), other=0.0
        )
        y = tl.reshape(tl.reshape(x, [BLOCK_T, GROUPS, GROUP]) * s[:, :, None], [BLOCK_T, BLOCK_H])
    else:
        y = x * tl.load(s_ptr + t * stride_s, mask=t < tokens, other=0.0)[:, None]
    tl.store(y_ptr + address, to_float(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _transpose_kernel(
    q_ptr, s_ptr, top_ptr, qt_ptr, tokens, width, stride_qt,
    MOVE: tl.constexpr, EMAX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of codes, written transposed; with MOVE their scales [T] are replaced by the one at top_ptr."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    address = t[:, None] * width + h[None, :]
    bits = tl.load(q_ptr + address, mask=(t[:, None] < tokens) & (h[None, :] < width), other=0)
    if MOVE:
        top = tl.maximum(tl.load(top_ptr), 2.0**-126)  # products of scales may have underflowed
        ratio = tl.div_rn(tl.load(s_ptr + t, mask=t < tokens, other=0.0), top)
        q = bits.to(tl.float8e4nv if EMAX == 8 else tl.float8e5, bitcast=True).to(tl.float32)
        bits = to_fp8_bits(q * ratio[:, None], EMAX)
    _store_transposed(bits, qt_ptr, t, h, width, stride_qt)


def _tile(width: int, group_size: int, codes: bool, transposed: bool) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile, the fastest of a sweep on an H200, by which layouts it is written in."""
    if transposed:
        block_t, block_h = 64, max(128 if codes else 64, group_size)
        return block_t, block_h, block_t * block_h // 2048
    block_h = max(group_size, min(2048, triton.next_power_of_2(width)))
    return max(1, 4096 // block_h), block_h, 4


@functools.cache
def nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What stands for a result that was not asked for."""
    return torch.empty(0, dtype=dtype, device=device)


def quantize(x, dtype, granularity, group_size, power_of_two, scale, codes, transposed):
    tokens, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    emax, given = MAX_EXPONENT[dtype], scale is not None
    # Where a second kernel that transposes codes, a byte a value, is faster: a tile of whole tokens is too flat to be
    # written transposed, and two results per tensor are faster with the conversion instruction (see to_fp8_bits).
    after = transposed and {"token": not given, "tensor": codes, "group": False}[granularity]
    at_once = transposed and not after
    keep = codes or after
    x_q = torch.empty((tokens, width), dtype=dtype, device=x.device) if keep else nothing(dtype, x.device)
    x_qt = nothing(dtype, x.device)
    if at_once:
        x_qt = torch.empty((width, round_up(tokens, 16)), dtype=dtype, device=x.device)
    if given:
        x_s, new_s = scale.contiguous(), nothing(torch.float32, x.device)
    else:
        shape = scale_shape(tokens, width, granularity, group_size)
        x_s = new_s = torch.empty(shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        new_s.fill_(torch.finfo(torch.float32).smallest_normal)  # which is empty where scales are given
    elif granularity == "token" and not given:
        block_h = min(triton.next_power_of_2(width), 16384)
        block_t = max(1, 4096 // block_h)
        _quantize_tokens_kernel[(triton.cdiv(tokens, block_t),)](
            x, x_s, x_q, tokens, width, x.stride(0),
            EMAX=emax, POWER_OF_TWO=power_of_two, ONE_BLOCK=width <= block_h, BLOCK_T=block_t, BLOCK_H=block_h,
        )  # fmt: skip
    else:
        if granularity == "tensor" and not given:
            amax = torch.zeros(1, dtype=torch.int32, device=x.device)
            block_t, block_h = 8, 1024
            _amax_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(width, block_h))](
                x, amax, tokens, width, x.stride(0), BLOCK_T=block_t, BLOCK_H=block_h, num_warps=8
            )
            _scale_kernel[(1,)](amax, x_s, EMAX=emax, POWER_OF_TWO=power_of_two)
        block_t, block_h, warps = _tile(width, group_size, keep, at_once)
        _quantize_tiles_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(width, block_h))](
            x, x_s, x_q.view(torch.uint8), x_qt.view(torch.uint8), tokens, width, x.stride(0), x_qt.shape[-1],
            GRANULARITY=granularity, GROUP=group_size, GIVEN=given, EMAX=emax, POWER_OF_TWO=power_of_two,
            CODES=keep, TRANSPOSED=at_once, BLOCK_T=block_t, BLOCK_H=block_h, num_warps=warps,
        )  # fmt: skip
    if after:
        x_qt = _transpose_codes(x_q)
    return x_q if codes else nothing(dtype, x.device), x_qt, new_s


@triton.jit
def _scale_kernel(amax_ptr, s_ptr, EMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scale of one amax, given by its bits. One program."""
    tl.store(s_ptr, scale_from_bits(tl.load(amax_ptr), EMAX, POWER_OF_TWO))


def dequantize(x_q, x_s, group_size, dtype):
    tokens, width = x_q.shape
    y = torch.empty(tokens, width, dtype=dtype, device=x_q.device)
    if y.numel() == 0:
        return y
    block_t, block_h, _ = _tile(width, group_size, True, False)
    _dequantize_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(width, block_h))](
        x_q.contiguous(), x_s.contiguous(), y, tokens, width, x_s.shape[1] if group_size or x_s.shape[0] > 1 else 0,
        GROUP=group_size, BLOCK_T=block_t, BLOCK_H=block_h,
    )  # fmt: skip
    return y


def _transpose_codes(x_q, x_s=None, top=None):
    """Codes [T, H] as [H, round_up(T, 16)]; with scales [T, 1], moved to the scale ``top`` on the way."""
    tokens, width = x_q.shape
    padded = round_up(tokens, 16)
    x_qt = torch.empty(width, padded, dtype=x_q.dtype, device=x_q.device)
    if x_qt.numel():
        block_t, block_h = (64, 128) if x_s is None else (128, 64)
        _transpose_kernel[(triton.cdiv(padded, block_t), triton.cdiv(width, block_h))](
            x_q.view(torch.uint8), x_s, top, x_qt.view(torch.uint8), tokens, width, padded,
            MOVE=x_s is not None, EMAX=MAX_EXPONENT[x_q.dtype], BLOCK_T=block_t, BLOCK_H=block_h,
        )  # fmt: skip
    return x_qt


def transpose(x_q, x_s):
    if x_s is None:
        return _transpose_codes(x_q.contiguous()), nothing(torch.float32, x_q.device)
    top = x_s.amax(dim=(0, 1), keepdim=True)
    return _transpose_codes(x_q.contiguous(), x_s.contiguous(), top), top

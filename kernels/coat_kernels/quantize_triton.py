"""Triton twins of quantize.py: each reads its input from memory once.

The number of tokens changes from batch to batch; kernels that read it only for masks are not specialised on it.
"""

import functools

import torch
import triton
import triton.language as tl

from .formats import MAX_EXPONENT, round_up
from .quantize import joint_shape, scale_shape
from .tables_triton import TRITON_DTYPES, find_row, on_device
from .tiles_triton import (
    INTERPRETED,
    magnitude_bits,
    pack_scale,
    scale_from_bits,
    scale_groups,
    to_float,
    to_fp8,
    to_fp8_bits,
    unpack_scale,
)

ROWS = ["rows0", "rows1", "rows2", "rows3"]
TOGETHER = len(ROWS)  # matrices of a launch that are its arguments; quantize_each has a table, which is copied first


@triton.jit
def _next_part(pid, x, rows, begin, first, next_x, next_rows, BLOCK_T: tl.constexpr):
    behind = pid >= first + tl.cdiv(rows, BLOCK_T)
    begin = tl.where(behind, begin + rows, begin)
    first = tl.where(behind, first + tl.cdiv(rows, BLOCK_T), first)
    return tl.where(behind, next_x, x), tl.where(behind, next_rows, rows), begin, first


@triton.jit
def _part_of(
    pid, x0_ptr, x1_ptr, x2_ptr, x3_ptr, rows0, rows1, rows2, rows3, PARTS: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The matrix of program ``pid``, where up to four of one width stand below each other and each has its programs
    for BLOCK_T rows: its address, its rows, the first of them in the whole, and the program's own rows t."""
    x_ptr, rows, begin, first = x0_ptr, rows0, 0, 0
    if PARTS > 1:
        x_ptr, rows, begin, first = _next_part(pid, x_ptr, rows, begin, first, x1_ptr, rows1, BLOCK_T)
    if PARTS > 2:
        x_ptr, rows, begin, first = _next_part(pid, x_ptr, rows, begin, first, x2_ptr, rows2, BLOCK_T)
    if PARTS > 3:
        x_ptr, rows, begin, first = _next_part(pid, x_ptr, rows, begin, first, x3_ptr, rows3, BLOCK_T)
    if PARTS > 1:
        begin = begin.to(tl.int64)
    return x_ptr, rows, begin, (pid - first).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)


@triton.jit(do_not_specialize=ROWS)
def _amax_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, rows0, rows1, rows2, rows3, amax_ptr, width, stride,
    PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Bits of the largest magnitude of x [T, H] into amax [1]. One program a tile; an integer maximum has no order."""
    x_ptr, rows, _, t = _part_of(
        tl.program_id(0), x0_ptr, x1_ptr, x2_ptr, x3_ptr, rows0, rows1, rows2, rows3, PARTS, BLOCK_T
    )
    t = t[:, None]
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    x = tl.load(x_ptr + t * stride + h, mask=(t < rows) & (h < width), other=0.0).to(tl.float32)
    tl.atomic_max(amax_ptr, tl.max(magnitude_bits(x)), sem="relaxed")


@triton.jit
def _store_transposed(bits, qt_ptr, t, begin, h, width, rows, stride, ALIGNMENT: tl.constexpr):
    """Write a tile of codes, as uint8, to [H, stride] from column ``begin`` on: zeros behind the last token, as masked
    values are zero. ALIGNMENT divides ``begin`` and ``rows``, so that the compiler may store as much at once."""
    begin, rows = begin // ALIGNMENT * ALIGNMENT, rows // ALIGNMENT * ALIGNMENT
    address = h[:, None].to(tl.int64) * stride + (begin + t)[None, :]
    tl.store(qt_ptr + address, tl.trans(bits), mask=(h[:, None] < width) & (t[None, :] < rows))


@triton.jit(do_not_specialize=[*ROWS, "tokens"])
def _quantize_tiles_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, rows0, rows1, rows2, rows3, amax_ptr, s_ptr, q_ptr, qt_ptr,
    tokens, width, stride, stride_qt, PARTS: tl.constexpr,
    GRANULARITY: tl.constexpr, GROUP: tl.constexpr, GIVEN: tl.constexpr, EMAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, CODES: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, ALIGNMENT: tl.constexpr = 1,
):  # fmt: skip
    """Codes of one tile [BLOCK_T, BLOCK_H]. Scales are read (GIVEN), or found here: per group, or, in every program
    anew, from the bits of the amax of the tensor. Where codes are written transposed, the last matrix has more rows
    than there are ``tokens``: the columns of zeros behind them."""
    x_ptr, rows, begin, t = _part_of(
        tl.program_id(0), x0_ptr, x1_ptr, x2_ptr, x3_ptr, rows0, rows1, rows2, rows3, PARTS, BLOCK_T
    )
    token = begin + t
    here = (t < rows) & (token < tokens)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = here[:, None] & (h[None, :] < width)
    x = tl.load(x_ptr + t[:, None] * stride + h[None, :], mask=inside, other=0.0).to(tl.float32)
    if GRANULARITY == "group":
        GROUPS: tl.constexpr = BLOCK_H // GROUP
        x = tl.reshape(x, [BLOCK_T, GROUPS, GROUP])
        g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        groups = tl.cdiv(width, GROUP)
        where = token[:, None] * groups + g[None, :]
        known = here[:, None] & (g[None, :] < groups)
        if GIVEN:
            stored = tl.load(s_ptr + where, mask=known, other=1.0)
        else:
            s = scale_from_bits(tl.max(magnitude_bits(x), axis=2), EMAX, POWER_OF_TWO)
            stored = pack_scale(s, s_ptr.dtype.element_ty)
            tl.store(s_ptr + where, stored, mask=known)
        x = tl.reshape(x * tl.div_rn(1.0, unpack_scale(stored))[:, :, None], [BLOCK_T, BLOCK_H])
    elif GRANULARITY == "token":  # given
        x *= tl.div_rn(1.0, tl.load(s_ptr + token, mask=here, other=1.0))[:, None]
    else:
        if GIVEN:
            s = tl.load(s_ptr)
        else:  # the sign of an amax, which a NaN may have, does not count
            s = scale_from_bits(tl.load(amax_ptr) & 0x7FFFFFFF, EMAX, POWER_OF_TWO)
            tl.store(s_ptr, s, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
        x *= tl.div_rn(1.0, s)
    bits = to_fp8_bits(x, EMAX) if TRANSPOSED else to_fp8(x, EMAX).to(tl.uint8, bitcast=True)
    if CODES:
        tl.store(q_ptr + token[:, None] * width + h[None, :], bits, mask=inside)
    if TRANSPOSED:
        _store_transposed(bits, qt_ptr, t, begin, h, width, rows, stride_qt, ALIGNMENT)


@triton.jit(do_not_specialize=ROWS)
def _quantize_tokens_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, rows0, rows1, rows2, rows3, s_ptr, q_ptr, width, stride,
    PARTS: tl.constexpr, EMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Scales and codes of BLOCK_T whole tokens. A row wider than a block is read twice, the second time from cache."""
    x_ptr, rows, begin, t = _part_of(
        tl.program_id(0), x0_ptr, x1_ptr, x2_ptr, x3_ptr, rows0, rows1, rows2, rows3, PARTS, BLOCK_T
    )
    h = tl.arange(0, BLOCK_H)[None, :]
    row, q_row = x_ptr + t[:, None] * stride, q_ptr + (begin + t)[:, None] * width
    here = t[:, None] < rows
    if ONE_BLOCK:
        x = tl.load(row + h, mask=here & (h < width), other=0.0).to(tl.float32)
        amax = tl.max(magnitude_bits(x), axis=1)
    else:
        amax = tl.zeros([BLOCK_T], tl.int32)
        for h0 in tl.range(0, width, BLOCK_H):
            x = tl.load(row + h0 + h, mask=here & (h0 + h < width), other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(magnitude_bits(x), axis=1))
    s = scale_from_bits(amax, EMAX, POWER_OF_TWO)
    tl.store(s_ptr + begin + t, s, mask=t < rows)
    inverse = tl.div_rn(1.0, s)[:, None]
    if ONE_BLOCK:
        tl.store(q_row + h, to_fp8(x * inverse, EMAX), mask=here & (h < width))
    else:
        for h0 in tl.range(0, width, BLOCK_H):
            x = tl.load(row + h0 + h, mask=here & (h0 + h < width), other=0.0).to(tl.float32)
            tl.store(q_row + h0 + h, to_fp8(x * inverse, EMAX), mask=here & (h0 + h < width))


@triton.jit
def _load_rows(x_ptr, t, h0, tokens, width, stride, BLOCK_H: tl.constexpr):
    """Values [T, BLOCK_H] of rows t from column h0 on as float32, zero outside the matrix."""
    h = h0 + tl.arange(0, BLOCK_H)[None, :]
    return tl.load(x_ptr + t[:, None] * stride + h, mask=(t[:, None] < tokens) & (h < width), other=0.0).to(tl.float32)


@triton.jit
def _amax_part(x, x_ptr, t, tokens, width, stride, BLOCK_H: tl.constexpr):
    """Bits of the largest magnitude in a part's rows t: of the first block from ``x``, behind it from memory."""
    amax = tl.max(magnitude_bits(x), axis=1)
    for h0 in tl.range(BLOCK_H, width, BLOCK_H):
        more = _load_rows(x_ptr, t, h0, tokens, width, stride, BLOCK_H)
        amax = tl.maximum(amax, tl.max(magnitude_bits(more), axis=1))
    return amax


@triton.jit
def _store_part(x, inverse, x_ptr, q_row, t, tokens, width, stride, EMAX: tl.constexpr, BLOCK_H: tl.constexpr):
    """Codes of a part's rows t: of the first block from ``x``, behind it from memory."""
    h = tl.arange(0, BLOCK_H)[None, :]
    here = t[:, None] < tokens
    tl.store(q_row + h, to_fp8(x * inverse, EMAX), mask=here & (h < width))
    for h0 in tl.range(BLOCK_H, width, BLOCK_H):
        more = _load_rows(x_ptr, t, h0, tokens, width, stride, BLOCK_H)
        tl.store(q_row + h0 + h, to_fp8(more * inverse, EMAX), mask=here & (h0 + h < width))


@triton.jit(do_not_specialize=["tokens"])
def _quantize_parts_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, s_ptr, q_ptr, tokens,
    width0, width1, width2, width3, stride0, stride1, stride2, stride3,
    EMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_3: tl.constexpr,
):  # fmt: skip
    """Joint scales and codes, side by side, of BLOCK_T whole tokens of two to four matrices. Grid: tokens / BLOCK_T.
    Parts that are not there have width 0."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    # All loads stand before the first reduction: it waits for every thread, and they would wait with it.
    x0 = _load_rows(x0_ptr, t, 0, tokens, width0, stride0, BLOCK_0)
    x1 = _load_rows(x1_ptr, t, 0, tokens, width1, stride1, BLOCK_1)
    if PARTS > 2:
        x2 = _load_rows(x2_ptr, t, 0, tokens, width2, stride2, BLOCK_2)
    if PARTS > 3:
        x3 = _load_rows(x3_ptr, t, 0, tokens, width3, stride3, BLOCK_3)
    amax = _amax_part(x0, x0_ptr, t, tokens, width0, stride0, BLOCK_0)
    amax = tl.maximum(amax, _amax_part(x1, x1_ptr, t, tokens, width1, stride1, BLOCK_1))
    if PARTS > 2:
        amax = tl.maximum(amax, _amax_part(x2, x2_ptr, t, tokens, width2, stride2, BLOCK_2))
    if PARTS > 3:
        amax = tl.maximum(amax, _amax_part(x3, x3_ptr, t, tokens, width3, stride3, BLOCK_3))
    s = scale_from_bits(amax, EMAX, POWER_OF_TWO)
    tl.store(s_ptr + t, s, mask=t < tokens)
    inverse = tl.div_rn(1.0, s)[:, None]
    q_row = q_ptr + t[:, None] * (width0 + width1 + width2 + width3)
    _store_part(x0, inverse, x0_ptr, q_row, t, tokens, width0, stride0, EMAX, BLOCK_0)
    q_row += width0
    _store_part(x1, inverse, x1_ptr, q_row, t, tokens, width1, stride1, EMAX, BLOCK_1)
    if PARTS > 2:
        q_row += width1
        _store_part(x2, inverse, x2_ptr, q_row, t, tokens, width2, stride2, EMAX, BLOCK_2)
    if PARTS > 3:
        q_row += width2
        _store_part(x3, inverse, x3_ptr, q_row, t, tokens, width3, stride3, EMAX, BLOCK_3)


# The columns of the table of _quantize_each_kernel, int64: the address of the values, tokens, width, where codes and
# scales begin in what is written, the first program.
EACH = tl.constexpr(6)


@triton.jit(do_not_specialize=["matrices"])
def _quantize_each_kernel(
    table, matrices, s_ptr, q_ptr,
    VALUES: tl.constexpr, EMAX: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Scales and codes of BLOCK_T whole tokens of one of many matrices."""
    pid = tl.program_id(0)
    row = table + find_row(table, matrices, pid, EACH) * EACH
    x_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(VALUES)), ALIGNMENT)
    tokens = tl.load(row + 1)
    width = tl.multiple_of(tl.load(row + 2).to(tl.int32), ALIGNMENT)
    q_ptr += tl.multiple_of(tl.load(row + 3), ALIGNMENT)
    t = (pid - tl.load(row + 5)) * BLOCK_T + tl.arange(0, BLOCK_T)
    x = _load_rows(x_ptr, t, 0, tokens, width, width, BLOCK_H)
    amax = _amax_part(x, x_ptr, t, tokens, width, width, BLOCK_H)
    s = scale_from_bits(amax, EMAX, True)
    tl.store(s_ptr + tl.load(row + 4) + t, s, mask=t < tokens)
    inverse = tl.div_rn(1.0, s)[:, None]
    _store_part(x, inverse, x_ptr, q_ptr + t[:, None] * width, t, tokens, width, width, EMAX, BLOCK_H)


@triton.jit(do_not_specialize=["tokens"])
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
            s_ptr + t[:, None] * stride_s + g[None, :], mask=(t[:, None] < tokens) & (g[None, :] < stride_s), other=0
        )
        y = scale_groups(x, s, GROUP)
    else:
        y = x * tl.load(s_ptr + t * stride_s, mask=t < tokens, other=0.0)[:, None]
    tl.store(y_ptr + address, to_float(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*ROWS, "tokens"])
def _transpose_kernel(
    q0_ptr, q1_ptr, q2_ptr, q3_ptr, rows0, rows1, rows2, rows3, s_ptr, top_ptr, qt_ptr, tokens, width, stride_qt,
    PARTS: tl.constexpr, ALIGNMENT: tl.constexpr, MOVE: tl.constexpr, EMAX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of codes, written transposed; with MOVE their scales [T] are replaced by the one at top_ptr. The last
    matrix has more rows than there are ``tokens``: the columns of zeros behind them."""
    q_ptr, rows, begin, t = _part_of(
        tl.program_id(0), q0_ptr, q1_ptr, q2_ptr, q3_ptr, rows0, rows1, rows2, rows3, PARTS, BLOCK_T
    )
    here = (t < rows) & (begin + t < tokens)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    bits = tl.load(q_ptr + t[:, None] * width + h[None, :], mask=here[:, None] & (h[None, :] < width), other=0)
    if MOVE:
        # products of scales may have underflowed; a NaN scale makes all codes NaN
        top = tl.maximum(tl.load(top_ptr), 2.0**-126, propagate_nan=tl.PropagateNan.ALL)
        ratio = tl.div_rn(tl.load(s_ptr + begin + t, mask=here, other=0.0), top)  # exact, for a power of two
        q = bits.to(tl.float8e4nv if EMAX == 8 else tl.float8e5, bitcast=True).to(tl.float32)
        if INTERPRETED:  # which decodes NaN codes to numbers
            q = tl.where((bits & 0x7F) > (0x7E if EMAX == 8 else 0x7C), float("nan"), q)
        q *= ratio[:, None]
        bits = to_fp8_bits(q, EMAX)
        if INTERPRETED:
            bits = tl.where(q == q, bits, 0x7F)
    _store_transposed(bits, qt_ptr, t, begin, h, width, rows, stride_qt, ALIGNMENT)


def ceil_div(n: int, block: int) -> int:
    """As ``triton.cdiv``, which costs a launcher 3 us of host time."""
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    """As ``triton.next_power_of_2``, likewise."""
    return 1 << (n - 1).bit_length()


def _tile(width: int, group_size: int, codes: bool, transposed: bool) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile, the fastest of a sweep on an H200, by which layouts it is written in."""
    if transposed:
        block_t, block_h = 64, 128 if codes else 64
        return block_t, block_h, block_t * block_h // 2048
    block_h = max(group_size, min(2048, next_power_of_2(width)))
    return max(1, 4096 // block_h), block_h, 4


@functools.cache
def nothing(dtype: torch.dtype, device: torch.device, place: int = 0) -> torch.Tensor:
    """What stands for a result that was not asked for; results of one op in different places are different tensors."""
    return torch.empty(0, dtype=dtype, device=device)


def _together(x: list[torch.Tensor], block_t: int, columns: int | None = None):
    """Matrices below each other, as many at a time as a launch takes: its first row, its programs for ``block_t`` rows
    each, and what its kernel is told, by place and by name. With ``columns`` the last one has all rows up to there."""
    begin = 0
    for i in range(0, len(x), TOGETHER):
        parts = x[i : i + TOGETHER]
        rows = [part.shape[0] for part in parts]
        if columns is not None and i + TOGETHER >= len(x):
            rows[-1] = columns - begin - sum(rows[:-1])
        none, names = TOGETHER - len(parts), {"PARTS": len(parts), "BLOCK_T": block_t}
        if columns is not None:
            names["ALIGNMENT"] = 1 if any(n % 16 for n in rows) else 16
        programs = sum(ceil_div(n, block_t) for n in rows)
        yield begin, programs, (*parts, *[None] * none, *rows, *[0] * none), names
        begin += sum(rows)


def quantize(x, dtype, granularity, group_size, power_of_two, scale, codes, transposed, scale_dtype, dim, amax=None):
    tokens, width = joint_shape(x, dim)
    emax, given, device = MAX_EXPONENT[dtype], scale is not None, x[0].device
    if len(x) > 1:
        x = [part for part in x if part.numel()] or x[:1]
    side_by_side = dim == 1 and len(x) > 1
    if side_by_side and (granularity != "token" or given or len(x) > 4):
        x, side_by_side = [torch.cat(x, 1)], False
    alone = len(x) == 1 or side_by_side  # rows of matrices below each other lie as far apart in all of them
    x = [part if part.is_contiguous() or alone and part.stride(1) == 1 else part.contiguous() for part in x]
    stride = x[0].stride(0) if alone else width
    x_q = torch.empty((tokens, width), dtype=dtype, device=device) if codes else nothing(dtype, device)
    x_qt = nothing(dtype, device, 1)
    if transposed:
        x_qt = torch.empty((width, round_up(tokens, 16)), dtype=dtype, device=device)
    if given:
        x_s, new_s = scale.contiguous(), nothing(scale_dtype, device)
    else:
        shape = scale_shape(tokens, width, granularity, group_size)
        x_s = new_s = torch.empty(shape, dtype=scale_dtype, device=device)
    if tokens * width == 0:
        new_s.fill_(torch.finfo(torch.float32).smallest_normal)  # which is empty where scales are given or of groups
    elif side_by_side:
        _quantize_parts(x, x_q, x_s, power_of_two)
    elif granularity == "token" and not given:
        block_h = min(next_power_of_2(width), 16384)
        for begin, programs, places, names in _together(x, max(1, 4096 // block_h)):
            _quantize_tokens_kernel[(programs,)](
                *places, x_s[begin:], x_q[begin:], width, stride, **names,
                EMAX=emax, POWER_OF_TWO=power_of_two, ONE_BLOCK=width <= block_h, BLOCK_H=block_h,
            )  # fmt: skip
    else:
        if granularity == "tensor" and not given:
            if amax is None:
                amax = torch.zeros(1, dtype=torch.int32, device=device)
                for _, programs, places, names in _together(x, 8):
                    _amax_kernel[(programs, ceil_div(width, 1024))](
                        *places, amax, width, stride, **names, BLOCK_H=1024, num_warps=8
                    )
            amax = amax.view(torch.int32)
        block_t, block_h, warps = _tile(width, group_size, codes, transposed)
        for begin, programs, places, names in _together(x, block_t, x_qt.shape[1] if transposed else None):
            _quantize_tiles_kernel[(programs, ceil_div(width, block_h))](
                *places, amax, x_s if x_s.shape[0] == 1 else x_s[begin:], x_q[begin:].view(torch.uint8),
                x_qt[..., begin:].view(torch.uint8), tokens - begin, width, stride, x_qt.shape[-1], **names,
                GRANULARITY=granularity, GROUP=group_size, GIVEN=given, EMAX=emax, POWER_OF_TWO=power_of_two,
                CODES=codes, TRANSPOSED=transposed, BLOCK_H=block_h, num_warps=warps,
            )  # fmt: skip
    return x_q, x_qt, new_s


def _quantize_parts(x, x_q, x_s, power_of_two):
    """Codes of up to four matrices side by side, with one scale for a token of all of them, in one launch."""
    tokens, empty = x_q.shape[0], 4 - len(x)
    widths = [part.shape[1] for part in x] + [0] * empty
    strides = [part.stride(0) for part in x] + [0] * empty
    most = 16384 if len(x) == 2 else 8192  # values of a row that are held while its amax is found; more are read twice
    blocks = [min(next_power_of_2(n), most) if n else 0 for n in widths]
    held = sum(blocks)
    block_t = max(1, 4096 // next_power_of_2(held))
    _quantize_parts_kernel[(ceil_div(tokens, block_t),)](
        *x, *x[:1] * empty, x_s, x_q, tokens, *widths, *strides,
        EMAX=MAX_EXPONENT[x_q.dtype], POWER_OF_TWO=power_of_two, PARTS=len(x), BLOCK_T=block_t,
        BLOCK_0=blocks[0], BLOCK_1=blocks[1], BLOCK_2=blocks[2], BLOCK_3=blocks[3],
        num_warps=4 if held <= 8192 else 8 if held <= 16384 else 16,
    )  # fmt: skip


def quantize_each(x):
    x, device = [part.contiguous() for part in x], x[0].device
    dtype = torch.float8_e4m3fn
    block_h = min(next_power_of_2(max(part.shape[1] for part in x)), 4096)
    block_t = 4096 // block_h
    rows, values, tokens, programs = [], 0, 0, 0
    for part in x:
        if part.numel():
            rows.append((part.data_ptr(), *part.shape, values, tokens, programs))
            programs += ceil_div(part.shape[0], block_t)
        values += part.numel()
        tokens += part.shape[0]
    codes = torch.empty(values, dtype=dtype, device=device)
    scales = torch.empty(tokens, dtype=torch.float32, device=device)
    if len(rows) < len(x):  # matrices of width 0 may have rows
        scales.fill_(torch.finfo(torch.float32).smallest_normal)
    if rows:
        aligned = all(row[0] % 16 == 0 and row[2] % 16 == 0 for row in rows)
        _quantize_each_kernel[(programs,)](
            on_device(tuple(rows), device), len(rows), scales, codes,
            VALUES=TRITON_DTYPES[x[0].dtype], EMAX=MAX_EXPONENT[dtype], ALIGNMENT=16 if aligned else 1,
            BLOCK_T=block_t, BLOCK_H=block_h,
        )  # fmt: skip
    return codes, scales


def dequantize(x_q, x_s, group_size, dtype):
    tokens, width = x_q.shape
    y = torch.empty(tokens, width, dtype=dtype, device=x_q.device)
    if y.numel() == 0:
        return y
    block_t, block_h, _ = _tile(width, group_size, True, False)
    _dequantize_kernel[(ceil_div(tokens, block_t), ceil_div(width, block_h))](
        x_q.contiguous(), x_s.contiguous(), y, tokens, width, x_s.shape[1] if group_size or x_s.shape[0] > 1 else 0,
        GROUP=group_size, BLOCK_T=block_t, BLOCK_H=block_h,
    )  # fmt: skip
    return y


def transpose(x_q, x_s):
    (tokens, width), dtype, device = joint_shape(x_q, 0), x_q[0].dtype, x_q[0].device
    top = None if x_s is None else x_s.amax(dim=(0, 1), keepdim=True)
    x_qt = torch.empty(width, round_up(tokens, 16), dtype=dtype, device=device)
    parts = [part.contiguous().view(torch.uint8) for part in x_q if part.numel()]
    x_s = None if x_s is None else x_s.contiguous()
    for begin, programs, places, names in _together(parts, 64 if x_s is None else 128, x_qt.shape[1]):
        _transpose_kernel[(programs, ceil_div(width, 128))](
            *places, None if x_s is None else x_s[begin:], top, x_qt[:, begin:].view(torch.uint8), tokens - begin,
            width, x_qt.shape[1], **names, MOVE=x_s is not None, EMAX=MAX_EXPONENT[dtype], BLOCK_H=128,
        )  # fmt: skip
    return x_qt, nothing(torch.float32, device) if top is None else top

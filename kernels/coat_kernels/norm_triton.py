"""Triton twins of norm.py: a program holds whole tokens in registers and reads them once.

Rows wider than ``WIDEST`` have kernels of their own, which go over a row in pieces, several times; the second time it
comes from a cache.

Masked values are zeros, and so are the weight and the bias there. Sums over a row therefore need no mask, except where
a mean was subtracted.
"""

import torch
import triton
import triton.language as tl

from .formats import MAX_EXPONENT, round_up
from .norm import MOST_IN_A_GROUP
from .quantize import scale_shape
from .quantize_triton import nothing
from .scaled_mm_triton import processors
from .tiles_triton import (
    INTERPRETED,
    amax_bits,
    inverse_scale,
    magnitude_bits,
    quantize_groups,
    scale_from_bits,
    scale_groups,
    to_float,
    to_float32,
    to_fp8,
    to_fp8_words,
    unpack_scale,
)

E4M3 = torch.float8_e4m3fn
EMAX = tl.constexpr(MAX_EXPONENT[E4M3])

WIDEST = 8192  # values of a row that one program holds; twice as many do not fit the registers of the backward
PIECE = MOST_IN_A_GROUP  # values at a time of a wider row: whole groups
TILE = 2048  # values of a program of shorter rows
PER_WARP = 512  # values: 16 for each thread
REGISTERS = 40  # of a thread of the forward: 48 warps on a processor, the fastest of a sweep on an H200
RESIDENT_WARPS = 16  # of the backward on one processor: of 128 registers for each thread
STAGES = 3  # tiles of the backward in flight: one at work, two on their way


def tile_of(width: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program of whole rows, or of one piece of a wide row.

    Four warps have 32 rows of 64 values, 16 of 128, 2 of 1024 or one of 2048; 8 have one of 4096 and 16 one of 8192.
    """
    block_h = triton.next_power_of_2(width) if width <= WIDEST else PIECE
    block_t = max(1, TILE // block_h)
    return block_t, block_h, block_t * block_h // PER_WARP


def transposed_tile_of(width: int, group_size: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile that is written transposed: the fastest of a sweep on an H200."""
    return 64, max(64, min(group_size, triton.next_power_of_2(width))), 4


def _dense(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]


@triton.jit
def _coefficients(ptr, t, h, width, NEUTRAL: tl.constexpr):
    """Columns h of a weight or bias in float32 for each token of a tile; ``NEUTRAL`` throughout where there is none.

    A tile as large as that of x is loaded so that it lies in the threads as x does. A single row would be spread over
    all threads, and come to where it is needed through shared memory.
    """
    h = tl.broadcast_to(h, [t.shape[0], h.shape[1]])
    if ptr is None:
        values = tl.full(h.shape, NEUTRAL, tl.float32)
    else:
        values = to_float32(tl.load(ptr + h, mask=h < width, other=0.0))
    return values


@triton.jit
def _columns(BLOCK_H: tl.constexpr):
    """Columns [1, BLOCK_H] of a tile whose threads take 8 at a time, as 16 bytes of BF16 or 8 of FP8.

    By itself Triton gives a thread 16, for the sake of FP8, and BF16 results change threads through shared memory.
    """
    return tl.max_contiguous(tl.arange(0, BLOCK_H), 8 if BLOCK_H > 8 else BLOCK_H)[None, :]


@triton.jit
def _rstd(square, eps):
    """``1 / sqrt(square + eps)``, NaN where the mean square is not finite."""
    return tl.where(square < float("inf"), tl.div_rn(1.0, tl.sqrt_rn(square + eps)), float("nan"))


@triton.jit
def _output(centered, rstd, w, b, ROUND_FIRST: tl.constexpr, X_DTYPE: tl.constexpr, Y_DTYPE: tl.constexpr):
    """y [BLOCK_T, BLOCK_H] in its dtype; w holds the offset already."""
    xhat = centered * rstd[:, None]
    if ROUND_FIRST:
        xhat = to_float(xhat, X_DTYPE).to(tl.float32)
    return to_float(xhat * w + b, Y_DTYPE)


@triton.jit
def _store_groups(x, q_ptr, s_ptr, t, h, h0, tokens, width, GROUP: tl.constexpr):
    """Keep x [BLOCK_T, BLOCK_H], columns from h0 on, as codes and their groups' scales."""
    GROUPS: tl.constexpr = x.shape[1] // GROUP
    x, s = quantize_groups(x, GROUP, EMAX, s_ptr.dtype.element_ty)
    tl.store(q_ptr + t[:, None] * width + h, to_fp8(x, EMAX), mask=(t[:, None] < tokens) & (h < width))
    g = h0 // GROUP + tl.arange(0, GROUPS)[None, :]
    groups = tl.cdiv(width, GROUP)
    tl.store(s_ptr + t[:, None] * groups + g, s, mask=(t[:, None] < tokens) & (g < groups))


@triton.jit(do_not_specialize=["tokens"])
def _norm_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, yq_ptr, ys_ptr, xq_ptr, xs_ptr, mean_ptr, rstd_ptr,
    tokens, width, stride, eps, offset,
    CENTER: tl.constexpr, ROUND_FIRST: tl.constexpr, GROUP: tl.constexpr, CODES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Everything that norm returns of BLOCK_T whole tokens. Grid: one program for each BLOCK_T tokens."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = _columns(BLOCK_H)
    here, inside = t < tokens, (t[:, None] < tokens) & (h < width)
    address = t[:, None] * width + h
    x = to_float32(tl.load(x_ptr + t[:, None] * stride + h, mask=inside, other=0.0))
    if GROUP > 0:
        _store_groups(x, xq_ptr, xs_ptr, t, h, 0, tokens, width, GROUP)
    centered = x
    if CENTER:
        mean = tl.sum(x, axis=1) / width
        tl.store(mean_ptr + t, mean, mask=here)
        centered = tl.where(inside, x - mean[:, None], 0.0)
    rstd = _rstd(tl.sum(centered * centered, axis=1) / width, eps)
    tl.store(rstd_ptr + t, rstd, mask=here)
    # Not before the sums: they come from a cache, and registers that wait are other programs' (see REGISTERS).
    w = _coefficients(w_ptr, t, h, width, 1.0) + offset
    b = _coefficients(b_ptr, t, h, width, 0.0)
    y = _output(centered, rstd, w, b, ROUND_FIRST, x_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
    tl.store(y_ptr + address, y, mask=inside)
    if CODES:
        y = to_float32(y)
        s = scale_from_bits(amax_bits(y, 1), EMAX, True)
        tl.store(ys_ptr + t, s, mask=here)
        tl.store(yq_ptr + address, to_fp8(y * inverse_scale(s, True)[:, None], EMAX), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _norm_wide_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, yq_ptr, ys_ptr, xq_ptr, xs_ptr, mean_ptr, rstd_ptr,
    tokens, width, stride, eps, offset,
    CENTER: tl.constexpr, ROUND_FIRST: tl.constexpr, GROUP: tl.constexpr, CODES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """As :func:`_norm_kernel`, in pieces of BLOCK_H columns: up to four times over the row."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = t < tokens
    row = x_ptr + t[:, None] * stride
    mean = tl.zeros([BLOCK_T], tl.float32)
    if CENTER:
        for h0 in tl.range(0, width, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)[None, :]
            mean += tl.sum(tl.load(row + h, mask=here[:, None] & (h < width), other=0.0).to(tl.float32), axis=1)
        mean = mean / width
        tl.store(mean_ptr + t, mean, mask=here)
    square = tl.zeros([BLOCK_T], tl.float32)
    for h0 in tl.range(0, width, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)[None, :]
        inside = here[:, None] & (h < width)
        x = tl.load(row + h, mask=inside, other=0.0).to(tl.float32)
        if GROUP > 0:
            _store_groups(x, xq_ptr, xs_ptr, t, h, h0, tokens, width, GROUP)
        centered = tl.where(inside, x - mean[:, None], 0.0)
        square += tl.sum(centered * centered, axis=1)
    rstd = _rstd(square / width, eps)
    tl.store(rstd_ptr + t, rstd, mask=here)
    amax = tl.zeros([BLOCK_T], tl.int32)
    for h0 in tl.range(0, width, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)[None, :]
        inside = here[:, None] & (h < width)
        centered = tl.where(inside, tl.load(row + h, mask=inside, other=0.0).to(tl.float32) - mean[:, None], 0.0)
        w, b = _coefficients(w_ptr, t, h, width, 1.0) + offset, _coefficients(b_ptr, t, h, width, 0.0)
        y = _output(centered, rstd, w, b, ROUND_FIRST, x_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
        tl.store(y_ptr + t[:, None] * width + h, y, mask=inside)
        amax = tl.maximum(amax, tl.max(magnitude_bits(y.to(tl.float32)), axis=1))
    if CODES:
        s = scale_from_bits(amax, EMAX, True)
        tl.store(ys_ptr + t, s, mask=here)
        inverse = tl.div_rn(1.0, s)[:, None]
        tl.debug_barrier()  # y comes back from memory, written by other threads of this program
        for h0 in tl.range(0, width, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)[None, :]
            inside, address = here[:, None] & (h < width), t[:, None] * width + h
            y = tl.load(y_ptr + address, mask=inside, other=0.0).to(tl.float32)
            tl.store(yq_ptr + address, to_fp8(y * inverse, EMAX), mask=inside)


def norm(x, weight, bias, eps, center, offset, round_first, out_dtype, group_size, scale_dtype, codes):
    (tokens, width), device = x.shape, x.device
    x = x if x.stride(1) == 1 else x.contiguous()
    weight, bias = _dense(weight, bias)
    y = torch.empty((tokens, width), dtype=out_dtype, device=device)
    rstd = torch.empty(tokens, dtype=torch.float32, device=device)
    mean = torch.empty(tokens, dtype=torch.float32, device=device) if center else nothing(torch.float32, device)
    y_q, x_q = nothing(E4M3, device), nothing(E4M3, device, 1)
    y_s, x_s = nothing(torch.float32, device, 1), nothing(scale_dtype, device, 2)
    if codes:
        y_q = torch.empty((tokens, width), dtype=E4M3, device=device)
        y_s = torch.empty((tokens, 1), dtype=torch.float32, device=device)
    if group_size:
        x_q = torch.empty((tokens, width), dtype=E4M3, device=device)
        x_s = torch.empty(scale_shape(tokens, width, "group", group_size), dtype=scale_dtype, device=device)
    if tokens:
        block_t, block_h, warps = tile_of(width)
        kernel = _norm_kernel if width <= block_h else _norm_wide_kernel
        # Tiles of several tokens, odd widths and other dtypes would spill; the wide kernel has loops.
        usual = (x.dtype, scale_dtype) == (torch.bfloat16, torch.uint8) and width % 16 == 0
        registers = REGISTERS if usual and block_t == 1 and width <= block_h else None
        kernel[(triton.cdiv(tokens, block_t),)](
            x, weight, bias, y, y_q, y_s, x_q, x_s, mean, rstd, tokens, width, x.stride(0), eps, offset,
            CENTER=center, ROUND_FIRST=round_first, GROUP=min(group_size, block_h), CODES=codes,
            BLOCK_T=block_t, BLOCK_H=block_h, num_warps=warps, maxnreg=registers,
        )  # fmt: skip
    return y, y_q, y_s, x_q, x_s, mean, rstd


@triton.jit
def _load_scales(s_ptr, t, stop, g, groups):
    """Stored scales [BLOCK_T, GROUPS] of tokens t before ``stop`` and groups g; zeros elsewhere."""
    return tl.load(s_ptr + t[:, None] * groups + g, mask=(t[:, None] < stop) & (g < groups), other=0)


@triton.jit
def _load_numbers(ptr, t, stop):
    """The number of each token t before ``stop``, zeros behind it; None of what is not there."""
    if ptr is None:
        numbers = None
    else:
        numbers = tl.load(ptr + t, mask=t < stop, other=0.0)
    return numbers


@triton.jit
def _load_kept(xq_ptr, mean, stored, factor, t, h, stop, width, GROUP: tl.constexpr):
    """``(x - mean) * factor`` of tokens t before ``stop``, columns h, where x is kept with the scales ``stored``.

    The factor [BLOCK_T] joins the scales first, which is exact if they are powers of two: one product for each value.
    Masked tokens give zeros; masked columns do too without a mean.
    """
    q = tl.load(xq_ptr + t[:, None] * width + h, mask=(t[:, None] < stop) & (h < width), other=0.0).to(tl.float32)
    x = scale_groups(q, unpack_scale(stored) * factor[:, None], GROUP)
    if mean is not None:
        x -= (mean * factor)[:, None]
    return x


@triton.jit
def _load_gradient(dy_ptr, t, h, stop, width, stride):
    """dy in float32 of tokens t before ``stop``, columns h; zeros elsewhere."""
    inside = (t[:, None] < stop) & (h < width)
    return to_float32(tl.load(dy_ptr + t[:, None] * stride + h, mask=inside, other=0.0))


@triton.jit
def _add_both(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def _both_sums(a, b):
    """Sums of a and of b [BLOCK_T, BLOCK_H] over the columns: threads exchange and wait once, not twice."""
    if INTERPRETED:  # which calls a function for each pair of values
        return tl.sum(a, axis=1), tl.sum(b, axis=1)
    else:
        return tl.reduce((a, b), 1, _add_both)


@triton.jit(do_not_specialize=["tokens", "each"])
def _norm_backward_kernel(
    dy_ptr, xq_ptr, xs_ptr, mean_ptr, rstd_ptr, w_ptr, dx_ptr, sums_ptr, tokens, width, stride, offset, each,
    GROUP: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of ``each`` successive tokens, BLOCK_T at a time, and their part of dw and db, summed in registers.

    Grid: P programs; ``sums`` is [P, DW + DB, H].
    """
    first = tl.program_id(0) * each
    stop = tl.minimum(first + each, tokens)
    h = _columns(BLOCK_H)
    g_index = tl.arange(0, BLOCK_H // GROUP)[None, :]
    groups = tl.cdiv(width, GROUP)
    w = _coefficients(w_ptr, tl.arange(0, BLOCK_T), h, width, 1.0) + offset
    dw = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    db = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    t = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
    next_scales = _load_scales(xs_ptr, t, stop, g_index, groups)
    next_rstd = _load_numbers(rstd_ptr, t, stop)
    next_mean = next_rstd if mean_ptr is None else _load_numbers(mean_ptr, t, stop)
    for start in tl.range(first, stop, BLOCK_T, num_stages=STAGES):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        # Triton fetches dy and codes of later tiles ahead of time, but cannot do that for single bytes, and single
        # numbers would come through shared memory.
        stored, rstd, mean = next_scales, next_rstd, next_mean
        next_scales = _load_scales(xs_ptr, t + BLOCK_T, stop, g_index, groups)
        next_rstd = _load_numbers(rstd_ptr, t + BLOCK_T, stop)
        next_mean = next_rstd if mean_ptr is None else _load_numbers(mean_ptr, t + BLOCK_T, stop)
        xhat = _load_kept(xq_ptr, None if mean_ptr is None else mean, stored, rstd, t, h, stop, width, GROUP)
        dy = _load_gradient(dy_ptr, t, h, stop, width, stride)
        g = dy * w
        if mean_ptr is not None:
            product, total = _both_sums(g * xhat, g)
            dx = g - xhat * (product / width)[:, None] - (total / width)[:, None]
        else:
            dx = g - xhat * (tl.sum(g * xhat, axis=1) / width)[:, None]
        dx = to_float(dx * rstd[:, None], dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + t[:, None] * width + h, dx, mask=(t[:, None] < stop) & (h < width))
        if DW:
            dw += dy * xhat
        if DB:
            db += dy
    column = tl.arange(0, BLOCK_H)
    sums_ptr += tl.program_id(0).to(tl.int64) * (DW + DB) * width
    if DW:
        tl.store(sums_ptr + column, tl.sum(dw, axis=0), mask=column < width)
    if DB:
        tl.store(sums_ptr + DW * width + column, tl.sum(db, axis=0), mask=column < width)


@triton.jit(do_not_specialize=["tokens", "each"])
def _norm_backward_wide_kernel(
    dy_ptr, xq_ptr, xs_ptr, mean_ptr, rstd_ptr, w_ptr, dx_ptr, sums_ptr, tokens, width, stride, offset, each,
    GROUP: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """As :func:`_norm_backward_kernel`, one token at a time (BLOCK_T is 1) in pieces of BLOCK_H columns, twice over
    the row. The program's part of dw and db lies in memory, where only this program works on it."""
    first = tl.program_id(0) * each
    stop = tl.minimum(first + each, tokens)
    groups = tl.cdiv(width, GROUP)
    sums_ptr += tl.program_id(0).to(tl.int64) * (DW + DB) * width
    for start in tl.range(first, stop, BLOCK_T, num_stages=1):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        rstd = tl.load(rstd_ptr + t)
        mean = _load_numbers(mean_ptr, t, stop)
        product = tl.zeros([BLOCK_T], tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        for h0 in tl.range(0, width, BLOCK_H, num_stages=STAGES):
            h = h0 + tl.arange(0, BLOCK_H)[None, :]
            stored = _load_scales(xs_ptr, t, stop, h0 // GROUP + tl.arange(0, BLOCK_H // GROUP)[None, :], groups)
            w = _coefficients(w_ptr, t, h, width, 1.0) + offset
            xhat = _load_kept(xq_ptr, mean, stored, rstd, t, h, stop, width, GROUP)
            dy = _load_gradient(dy_ptr, t, h, stop, width, stride)
            g = dy * w
            product += tl.sum(g * xhat, axis=1)
            total += tl.sum(g, axis=1)
        product = product / width
        total = total / width
        for h0 in tl.range(0, width, BLOCK_H, num_stages=1):
            h = h0 + tl.arange(0, BLOCK_H)[None, :]
            inside = h < width
            stored = _load_scales(xs_ptr, t, stop, h0 // GROUP + tl.arange(0, BLOCK_H // GROUP)[None, :], groups)
            w = _coefficients(w_ptr, t, h, width, 1.0) + offset
            xhat = _load_kept(xq_ptr, mean, stored, rstd, t, h, stop, width, GROUP)
            dy = _load_gradient(dy_ptr, t, h, stop, width, stride)
            g = dy * w
            dx = g - xhat * product[:, None]
            if mean_ptr is not None:
                dx -= total[:, None]
            dx = to_float(dx * rstd[:, None], dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + t[:, None] * width + h, dx, mask=inside)
            so_far = inside & (t[:, None] > first)  # before the first token there is nothing yet
            if DW:
                tl.store(sums_ptr + h, tl.load(sums_ptr + h, mask=so_far, other=0.0) + dy * xhat, mask=inside)
            if DB:
                b_ptr = sums_ptr + DW * width + h
                tl.store(b_ptr, tl.load(b_ptr, mask=so_far, other=0.0) + dy, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _sum_kernel(sums_ptr, out_ptr, programs, width, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr):
    """The sum of [P, H] over its programs, always in the same order. Grid: pieces of BLOCK_H columns."""
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for begin in tl.range(0, programs, BLOCK_P):
        p = (begin + tl.arange(0, BLOCK_P)[:, None]).to(tl.int64)
        total += tl.load(sums_ptr + p * width + h[None, :], mask=(p < programs) & (h < width)[None, :], other=0.0)
    tl.store(out_ptr + h, tl.sum(total, axis=0), mask=h < width)


def norm_backward(dy, x_q, x_s, mean, rstd, weight, offset, group_size, dx_dtype, dw, db):
    (tokens, width), device = x_q.shape, x_q.device
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    x_q, x_s, mean, rstd, weight = _dense(x_q, x_s, mean, rstd, weight)
    dx = torch.empty((tokens, width), dtype=dx_dtype, device=device)
    if tokens == 0:
        return dx, torch.zeros((dw + db, width), dtype=torch.float32, device=device)
    block_t, block_h, warps = tile_of(width)
    tiles = triton.cdiv(tokens, block_t)
    each = triton.cdiv(tiles, RESIDENT_WARPS // warps * processors(device)) * block_t
    programs = triton.cdiv(tokens, each)
    sums = torch.empty((programs, dw + db, width), dtype=torch.float32, device=device)
    kernel = _norm_backward_kernel if width <= block_h else _norm_backward_wide_kernel
    kernel[(programs,)](
        dy, x_q, x_s, mean, rstd, weight, dx, sums, tokens, width, dy.stride(0), offset, each,
        GROUP=min(group_size, block_h), DW=int(dw), DB=int(db),
        BLOCK_T=block_t, BLOCK_H=block_h, STAGES=STAGES, num_warps=warps,
    )  # fmt: skip
    total = torch.empty((dw + db, width), dtype=torch.float32, device=device)
    if dw or db:
        columns = total.numel()
        _sum_kernel[(triton.cdiv(columns, 32),)](sums, total, programs, columns, BLOCK_P=64, BLOCK_H=32, num_warps=8)
    return dx, total


@triton.jit(do_not_specialize=["tokens", "lines"])
def _norm_transposed_kernel(
    xq_ptr, xs_ptr, mean_ptr, rstd_ptr, w_ptr, b_ptr, scale_ptr, yqt_ptr, tokens, width, lines, offset,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of y's codes, written transposed. Grid: tiles of [BLOCK_T, BLOCK_H], also behind the last token.

    A row of the result has ``lines`` of 16 tokens.
    """
    word = tl.program_id(0).to(tl.int64) * (BLOCK_T // 4) + tl.arange(0, BLOCK_T // 4)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    g = tl.program_id(1) * (BLOCK_H // GROUP) + tl.arange(0, BLOCK_H // GROUP)[None, :]
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))  # joins the weight, which may be zero where it is huge
    w = _coefficients(w_ptr, word, h, width, 1.0) * inverse + offset * inverse
    b = _coefficients(b_ptr, word, h, width, 0.0) * inverse
    parts = ()
    for i in tl.static_range(4):  # tokens i, i + 4, i + 8 ... of the tile, the four of a word in one thread
        t = 4 * word + i
        rstd = _load_numbers(rstd_ptr, t, tokens)
        mean = _load_numbers(mean_ptr, t, tokens)
        stored = _load_scales(xs_ptr, t, tokens, g, tl.cdiv(width, GROUP))
        # where there is no bias its zero makes 0 of -0
        parts = parts + (_load_kept(xq_ptr, mean, stored, rstd, t, h, tokens, width, GROUP) * w + b,)
    words = to_fp8_words(parts[0], parts[1], parts[2], parts[3], EMAX)
    if b_ptr is not None:  # which is what stands behind the last token
        left = tl.minimum(tl.maximum(tokens - 4 * word, 0), 4)
        words &= ((1 << (8 * left)) - 1).to(tl.int32)[:, None]
    column = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    inside = (column < width) & (word[None, :] < lines * 4)
    tl.store(yqt_ptr + column * (lines * 4) + word[None, :], tl.trans(words), mask=inside)


def norm_transposed(x_q, x_s, mean, rstd, weight, bias, scale, offset, group_size):
    tokens, width = x_q.shape
    padded = round_up(tokens, 16)
    x_q, x_s, mean, rstd, weight, bias = _dense(x_q, x_s, mean, rstd, weight, bias)
    y_qt = torch.empty((width, padded), dtype=E4M3, device=x_q.device)
    if tokens:
        block_t, block_h, warps = transposed_tile_of(width, group_size)
        _norm_transposed_kernel[(triton.cdiv(padded, block_t), triton.cdiv(width, block_h))](
            x_q, x_s, mean, rstd, weight, bias, scale, y_qt.view(torch.int32), tokens, width, padded // 16, offset,
            GROUP=min(group_size, block_h), BLOCK_T=block_t, BLOCK_H=block_h, num_warps=warps,
        )  # fmt: skip
    return y_qt


@triton.jit(do_not_specialize=["tokens"])
def _norm_values_kernel(
    xq_ptr, xs_ptr, mean_ptr, rstd_ptr, w_ptr, b_ptr, y_ptr, tokens, width, offset,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of y. Grid: tiles of [BLOCK_T, BLOCK_H]."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    g = tl.program_id(1) * (BLOCK_H // GROUP) + tl.arange(0, BLOCK_H // GROUP)[None, :]
    here = t < tokens
    rstd = _load_numbers(rstd_ptr, t, tokens)
    mean = _load_numbers(mean_ptr, t, tokens)
    stored = _load_scales(xs_ptr, t, tokens, g, tl.cdiv(width, GROUP))
    y = _load_kept(xq_ptr, mean, stored, rstd, t, h, tokens, width, GROUP)
    w, b = _coefficients(w_ptr, t, h, width, 1.0), _coefficients(b_ptr, t, h, width, 0.0)
    y = to_float(y * (w + offset) + b, y_ptr.dtype.element_ty)
    tl.store(y_ptr + t[:, None] * width + h, y, mask=here[:, None] & (h < width))


def norm_values(x_q, x_s, mean, rstd, weight, bias, offset, group_size, dtype):
    tokens, width = x_q.shape
    x_q, x_s, mean, rstd, weight, bias = _dense(x_q, x_s, mean, rstd, weight, bias)
    y = torch.empty((tokens, width), dtype=dtype, device=x_q.device)
    if tokens:
        block_t, block_h, warps = tile_of(width)
        _norm_values_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(width, block_h))](
            x_q, x_s, mean, rstd, weight, bias, y, tokens, width, offset,
            GROUP=min(group_size, block_h), BLOCK_T=block_t, BLOCK_H=block_h, num_warps=warps,
        )  # fmt: skip
    return y

"""Triton twins of activation.py: each reads its inputs from memory once; what it reads again is in the cache.

The sigmoid is ``1 / (1 + exp2(-z * log2(e)))`` in float32, log2(e) in the constants of z. Its relative error is at
most 2**-20 + |z| * 2**-23 (of exp2 and the division, and of the rounded exponent), until it is zero below z = -88:
2**-16 in the worst place, where half a step of BF16 is 2**-9 at least. It is exactly 1 from z = 18 on, so no rounding
is left over in a slope far out.

The normal distribution of gelu is formula 7.1.26 of Abramowitz and Stegun: off by at most 2**-21, and by 2**-20 of it
from -1 on. Below -4 it is closer than float32's ``1 + erf``, where all digits cancel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .formats import MAX_EXPONENT, round_up
from .quantize_triton import nothing
from .tiles_triton import (
    amax_bits,
    fast_reciprocal,
    inverse_scale,
    larger_magnitude,
    quantize_groups,
    scale_from_bits,
    scale_groups,
    store_scales,
    to_float,
    to_float32,
    to_fp8,
    to_fp8_words,
)

TILE = 4096  # values of a program that need not see a whole row


class Rows(NamedTuple):
    """How a kernel that makes codes goes over a row: in tiles of ``block`` columns, which wait for the row's scale in
    the ``registers`` of each thread of ``warps``; where they are more than three in ``wide_registers``. A row of more
    than ``most`` tiles takes twice the warps and tiles twice as wide; one of more than twice as many is read twice."""

    block: int
    most: int
    warps: int
    registers: int
    wide_registers: int


REGISTERS = 65536  # of a processor, for all threads of a program

# The fastest of sweeps on an H200, at widths of 11008 and 18944, without up of 4304 too.
FORWARD = Rows(block=4096, most=5, warps=16, registers=64, wide_registers=64)
BACKWARD = Rows(block=4096, most=5, warps=16, registers=64, wide_registers=128)
PLAIN_BACKWARD = Rows(block=2048, most=6, warps=8, registers=64, wide_registers=64)  # without up
PLAIN_WIDTH = PLAIN_BACKWARD.block * PLAIN_BACKWARD.most  # beyond which it is no faster
TRANSPOSED_TILE = 32, 128, 2  # rows, columns, at least as many as in a group, and warps
GELU_TANH_TILE = 128, 128, 4  # the same for gelu_tanh without up
AHEAD = 2  # tiles of the forward that are on their way while one is at work


@triton.jit
def _sigmoid(x, ACT: tl.constexpr, scale=1.0):
    """``sigmoid(z) / scale`` where ``act(x) = x * sigmoid(z)``. The exponent may overflow: a sigmoid of zero."""
    if ACT == "quick_gelu":  # z = 1.702 x
        exponent = -2.4554669595930156 * x
    elif ACT == "gelu_tanh":  # z = sqrt(8 / pi) (x + 0.044715 x**3)
        exponent = x * (-2.302208198144325 - 0.1029432395800235 * (x * x))
    else:
        exponent = -1.4426950408889634 * x
    return fast_reciprocal(scale + scale * tl.exp2(exponent))


@triton.jit
def _normal(x):
    """The standard normal distribution of float32 ``x``, and ``sqrt(2 pi)`` times its density."""
    bell = tl.exp2(-0.7213475204444817 * x * x)
    t = fast_reciprocal(1.0 + 0.23164188852425 * tl.abs(x))
    series = t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))
    beyond = t * (0.127414796 + t * (-0.142248368 + series)) * bell  # of abs(x)
    return tl.where(x < 0.0, beyond, 1.0 - beyond), bell


@triton.jit
def value_and_slope(x, ACT: tl.constexpr):
    """``act(x)`` and its derivative of float32 ``x``; the twin of ``activation.value_and_slope``."""
    if ACT == "identity":
        return x, tl.full(x.shape, 1.0, tl.float32)
    elif ACT == "relu" or ACT == "relu2":
        y = tl.where(x <= 0.0, 0.0, x)  # lets NaN through
        if ACT == "relu":
            return y, tl.where(x > 0.0, 1.0, y)
        else:
            return y * y, 2.0 * y
    elif ACT == "gelu":
        cdf, bell = _normal(x)
        return x * cdf, cdf + x * bell * 0.3989422804014327
    else:
        if ACT == "quick_gelu":
            dz = 1.702
        elif ACT == "gelu_tanh":  # far out it is multiplied by zero
            dz = 1.5957691216057308 + 0.21406443847660785 * tl.minimum(x * x, 256.0)
        else:
            dz = 1.0
        s = _sigmoid(x, ACT)
        y = x * s
        return y, s + y * (1.0 - s) * dz


@triton.jit
def _keep(x, q_ptr, s_ptr, t, h0, part, parts, tokens, width, GROUP: tl.constexpr):
    """Write the codes and scales of a tile's groups [BLOCK_T, BLOCK_H] that begin in column h0 of x (0) or up (1)."""
    BLOCK_H: tl.constexpr = x.shape[1]
    q, s = quantize_groups(x, GROUP, 8, s_ptr.dtype.element_ty)
    h = h0 + tl.arange(0, BLOCK_H)
    inside = t[:, None] < tokens
    tl.store(
        q_ptr + (t * parts + part)[:, None] * width + h[None, :], to_fp8(q, 8), mask=inside & (h[None, :] < width)
    )
    groups = tl.cdiv(width, GROUP)
    g = h0 // GROUP + tl.arange(0, BLOCK_H // GROUP)
    store_scales(s_ptr + (t * parts + part)[:, None] * groups + g[None, :], s, inside & (g[None, :] < groups))


@triton.jit
def _restore(q_ptr, s_ptr, t, h0, part, parts, tokens, width, GROUP: tl.constexpr, BLOCK_H: tl.constexpr):
    """Float32 values of a tile's groups, as :func:`_keep` has written them; zero outside."""
    h = h0 + tl.arange(0, BLOCK_H)
    inside = t[:, None] < tokens
    q = tl.load(
        q_ptr + (t * parts + part)[:, None] * width + h[None, :], mask=inside & (h[None, :] < width), other=0.0
    )
    groups = tl.cdiv(width, GROUP)
    g = h0 // GROUP + tl.arange(0, BLOCK_H // GROUP)
    s = tl.load(
        s_ptr + (t * parts + part)[:, None] * groups + g[None, :], mask=inside & (g[None, :] < groups), other=0
    )
    return scale_groups(q.to(tl.float32), s, GROUP)


@triton.jit
def _load(x_ptr, up_ptr, t, h0, tokens, width, stride_x, stride_up, GATED: tl.constexpr, BLOCK_H: tl.constexpr):
    """x and up of a tile that begins in column h0, as they are; zero outside."""
    h = h0 + tl.arange(0, BLOCK_H)[None, :]
    inside = (t[:, None] < tokens) & (h < width)
    x = tl.load(x_ptr + t[:, None] * stride_x + h, mask=inside, other=0.0)
    up = tl.load(up_ptr + t[:, None] * stride_up + h, mask=inside, other=0.0) if GATED else x
    return x, up


@triton.jit
def _forward(
    x, up, kept_ptr, kept_s_ptr, t, h0, tokens, width, ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr
):
    """h of a tile that begins in column h0, rounded; with GROUP its x and up are kept."""
    PARTS: tl.constexpr = 2 if GATED else 1
    DTYPE: tl.constexpr = x.dtype
    x = to_float32(x)
    y, _ = value_and_slope(x, ACT)
    if GROUP > 0:
        _keep(x, kept_ptr, kept_s_ptr, t, h0, 0, PARTS, tokens, width, GROUP)
    if GATED:
        up = to_float32(up)
        y *= up
        if GROUP > 0:
            _keep(up, kept_ptr, kept_s_ptr, t, h0, 1, PARTS, tokens, width, GROUP)
    return to_float(y, DTYPE)


@triton.jit
def _store(y, y_ptr, row, h0, here, width):
    """Write the columns from h0 on of a tile's rows."""
    h = h0 + tl.arange(0, y.shape[1])[None, :]
    tl.store(y_ptr + row + h, y, mask=here & (h < width))


@triton.jit
def _row_amax_bits(x):
    """The largest magnitude bits of a tile of one row: a number, as a tensor would force its layout on others."""
    return tl.max(amax_bits(x, 1), axis=0)


@triton.jit(do_not_specialize=["tokens"])
def _activation_kernel(
    x_ptr, up_ptr, h_ptr, hq_ptr, hs_ptr, kept_ptr, kept_s_ptr, tokens, width, stride_x, stride_up,
    ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, VALUES: tl.constexpr, CODES: tl.constexpr,
    HELD: tl.constexpr, TAIL: tl.constexpr, AHEAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """h and the kept groups of BLOCK_T tokens: one tile, or with CODES whole rows, tile by tile, and then the codes.

    The HELD tiles of a row, and behind them one of TAIL columns, wait for its scale in registers; with HELD = 0 they
    are computed again, from what the cache still has. Grid: blocks of tokens, and without CODES blocks of columns.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = t[:, None] < tokens
    row = t[:, None] * width
    if not CODES:
        h0 = tl.program_id(1) * BLOCK_H
        x, up = _load(x_ptr, up_ptr, t, h0, tokens, width, stride_x, stride_up, GATED, BLOCK_H)
        y = _forward(x, up, kept_ptr, kept_s_ptr, t, h0, tokens, width, ACT, GATED, GROUP)
        if VALUES:
            _store(y, h_ptr, row, h0, here, width)
    else:
        TILES: tl.constexpr = HELD + (1 if TAIL > 0 else 0)
        top = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        tail = 0
        loaded = ()
        held = ()
        for i in tl.static_range(TILES + AHEAD if HELD else 0):
            if i < TILES:  # before the stores of the tile that is AHEAD of it, behind which no load may move
                pair = _load(
                    x_ptr, up_ptr, t, i * BLOCK_H, tokens, width, stride_x, stride_up, GATED,
                    BLOCK_H if i < HELD else TAIL,
                )  # fmt: skip
                loaded = loaded + (pair[0], pair[1])
            if i >= AHEAD:
                h0 = (i - AHEAD) * BLOCK_H
                y = _forward(
                    loaded[2 * (i - AHEAD)], loaded[2 * (i - AHEAD) + 1], kept_ptr, kept_s_ptr, t, h0, tokens, width,
                    ACT, GATED, GROUP,
                )  # fmt: skip
                if VALUES:
                    _store(y, h_ptr, row, h0, here, width)
                if i - AHEAD < HELD:
                    top = larger_magnitude(top, to_float32(y))
                else:
                    tail = _row_amax_bits(to_float32(y))
                held = held + (y,)
        if HELD == 0:
            for h0 in tl.range(0, width, BLOCK_H):
                x, up = _load(x_ptr, up_ptr, t, h0, tokens, width, stride_x, stride_up, GATED, BLOCK_H)
                y = _forward(x, up, kept_ptr, kept_s_ptr, t, h0, tokens, width, ACT, GATED, GROUP)
                if VALUES:
                    _store(y, h_ptr, row, h0, here, width)
                top = larger_magnitude(top, to_float32(y))
        s = scale_from_bits(tl.maximum(tail, amax_bits(top, 1)), 8, True)
        tl.store(hs_ptr + t, s, mask=t < tokens)
        inverse = inverse_scale(s, True)[:, None]
        for i in tl.static_range(TILES):
            _store(to_fp8(to_float32(held[i]) * inverse, 8), hq_ptr, row, i * BLOCK_H, here, width)
        if HELD == 0:
            for h0 in tl.range(0, width, BLOCK_H):
                x, up = _load(x_ptr, up_ptr, t, h0, tokens, width, stride_x, stride_up, GATED, BLOCK_H)
                y = _forward(x, up, kept_ptr, kept_s_ptr, t, h0, tokens, width, ACT, GATED, 0)
                _store(to_fp8(to_float32(y) * inverse, 8), hq_ptr, row, h0, here, width)


@triton.jit
def _backward(
    dh_ptr, kept_ptr, kept_s_ptr, t, h0, tokens, width, stride,
    ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradients of x and up of a tile that begins in column h0, rounded to DTYPE; twice that of x without up."""
    PARTS: tl.constexpr = 2 if GATED else 1
    h = h0 + tl.arange(0, BLOCK_H)[None, :]
    dh = to_float32(tl.load(dh_ptr + t[:, None] * stride + h, mask=(t[:, None] < tokens) & (h < width), other=0.0))
    x = _restore(kept_ptr, kept_s_ptr, t, h0, 0, PARTS, tokens, width, GROUP, BLOCK_H)
    y, slope = value_and_slope(x, ACT)
    if GATED:
        up = _restore(kept_ptr, kept_s_ptr, t, h0, 1, PARTS, tokens, width, GROUP, BLOCK_H)
        d_up = to_float(dh * y, DTYPE)
        d_x = to_float(dh * up * slope, DTYPE)
    else:
        d_x = to_float(dh * slope, DTYPE)
        d_up = d_x
    return d_x, d_up


@triton.jit
def _store_both(x, up, ptr, row, h0, here, width, GATED: tl.constexpr):
    """Write the columns from h0 on of what belongs to x, and beside it of what belongs to up."""
    _store(x, ptr, row, h0, here, width)
    if GATED:
        _store(up, ptr, row + width, h0, here, width)


@triton.jit
def _larger(top, d_x, d_up, GATED: tl.constexpr):
    top = larger_magnitude(top, to_float32(d_x))
    return larger_magnitude(top, to_float32(d_up)) if GATED else top


@triton.jit(do_not_specialize=["tokens"])
def _activation_backward_kernel(
    dh_ptr, kept_ptr, kept_s_ptr, d_ptr, dq_ptr, ds_ptr, tokens, width, stride,
    ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, CODES: tl.constexpr, EMAX: tl.constexpr,
    HELD: tl.constexpr, TAIL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradients of x and up for BLOCK_T tokens: one tile, or with CODES whole rows, as :func:`_activation_kernel`."""
    DTYPE: tl.constexpr = d_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = t[:, None] < tokens
    row = t[:, None] * width * (2 if GATED else 1)
    if not CODES:
        h0 = tl.program_id(1) * BLOCK_H
        d_x, d_up = _backward(
            dh_ptr, kept_ptr, kept_s_ptr, t, h0, tokens, width, stride, ACT, GATED, GROUP, DTYPE, BLOCK_H
        )
        _store_both(d_x, d_up, d_ptr, row, h0, here, width, GATED)
    else:
        TILES: tl.constexpr = HELD + (1 if TAIL > 0 else 0)
        top = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        tail = 0
        held = ()
        for i in tl.static_range(TILES):
            d_x, d_up = _backward(
                dh_ptr, kept_ptr, kept_s_ptr, t, i * BLOCK_H, tokens, width, stride, ACT, GATED, GROUP, DTYPE,
                BLOCK_H if i < HELD else TAIL,
            )  # fmt: skip
            if i < HELD:
                top = _larger(top, d_x, d_up, GATED)
            else:
                tail = _row_amax_bits(_larger(tl.zeros(d_x.shape, tl.float32), d_x, d_up, GATED))
            held = held + (d_x, d_up)
        if HELD == 0:
            for h0 in tl.range(0, width, BLOCK_H):
                d_x, d_up = _backward(
                    dh_ptr, kept_ptr, kept_s_ptr, t, h0, tokens, width, stride, ACT, GATED, GROUP, DTYPE, BLOCK_H
                )
                top = _larger(top, d_x, d_up, GATED)
        s = scale_from_bits(tl.maximum(tail, amax_bits(top, 1)), EMAX, True)
        tl.store(ds_ptr + t, s, mask=t < tokens)
        inverse = inverse_scale(s, True)[:, None]
        for i in tl.static_range(TILES):
            q_x = to_fp8(to_float32(held[2 * i]) * inverse, EMAX)
            q_up = to_fp8(to_float32(held[2 * i + 1]) * inverse, EMAX)
            _store_both(q_x, q_up, dq_ptr, row, i * BLOCK_H, here, width, GATED)
        if HELD == 0:
            for h0 in tl.range(0, width, BLOCK_H):
                d_x, d_up = _backward(
                    dh_ptr, kept_ptr, kept_s_ptr, t, h0, tokens, width, stride, ACT, GATED, GROUP, DTYPE, BLOCK_H
                )
                q_x = to_fp8(to_float32(d_x) * inverse, EMAX)
                q_up = to_fp8(to_float32(d_up) * inverse, EMAX)
                _store_both(q_x, q_up, dq_ptr, row, h0, here, width, GATED)


@triton.jit(do_not_specialize=["tokens", "lines"])
def _activation_transposed_kernel(
    kept_ptr, kept_s_ptr, scale_ptr, qt_ptr, tokens, width, lines,
    ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_T, BLOCK_H] of codes of h, written transposed. Grid: blocks of tokens, blocks of columns.

    A row of the result has ``lines`` of 16 tokens."""
    PARTS: tl.constexpr = 2 if GATED else 1
    word = tl.program_id(0).to(tl.int64) * (BLOCK_T // 4) + tl.arange(0, BLOCK_T // 4)
    h0 = tl.program_id(1) * BLOCK_H
    scale = tl.load(scale_ptr)
    inverse = tl.div_rn(1.0, scale)
    parts = ()
    for i in tl.static_range(4):  # tokens i, i + 4, i + 8 ... of the tile, the four of a word in one thread
        t = 4 * word + i
        x = _restore(kept_ptr, kept_s_ptr, t, h0, 0, PARTS, tokens, width, GROUP, BLOCK_H)
        if ACT == "gelu_tanh" and not GATED:  # with up, x over the scale might overflow
            y = x * _sigmoid(x, ACT, scale)
        else:
            y, _ = value_and_slope(x, ACT)
            if GATED:
                y *= _restore(kept_ptr, kept_s_ptr, t, h0, 1, PARTS, tokens, width, GROUP, BLOCK_H)
            y *= inverse
        parts = parts + (y,)
    words = to_fp8_words(parts[0], parts[1], parts[2], parts[3], 8)
    h = h0 + tl.arange(0, BLOCK_H)[:, None]
    # Zeros behind the last token, as masked values are zero and so is the activation of zero.
    inside = (h < width) & (word[None, :] < lines * 4)
    tl.store(qt_ptr + h.to(tl.int64) * (lines * 4) + word[None, :], tl.trans(words), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _activation_values_kernel(
    kept_ptr, kept_s_ptr, h_ptr, tokens, width,
    ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_T, BLOCK_H] of h. Grid: blocks of tokens, blocks of columns."""
    PARTS: tl.constexpr = 2 if GATED else 1
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h0 = tl.program_id(1) * BLOCK_H
    x = _restore(kept_ptr, kept_s_ptr, t, h0, 0, PARTS, tokens, width, GROUP, BLOCK_H)
    y, _ = value_and_slope(x, ACT)
    if GATED:
        y *= _restore(kept_ptr, kept_s_ptr, t, h0, 1, PARTS, tokens, width, GROUP, BLOCK_H)
    _store(to_float(y, h_ptr.dtype.element_ty), h_ptr, t[:, None] * width, h0, t[:, None] < tokens, width)


def _plan(width: int, group_size: int, codes: bool, rows: Rows) -> tuple[dict[str, int], dict[str, int], int]:
    """Tiles, launch options, and how many programs share a row.

    A kernel that makes codes sees whole rows. Tiles of one row are as wide as ``rows`` has them or as the largest
    power of two in the row; what is left goes into a narrower one: with I = 9000 a program holds 2 tiles of 4096
    columns and one of 1024.
    """
    smallest = max(group_size, min(256, triton.next_power_of_2(width)), 16)
    if not codes:
        block_h = max(smallest, min(1024, triton.next_power_of_2(width)))
        tiles = {"HELD": 0, "TAIL": 0, "BLOCK_T": TILE // block_h, "BLOCK_H": block_h}
        return tiles, {"num_warps": 8}, triton.cdiv(width, block_h)
    wide = 2 if width > rows.block * rows.most else 1
    block_h = max(smallest, min(rows.block * wide, triton.next_power_of_2(width + 1) // 2))
    held, rest = divmod(width, block_h)
    tail = max(smallest, triton.next_power_of_2(rest)) if rest else 0
    if tail == block_h or not held:
        held, tail = held + 1, 0
    if held + (tail > 0) > rows.most:
        block_h, held, tail = min(block_h, 2048), 0, 0
    block_t = 1 if tail else max(1, 1024 // block_h)
    if held + (tail > 0) > 1:
        warps, registers = rows.warps * wide, rows.registers if held + (tail > 0) <= 3 else rows.wide_registers
        options = {"num_warps": warps, "maxnreg": min(registers, REGISTERS // (32 * warps))}
    else:
        options = {"num_warps": max(1, block_t * block_h // 256)}
    return {"HELD": held, "TAIL": tail, "BLOCK_T": block_t, "BLOCK_H": block_h}, options, 1


def activation(x, up, act, group_size, scale_dtype, values, codes):
    tokens, width = x.shape
    parts, device = 1 if up is None else 2, x.device
    x = x if x.stride(1) == 1 else x.contiguous()
    up = x if up is None else up if up.stride(1) == 1 else up.contiguous()
    fp8 = torch.float8_e4m3fn
    h = torch.empty((tokens, width), dtype=x.dtype, device=device) if values else nothing(x.dtype, device)
    h_q, h_s = nothing(fp8, device), nothing(torch.float32, device)
    kept_q, kept_s = nothing(fp8, device, 1), nothing(scale_dtype, device, 1)
    if codes:
        h_q = torch.empty((tokens, width), dtype=fp8, device=device)
        h_s = torch.empty((tokens, 1), dtype=torch.float32, device=device)
    if group_size:
        groups = triton.cdiv(width, group_size)
        kept_q = torch.empty((tokens, parts * width), dtype=fp8, device=device)
        kept_s = torch.empty((tokens, parts * groups), dtype=scale_dtype, device=device)
    if tokens:
        tiles, options, columns = _plan(width, group_size, codes, FORWARD)
        _activation_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]), columns)](
            x, up, h, h_q, h_s, kept_q, kept_s, tokens, width, x.stride(0), up.stride(0),
            ACT=act, GATED=parts == 2, GROUP=group_size, VALUES=values, CODES=codes,
            AHEAD=AHEAD, **tiles, **options,
        )  # fmt: skip
    return h, h_q, h_s, kept_q, kept_s


def activation_backward(dh, kept_q, kept_s, act, gated, group_size, codes, code_dtype, out_dtype):
    tokens, width = dh.shape
    device = dh.device
    dh = dh if dh.stride(1) == 1 else dh.contiguous()
    d, d_q, d_s = nothing(out_dtype, device), nothing(code_dtype, device), nothing(torch.float32, device)
    if codes:
        d_q = torch.empty(kept_q.shape, dtype=code_dtype, device=device)
        d_s = torch.empty((tokens, 1), dtype=torch.float32, device=device)
    else:
        d = torch.empty(kept_q.shape, dtype=out_dtype, device=device)
    if tokens:
        tiles, options, columns = _plan(
            width, group_size, codes, BACKWARD if gated or width > PLAIN_WIDTH else PLAIN_BACKWARD
        )
        _activation_backward_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]), columns)](
            dh, kept_q.contiguous(), kept_s.contiguous(), d, d_q, d_s, tokens, width, dh.stride(0),
            ACT=act, GATED=gated, GROUP=group_size, CODES=codes, EMAX=MAX_EXPONENT[code_dtype],
            **tiles, **options,
        )  # fmt: skip
    return d, d_q, d_s


def activation_transposed(kept_q, kept_s, scale, act, gated, group_size):
    tokens, width = kept_q.shape[0], kept_q.shape[1] // (2 if gated else 1)
    padded = round_up(tokens, 16)
    h_qt = torch.empty((width, padded), dtype=kept_q.dtype, device=kept_q.device)
    if tokens:
        block_t, block_h, warps = GELU_TANH_TILE if act == "gelu_tanh" and not gated else TRANSPOSED_TILE
        block_h = max(block_h, group_size)
        _activation_transposed_kernel[(triton.cdiv(padded, block_t), triton.cdiv(width, block_h))](
            kept_q.contiguous(), kept_s.contiguous(), scale, h_qt.view(torch.int32), tokens, width, padded // 16,
            ACT=act, GATED=gated, GROUP=group_size, BLOCK_T=block_t, BLOCK_H=block_h, num_warps=warps,
        )  # fmt: skip
    return h_qt


def activation_values(kept_q, kept_s, act, gated, group_size, dtype):
    tokens, width = kept_q.shape[0], kept_q.shape[1] // (2 if gated else 1)
    h = torch.empty((tokens, width), dtype=dtype, device=kept_q.device)
    if tokens:
        tiles, options, columns = _plan(width, group_size, False, FORWARD)
        _activation_values_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]), columns)](
            kept_q.contiguous(), kept_s.contiguous(), h, tokens, width,
            ACT=act, GATED=gated, GROUP=group_size, BLOCK_T=tiles["BLOCK_T"], BLOCK_H=tiles["BLOCK_H"], **options,
        )  # fmt: skip
    return h

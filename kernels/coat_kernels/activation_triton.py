"""Triton twins of activation.py: each reads its inputs from memory once; what it reads again is in the cache.

The sigmoid is ``1 / (1 + exp2(-z * log2(e)))`` in float32. Its relative error is at most 2**-20 + |z| * 2**-23 (of
exp2 and the division, and of the rounded exponent), until it is zero below z = -88: 2**-16 in the worst place, where
half a step of BF16 is 2**-9 at least. It is exactly 1 from z = 18 on, so no rounding is left over in a slope far out.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .formats import MAX_EXPONENT, round_up
from .quantize_triton import nothing
from .tiles_triton import (
    INTERPRETED,
    magnitude_bits,
    quantize_groups,
    scale_from_bits,
    scale_groups,
    to_float,
    to_fp8,
    to_fp8_bits,
)

WIDEST_TILE = 4096  # columns
TILE = 4096  # values of a program that need not see a whole row
# Tiles of a row that wait in registers for its scale; rows of more are read twice. The fastest of a sweep on an H200.
FORWARD_HELD, BACKWARD_HELD = 3, 5


@triton.jit
def _sigmoid(z):
    """``1 / (1 + exp(-z))`` of float32 ``z``."""
    e = 1.0 + tl.exp2(-1.4426950408889634 * z)
    if INTERPRETED:
        return 1.0 / e
    else:  # without the care for denominators above 2**126, for which this is 0
        return libdevice.fast_dividef(1.0, e)


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
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * tl.exp2(-0.7213475204444817 * x * x) * 0.3989422804014327
    else:
        if ACT == "quick_gelu":
            z = 1.702 * x
            dz = 1.702
        elif ACT == "gelu_tanh":
            near = tl.minimum(tl.maximum(x, -16.0), 16.0)
            square = near * near
            z = near * (1.5957691216057308 + 0.07135481282553595 * square)  # sqrt(8 / pi), and 0.044715 of it
            dz = 1.5957691216057308 + 0.21406443847660785 * square
        else:
            z = x
            dz = 1.0
        s = _sigmoid(z)
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
    tl.store(s_ptr + (t * parts + part)[:, None] * groups + g[None, :], s, mask=inside & (g[None, :] < groups))


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
    x = x.to(tl.float32)
    y, _ = value_and_slope(x, ACT)
    if GROUP > 0:
        _keep(x, kept_ptr, kept_s_ptr, t, h0, 0, PARTS, tokens, width, GROUP)
    if GATED:
        up = up.to(tl.float32)
        y *= up
        if GROUP > 0:
            _keep(up, kept_ptr, kept_s_ptr, t, h0, 1, PARTS, tokens, width, GROUP)
    return to_float(y, DTYPE)


@triton.jit
def _store(y, y_ptr, row, h0, here, width):
    """Write the columns from h0 on of a tile's rows."""
    h = h0 + tl.arange(0, y.shape[1])[None, :]
    tl.store(y_ptr + row + h, y, mask=here & (h < width))


@triton.jit(do_not_specialize=["tokens"])
def _activation_kernel(
    x_ptr, up_ptr, h_ptr, hq_ptr, hs_ptr, kept_ptr, kept_s_ptr, tokens, width, stride_x, stride_up,
    ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, VALUES: tl.constexpr, CODES: tl.constexpr,
    HELD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """h and the kept groups of BLOCK_T tokens: one tile, or with CODES whole rows, tile by tile, and then the codes.

    The HELD tiles of a row wait for its scale in registers; with HELD = 0 they are computed again, from what the cache
    still has. Grid: blocks of tokens, and without CODES blocks of columns.
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
        top = tl.zeros([BLOCK_T, BLOCK_H], tl.int32)
        loaded = ()
        for i in tl.static_range(HELD):  # all before the first store, behind which no load may move
            pair = _load(x_ptr, up_ptr, t, i * BLOCK_H, tokens, width, stride_x, stride_up, GATED, BLOCK_H)
            loaded = loaded + (pair[0], pair[1])
        held = ()
        for i in tl.static_range(HELD):
            y = _forward(
                loaded[2 * i], loaded[2 * i + 1], kept_ptr, kept_s_ptr, t, i * BLOCK_H, tokens, width,
                ACT, GATED, GROUP,
            )  # fmt: skip
            if VALUES:
                _store(y, h_ptr, row, i * BLOCK_H, here, width)
            top = tl.maximum(top, magnitude_bits(y.to(tl.float32)))
            held = held + (y,)
        if HELD == 0:
            for h0 in tl.range(0, width, BLOCK_H):
                x, up = _load(x_ptr, up_ptr, t, h0, tokens, width, stride_x, stride_up, GATED, BLOCK_H)
                y = _forward(x, up, kept_ptr, kept_s_ptr, t, h0, tokens, width, ACT, GATED, GROUP)
                if VALUES:
                    _store(y, h_ptr, row, h0, here, width)
                top = tl.maximum(top, magnitude_bits(y.to(tl.float32)))
        s = scale_from_bits(tl.max(top, axis=1), 8, True)
        tl.store(hs_ptr + t, s, mask=t < tokens)
        inverse = tl.div_rn(1.0, s)[:, None]
        for i in tl.static_range(HELD):
            _store(to_fp8(held[i].to(tl.float32) * inverse, 8), hq_ptr, row, i * BLOCK_H, here, width)
        if HELD == 0:
            for h0 in tl.range(0, width, BLOCK_H):
                x, up = _load(x_ptr, up_ptr, t, h0, tokens, width, stride_x, stride_up, GATED, BLOCK_H)
                y = _forward(x, up, kept_ptr, kept_s_ptr, t, h0, tokens, width, ACT, GATED, 0)
                _store(to_fp8(y.to(tl.float32) * inverse, 8), hq_ptr, row, h0, here, width)


@triton.jit
def _backward(
    dh_ptr, kept_ptr, kept_s_ptr, t, h0, tokens, width, stride,
    ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradients of x and up of a tile that begins in column h0, rounded to DTYPE; twice that of x without up."""
    PARTS: tl.constexpr = 2 if GATED else 1
    h = h0 + tl.arange(0, BLOCK_H)[None, :]
    dh = tl.load(dh_ptr + t[:, None] * stride + h, mask=(t[:, None] < tokens) & (h < width), other=0.0).to(tl.float32)
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
    top = tl.maximum(top, magnitude_bits(d_x.to(tl.float32)))
    return tl.maximum(top, magnitude_bits(d_up.to(tl.float32))) if GATED else top


@triton.jit(do_not_specialize=["tokens"])
def _activation_backward_kernel(
    dh_ptr, kept_ptr, kept_s_ptr, d_ptr, dq_ptr, ds_ptr, tokens, width, stride,
    ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, CODES: tl.constexpr, EMAX: tl.constexpr,
    HELD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
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
        top = tl.zeros([BLOCK_T, BLOCK_H], tl.int32)
        held = ()
        for i in tl.static_range(HELD):
            d_x, d_up = _backward(
                dh_ptr, kept_ptr, kept_s_ptr, t, i * BLOCK_H, tokens, width, stride, ACT, GATED, GROUP, DTYPE, BLOCK_H
            )
            top = _larger(top, d_x, d_up, GATED)
            held = held + (d_x, d_up)
        if HELD == 0:
            for h0 in tl.range(0, width, BLOCK_H):
                d_x, d_up = _backward(
                    dh_ptr, kept_ptr, kept_s_ptr, t, h0, tokens, width, stride, ACT, GATED, GROUP, DTYPE, BLOCK_H
                )
                top = _larger(top, d_x, d_up, GATED)
        s = scale_from_bits(tl.max(top, axis=1), EMAX, True)
        tl.store(ds_ptr + t, s, mask=t < tokens)
        inverse = tl.div_rn(1.0, s)[:, None]
        for i in tl.static_range(HELD):
            q_x = to_fp8(held[2 * i].to(tl.float32) * inverse, EMAX)
            q_up = to_fp8(held[2 * i + 1].to(tl.float32) * inverse, EMAX)
            _store_both(q_x, q_up, dq_ptr, row, i * BLOCK_H, here, width, GATED)
        if HELD == 0:
            for h0 in tl.range(0, width, BLOCK_H):
                d_x, d_up = _backward(
                    dh_ptr, kept_ptr, kept_s_ptr, t, h0, tokens, width, stride, ACT, GATED, GROUP, DTYPE, BLOCK_H
                )
                q_x = to_fp8(d_x.to(tl.float32) * inverse, EMAX)
                q_up = to_fp8(d_up.to(tl.float32) * inverse, EMAX)
                _store_both(q_x, q_up, dq_ptr, row, h0, here, width, GATED)


@triton.jit(do_not_specialize=["tokens"])
def _activation_again_kernel(
    kept_ptr, kept_s_ptr, scale_ptr, out_ptr, tokens, width, columns,
    ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_T, BLOCK_H] of h: its codes at a scale, written transposed to [I, columns], or without a scale
    its values as they stand. Grid: blocks of tokens, blocks of columns."""
    PARTS: tl.constexpr = 2 if GATED else 1
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h0 = tl.program_id(1) * BLOCK_H
    x = _restore(kept_ptr, kept_s_ptr, t, h0, 0, PARTS, tokens, width, GROUP, BLOCK_H)
    y, _ = value_and_slope(x, ACT)
    if GATED:
        y *= _restore(kept_ptr, kept_s_ptr, t, h0, 1, PARTS, tokens, width, GROUP, BLOCK_H)
    if scale_ptr is None:
        _store(to_float(y, out_ptr.dtype.element_ty), out_ptr, t[:, None] * width, h0, t[:, None] < tokens, width)
    else:
        y *= tl.div_rn(1.0, tl.load(scale_ptr))
        bits = to_fp8_bits(y, 8)
        if INTERPRETED:  # where the bits of a NaN are a number's; a scale that is given cannot carry a group's NaN
            bits = tl.where(y == y, bits, 0x7F)
        h = h0 + tl.arange(0, BLOCK_H)[:, None]
        # Zeros behind the last token, as masked values are zero and so is the activation of zero.
        inside = (h < width) & (t[None, :] < columns)
        tl.store(out_ptr + h.to(tl.int64) * columns + t[None, :], tl.trans(bits), mask=inside)


def _tile(width: int, group_size: int, codes: bool, most_held: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, how many tiles of a row are held, and warps.

    A program that makes codes sees whole rows: in the widest tiles that leave at most a fifth of their columns idle,
    with one 16-byte access of BF16 for each thread. Of rows that are not held, more and narrower ones are in flight,
    as each waits at a barrier. With I = 11008 a program holds 3 tiles of 4096, with I = 4096 one.
    """
    smallest = max(group_size, min(256, triton.next_power_of_2(width)), 16)
    block_h = WIDEST_TILE
    while block_h > smallest and round_up(width, block_h) * 5 > width * 6:
        block_h //= 2
    if not codes:
        block_h = min(block_h, 1024)
        return TILE // block_h, block_h, 0, 8
    held = triton.cdiv(width, block_h)
    if held > most_held:
        block_h, held = min(block_h, 2048), 0
    block_t = max(1, 1024 // block_h)
    return block_t, block_h, held, max(1, block_t * block_h // 256)


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
        block_t, block_h, held, warps = _tile(width, group_size, codes, FORWARD_HELD)
        columns = 1 if codes else triton.cdiv(width, block_h)
        if held > 1:  # few warps with 16 values to a thread, and registers for two programs a processor
            options = {"num_warps": warps // 2, "maxnreg": 128}
        else:
            options = {"num_warps": warps}
        _activation_kernel[(triton.cdiv(tokens, block_t), columns)](
            x, up, h, h_q, h_s, kept_q, kept_s, tokens, width, x.stride(0), up.stride(0),
            ACT=act, GATED=parts == 2, GROUP=group_size, VALUES=values, CODES=codes,
            HELD=held, BLOCK_T=block_t, BLOCK_H=block_h, **options,
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
        block_t, block_h, held, warps = _tile(width, group_size, codes, BACKWARD_HELD)
        columns = 1 if codes else triton.cdiv(width, block_h)
        _activation_backward_kernel[(triton.cdiv(tokens, block_t), columns)](
            dh, kept_q.contiguous(), kept_s.contiguous(), d, d_q, d_s, tokens, width, dh.stride(0),
            ACT=act, GATED=gated, GROUP=group_size, CODES=codes, EMAX=MAX_EXPONENT[code_dtype],
            HELD=held, BLOCK_T=block_t, BLOCK_H=block_h, num_warps=warps,
        )  # fmt: skip
    return d, d_q, d_s


def activation_transposed(kept_q, kept_s, scale, act, gated, group_size):
    tokens, width = kept_q.shape[0], kept_q.shape[1] // (2 if gated else 1)
    padded = round_up(tokens, 16)
    h_qt = torch.empty((width, padded), dtype=kept_q.dtype, device=kept_q.device)
    if tokens:
        block_t, block_h = 64, max(64, group_size)
        _activation_again_kernel[(triton.cdiv(padded, block_t), triton.cdiv(width, block_h))](
            kept_q.contiguous(), kept_s.contiguous(), scale, h_qt.view(torch.uint8), tokens, width, padded,
            ACT=act, GATED=gated, GROUP=group_size, BLOCK_T=block_t, BLOCK_H=block_h, num_warps=block_h // 16,
        )  # fmt: skip
    return h_qt


def activation_values(kept_q, kept_s, act, gated, group_size, dtype):
    tokens, width = kept_q.shape[0], kept_q.shape[1] // (2 if gated else 1)
    h = torch.empty((tokens, width), dtype=dtype, device=kept_q.device)
    if tokens:
        block_t, block_h, _, warps = _tile(width, group_size, False, 0)
        _activation_again_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(width, block_h))](
            kept_q.contiguous(), kept_s.contiguous(), None, h, tokens, width, width,
            ACT=act, GATED=gated, GROUP=group_size, BLOCK_T=block_t, BLOCK_H=block_h, num_warps=warps,
        )  # fmt: skip
    return h

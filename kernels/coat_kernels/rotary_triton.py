"""Triton twin of rotary.py: one launch reads q and k once, and cos and sin once for all heads of a token."""

import triton
import triton.language as tl

from .quantize_triton import ceil_div, next_power_of_2
from .rotary import empty_rotated
from .tiles_triton import to_float


@triton.jit
def _rotate(
    x_ptr, y_ptr, cos_ptr, sin_ptr, block, length, heads, stride_b, stride_n, stride_s, cos_b, cos_s,
    INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All heads of the ``block``-th BLOCK_S tokens; both halves of a head in pieces [S, N, D / 2] of BLOCK_H."""
    blocks = tl.cdiv(length, BLOCK_S)
    b = (block // blocks).to(tl.int64)
    s = (block % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None, None]
    d = tl.arange(0, BLOCK_H)[None, None, :]
    here = (s < length) & (d < HALF)
    angle = b * cos_b + s.to(tl.int64) * cos_s + d
    cos1 = tl.load(cos_ptr + angle, mask=here, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + angle + HALF, mask=here, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + angle, mask=here, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + angle + HALF, mask=here, other=0.0).to(tl.float32)
    if INVERSE:
        sin1, sin2 = -sin2, -sin1
    x_row = x_ptr + b * stride_b + s.to(tl.int64) * stride_s + d
    y_row = y_ptr + (b * length + s) * heads * (2 * HALF) + d
    for n0 in tl.range(0, heads, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)[None, :, None]
        inside = here & (n < heads)
        x = x_row + n.to(tl.int64) * stride_n
        x1 = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
        y = y_row + n * (2 * HALF)
        tl.store(y, to_float(x1 * cos1 - x2 * sin1, y_ptr.dtype.element_ty), mask=inside)
        tl.store(y + HALF, to_float(x2 * cos2 + x1 * sin2, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "length"])
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, yq_ptr, yk_ptr, batch, length, heads_q, heads_k,
    q_b, q_n, q_s, k_b, k_n, k_s, cos_b, cos_s,
    INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK_SQ: tl.constexpr, BLOCK_NQ: tl.constexpr,
    BLOCK_SK: tl.constexpr, BLOCK_NK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A block of tokens of q or of k. Grid: batch * (length / BLOCK_SQ + length / BLOCK_SK); first those of q."""
    block = tl.program_id(0)
    first_k = batch * tl.cdiv(length, BLOCK_SQ)
    if block < first_k:
        _rotate(
            q_ptr, yq_ptr, cos_ptr, sin_ptr, block, length, heads_q, q_b, q_n, q_s, cos_b, cos_s,
            INVERSE, HALF, BLOCK_SQ, BLOCK_NQ, BLOCK_H,
        )  # fmt: skip
    else:
        _rotate(
            k_ptr, yk_ptr, cos_ptr, sin_ptr, block - first_k, length, heads_k, k_b, k_n, k_s, cos_b, cos_s,
            INVERSE, HALF, BLOCK_SK, BLOCK_NK, BLOCK_H,
        )  # fmt: skip


PAIRS = 2048  # pairs of values in a piece: 16 bytes of each half, once for each of 256 threads


def _block(heads: int, block_h: int) -> tuple[int, int]:
    """Tokens and heads of a piece."""
    block_n = min(next_power_of_2(heads), max(1, PAIRS // block_h))
    return max(1, PAIRS // (block_h * block_n)), block_n


def rotary(q, k, cos, sin, inverse):
    y_q, y_k = empty_rotated(q), empty_rotated(k)
    batch, heads, length, width = q.shape
    heads_k = k.shape[1]
    if batch * length * width * (heads + heads_k) == 0:
        return y_q, y_k
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    block_h = next_power_of_2(width // 2)
    (block_sq, block_nq), (block_sk, block_nk) = _block(heads, block_h), _block(heads_k, block_h)
    # A thread that rotates several tokens keeps the angles of each: four warps would take twice the registers.
    warps = 4 if block_sq == block_sk == 1 else 8
    _rotary_kernel[(batch * (ceil_div(length, block_sq) + ceil_div(length, block_sk)),)](
        q, k, cos, sin, y_q, y_k, batch, length, heads, heads_k,
        *q.stride()[:3], *k.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        INVERSE=inverse, HALF=width // 2, BLOCK_SQ=block_sq, BLOCK_NQ=block_nq, BLOCK_SK=block_sk, BLOCK_NK=block_nk,
        BLOCK_H=block_h, num_warps=warps,
    )  # fmt: skip
    return y_q, y_k

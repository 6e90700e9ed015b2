"""Rotary position embedding of queries and keys, both in one launch.

    y = x * cos + rotate_half(x) * sin,    rotate_half([a, b]) = [-b, a]

A model rotates q and k after their projection, which a merged linear writes as one [B, S, (N + 2 Nk) * D] matrix: q
and k are strided views of it and are read where they stand. The results lie in memory token by token, [B, S, N, D], as
linears and flash attention have them. Everything is computed in float32 and rounded once; eager BF16 code rounds three
times.

The map is linear: its gradient is the transposed map, applied to dy, and nothing but cos and sin is kept.
"""

import torch

from ._registry import register

SOURCE_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def empty_rotated(x: torch.Tensor) -> torch.Tensor:
    """An empty [B, N, S, D] of the dtype of ``x`` that lies in memory as [B, S, N, D]."""
    batch, heads, length, width = x.shape
    strides = (length * heads * width, width, heads * width, 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _check_rotary(q, k, cos, sin):
    for name, x in (("q", q), ("k", k)):
        if x.dtype not in SOURCE_DTYPES or x.dtype != q.dtype or x.dim() != 4 or x.shape[3] % 2:
            raise TypeError(
                f"rotary: {name} is {x.dtype} {list(x.shape)}, expected [B, N, S, D] with an even D, q and k both of "
                f"one of {', '.join(map(str, SOURCE_DTYPES))}"
            )
    batch, _, length, width = q.shape
    if k.shape[0] != batch or k.shape[2:] != q.shape[2:]:
        raise ValueError(
            f"rotary: k is {list(k.shape)}, expected [{batch}, Nk, {length}, {width}] as q {list(q.shape)}"
        )
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype not in SOURCE_DTYPES or x.dtype != cos.dtype:
            raise TypeError(f"rotary: {name} is {x.dtype}, expected cos and sin of one floating point dtype")
        if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1:] != q.shape[2:]:
            raise ValueError(
                f"rotary: {name} is {list(x.shape)}, expected [{batch} or 1, {length}, {width}] for q "
                f"{list(q.shape)}; pass the part of the heads that is rotated where a model rotates only a part"
            )


def _rotated_ref(x, cos, sin, inverse):
    x_f, cos, sin = x.float(), cos.float()[:, None], sin.float()[:, None]
    if inverse:
        first, second = (x_f * sin).chunk(2, dim=3)
        y = x_f * cos + torch.cat((second, -first), dim=3)
    else:
        first, second = x_f.chunk(2, dim=3)
        y = x_f * cos + torch.cat((-second, first), dim=3) * sin
    return empty_rotated(x).copy_(y)


def rotary_ref(q, k, cos, sin, inverse):
    return _rotated_ref(q, cos, sin, inverse), _rotated_ref(k, cos, sin, inverse)


_rotary = register(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    rotary_ref,
    lambda q, k, cos, sin, inverse: (empty_rotated(q), empty_rotated(k)),
    "rotary_triton:rotary",
)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k: ``y = x * cos + rotate_half(x) * sin`` in float32, rounded once.

    Args:
        q: BF16, FP32 or FP16 [B, N, S, D], D even. Any strides; copied first unless D has stride 1.
        k: As q, [B, Nk, S, D].
        cos: Cosines [B or 1, S, D], BF16, FP32 or FP16.
        sin: Sines, likewise.
        inverse: Apply the transposed map: q and k are the gradients of the results, and the gradients of q and k come
            back. Where cos and sin belong to angles, that is also the rotation back.

    Returns:
        The rotated q and k, [B, N, S, D] and [B, Nk, S, D], in new memory that lies as [B, S, N, D].

    Raises:
        TypeError, ValueError: For dtypes and shapes that do not fit; the message names them.
    """
    _check_rotary(q, k, cos, sin)
    return _rotary(q, k, cos, sin, inverse)

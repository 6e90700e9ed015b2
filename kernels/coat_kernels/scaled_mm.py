"""The FP8 matrix product of a linear layer: ``y = (a_q @ b_q.T) * a_s * b_s.T + bias``, both operands row by row along
K.

One op serves the three products of a layer, because each can be written with the reduced dimension last:

    forward           y  [T, N] = x  [T, K]  @ w  [N, K].T
    input gradient    dx [T, K] = dy [T, N]  @ wt [K, N].T
    weight gradient   dw [N, K] = dyt [N, T] @ xt [K, T].T

Tensor cores multiply exactly and add in a reduced float32; ``fast_accum`` leaves the whole sum there, otherwise every
128 products are added up in true float32.
"""

import torch

from ._registry import register
from .formats import FP8_DTYPES

OUT_DTYPES = (torch.bfloat16, torch.float32)
ALIGN = 16  # bytes: memory for a result begins at a multiple of them


def same_depth(a_q: torch.Tensor, b_q: torch.Tensor, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands with the same K, a multiple of ``multiple``: zeros are appended to what is shorter."""
    depth = -(-max(a_q.shape[1], b_q.shape[1]) // multiple) * multiple

    def pad(codes):
        missing = depth - codes.shape[1]
        return (
            codes if not missing else torch.nn.functional.pad(codes.view(torch.uint8), (0, missing)).view(codes.dtype)
        )

    return pad(a_q), pad(b_q)


def scaled_mm_ref(a_q, b_q, a_s, b_s, bias, out_dtype, fast_accum):
    a_q, b_q = same_depth(a_q, b_q)
    y = (a_q.float() @ b_q.float().t()) * a_s * b_s.t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


def scaled_mm_into_ref(a_q, b_q, a_s, b_s, bias, fast_accum, out):
    out.copy_(scaled_mm_ref(a_q, b_q, a_s, b_s, bias, out.dtype, fast_accum))


_scaled_mm = register(
    "scaled_mm(Tensor a_q, Tensor b_q, Tensor a_s, Tensor b_s, Tensor? bias, ScalarType out_dtype, bool fast_accum) "
    "-> Tensor",
    scaled_mm_ref,
    lambda a_q, b_q, a_s, b_s, bias, out_dtype, fast_accum: a_q.new_empty(
        (a_q.shape[0], b_q.shape[0]), dtype=out_dtype
    ),
    "scaled_mm_triton:scaled_mm",
)
_scaled_mm_into = register(
    "scaled_mm_into(Tensor a_q, Tensor b_q, Tensor a_s, Tensor b_s, Tensor? bias, bool fast_accum, Tensor(a!) out) "
    "-> ()",
    scaled_mm_into_ref,
    lambda a_q, b_q, a_s, b_s, bias, fast_accum, out: None,
    "scaled_mm_triton:scaled_mm_into",
)


def scaled_mm(
    a_q: torch.Tensor,
    b_q: torch.Tensor,
    a_s: torch.Tensor,
    b_s: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply FP8 codes: ``y [M, N] = (a_q [M, K] @ b_q [N, K].T) * a_s * b_s.T + bias``.

    On a GPU this runs cuBLASLt (through ``torch._scaled_mm``) or a persistent Triton kernel, whichever the recorded
    measurement found faster near this shape (scaled_mm_choice.json); the environment variable ``COAT_SCALED_MM`` set
    to ``cublaslt`` or ``triton`` overrides it.

    Args:
        a_q: FP8 codes [M, K], any mix of E4M3 and E5M2 with ``b_q`` but two E5M2.
        b_q: FP8 codes [N, K]. Where the two differ in K, the shorter one is meant to end in zeros.
        a_s: float32 scales [M, 1] or [1, 1].
        b_s: float32 scales [N, 1] or [1, 1].
        bias: BF16 or FP32 values [N], added after scaling.
        out_dtype: ``torch.bfloat16`` or ``torch.float32``.
        fast_accum: Sum in the tensor core's own accumulator. Faster, by 10 % with scales per row; meant for the
            forward product and for short sums.
        out: Where to write the product: [M, N] in ``out_dtype``, contiguous, at a multiple of :data:`ALIGN` bytes.

    Returns:
        [M, N] in ``out_dtype``; ``out``, where it is given.
    """
    for name, codes, scale in (("a", a_q, a_s), ("b", b_q, b_s)):
        if codes.dtype not in FP8_DTYPES or codes.dim() != 2:
            raise TypeError(
                f"scaled_mm: {name}_q is {codes.dtype} {list(codes.shape)}, expected FP8 codes of two dimensions"
            )
        if scale.dtype != torch.float32 or tuple(scale.shape) not in ((1, 1), (codes.shape[0], 1)):
            raise ValueError(
                f"scaled_mm: {name}_s is {scale.dtype} {list(scale.shape)}, expected torch.float32 [1, 1] or "
                f"[{codes.shape[0]}, 1]"
            )
    if a_q.dtype == b_q.dtype == torch.float8_e5m2:
        raise TypeError("scaled_mm: both operands are torch.float8_e5m2; tensor cores want at least one E4M3")
    if bias is not None and tuple(bias.shape) != (b_q.shape[0],):
        raise ValueError(f"scaled_mm: bias is {list(bias.shape)}, expected [{b_q.shape[0]}]")
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"scaled_mm: out_dtype is {out_dtype}, expected torch.bfloat16 or torch.float32")
    if out is None:
        return _scaled_mm(a_q, b_q, a_s, b_s, bias, out_dtype, fast_accum)
    shape = (a_q.shape[0], b_q.shape[0])
    offset = out.data_ptr() % ALIGN
    if tuple(out.shape) != shape or out.dtype != out_dtype or not out.is_contiguous() or offset:
        raise ValueError(
            f"scaled_mm: out is {out.dtype} {list(out.shape)} with strides {list(out.stride())}, {offset} bytes "
            f"behind a multiple of {ALIGN}; expected contiguous {out_dtype} {list(shape)} at such a multiple"
        )
    _scaled_mm_into(a_q, b_q, a_s, b_s, bias, fast_accum, out)
    return out

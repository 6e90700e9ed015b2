"""Triton twin of average.py: each value is read once from every row, and written once."""

import triton
import triton.language as tl

from .quantize_triton import ceil_div
from .tiles_triton import to_float

BLOCK = 4096


@triton.jit
def _average_kernel(own_ptr, others_ptr, n, stride, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK values. Grid: n / BLOCK. That n is a multiple of 16, as it mostly is, lets 16 bytes be read at once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    total = tl.load(own_ptr + i, mask=here, other=0.0).to(tl.float32)
    row_ptr = others_ptr + i
    for _ in tl.static_range(ROWS):
        total += tl.load(row_ptr, mask=here, other=0.0).to(tl.float32)
        row_ptr += stride
    tl.store(own_ptr + i, to_float(total * scale, own_ptr.dtype.element_ty), mask=here)


def average(own, others):
    n, rows = own.shape[0], others.shape[0]
    if n:
        _average_kernel[(ceil_div(n, BLOCK),)](
            own, others, n, others.stride(0), 1.0 / (1 + rows), ROWS=rows, BLOCK=BLOCK, num_warps=8
        )

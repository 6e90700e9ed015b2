"""The FP8 matrix product on a GPU: a persistent Triton kernel, cuBLASLt, and the recorded choice between them."""

import functools
import json
import math
import os
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .scaled_mm import same_depth
from .tiles_triton import to_float

BACKENDS = ("cublaslt", "triton")
CHOICES = Path(__file__).with_name("scaled_mm_choice.json")


@triton.jit
def _scaled_mm_kernel(
    a_desc, b_desc, y_desc, y_ptr, a_s_ptr, b_s_ptr, bias_ptr, M, N, K, PROGRAMS,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, FAST: tl.constexpr, Y_DESC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = (a @ b.T) * a_s * b_s.T + bias. Each program walks over tiles [BLOCK_M, BLOCK_N], PROGRAMS apart.

    Tiles are visited in columns of GROUP_M rows, so that the operands of neighbours stay in the L2 cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        group = tile // (GROUP_M * tiles_n)
        rows_here = min(tiles_m - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * tiles_n)
        m0 = (group * GROUP_M + within % rows_here) * BLOCK_M
        n0 = (within // rows_here) * BLOCK_N

        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
            a = a_desc.load([m0, k * BLOCK_K])
            b = b_desc.load([n0, k * BLOCK_K])
            if FAST:
                y = tl.dot(a, b.T, y)
            else:
                y = tl.dot(a, b.T, y, max_num_imprecise_acc=128)

        m = m0 + tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        if A_ROWS:
            y *= tl.load(a_s_ptr + m, mask=m < M, other=0.0)[:, None]
        else:
            y *= tl.load(a_s_ptr)
        if B_ROWS:
            y *= tl.load(b_s_ptr + n, mask=n < N, other=0.0)[None, :]
        else:
            y *= tl.load(b_s_ptr)
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        y_out = to_float(y, y_ptr.dtype.element_ty)
        if Y_DESC:
            y_desc.store([m0, n0], y_out)
        else:
            address = m.to(tl.int64)[:, None] * N + n[None, :]
            tl.store(y_ptr + address, y_out, mask=(m[:, None] < M) & (n[None, :] < N))


BLOCK_K = 128
BARRIERS = 1024  # bytes of shared memory that pipelines use beside their tiles; more than was seen


def tile_of(m: int, n: int, fast_accum: bool, y_bytes: int, shared: int) -> dict[str, int]:
    """Block sizes: the widest tile that fits the registers and still gives every multiprocessor work.

    Args:
        m, n: Size of the product.
        fast_accum: Exact sums hold two accumulators.
        y_bytes: Bytes of one of its values.
        shared: Bytes of shared memory that a program may have. It holds the tile of the product and, for each stage,
            tiles of both operands.
    """

    def stages(block_m, block_n):  # two fit into the 99 KiB of Ada, where the product lies in the operands' place
        return max(2, (shared - BARRIERS - block_m * block_n * y_bytes) // ((block_m + block_n) * BLOCK_K))

    if m <= 64:
        return dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=min(4, stages(64, 128)))
    if n <= 128 or m * n < 132 * 128 * 256 or not fast_accum or stages(128, 256) < 3:
        return dict(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=min(4, stages(128, 128)))
    return dict(BLOCK_M=128, BLOCK_N=256, num_warps=8, num_stages=3)


def by_triton(a_q, b_q, a_s, b_s, bias, out_dtype, fast_accum, out=None, tile: dict[str, int] | None = None):
    """The persistent kernel. Any M and N; K is padded to the 16 bytes that a tensor descriptor asks for."""
    a_q, b_q = (codes.contiguous() for codes in same_depth(a_q, b_q, 16))
    (m, k), n = a_q.shape, b_q.shape[0]
    y = torch.empty(m, n, dtype=out_dtype, device=a_q.device) if out is None else out
    if m == 0 or n == 0:
        return y
    if k == 0:
        return y.copy_(torch.zeros_like(y) if bias is None else bias.expand_as(y))
    tile = dict(tile or tile_of(m, n, fast_accum, y.element_size(), shared_memory(a_q.device)))
    block_m, block_n = tile.pop("BLOCK_M"), tile.pop("BLOCK_N")
    aligned = n * y.element_size() % 16 == 0
    programs = min(processors(a_q.device), triton.cdiv(m, block_m) * triton.cdiv(n, block_n))
    _scaled_mm_kernel[(programs,)](
        TensorDescriptor.from_tensor(a_q, [block_m, BLOCK_K]),
        TensorDescriptor.from_tensor(b_q, [block_n, BLOCK_K]),
        TensorDescriptor.from_tensor(y, [block_m, block_n]) if aligned else None,
        y, a_s.contiguous(), b_s.contiguous(), bias, m, n, k, programs,
        A_ROWS=a_s.shape[0] > 1, B_ROWS=b_s.shape[0] > 1, HAS_BIAS=bias is not None, FAST=fast_accum, Y_DESC=aligned,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=BLOCK_K, GROUP_M=8, **tile,
    )  # fmt: skip
    return y


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2**20


def cublaslt_takes(n: int, k: int, per_row: bool, bias: torch.Tensor | None, out_dtype: torch.dtype) -> bool:
    """Whether cuBLASLt can run the product: 16-byte rows, and only BF16 results for scales per row or a bias."""
    plain = not per_row and bias is None
    return n % 16 == 0 and k % 16 == 0 and k > 0 and (out_dtype == torch.bfloat16 or plain)


def by_cublaslt(a_q, b_q, a_s, b_s, bias, out_dtype, fast_accum, out=None):
    """``torch._scaled_mm``; where either operand has a scale per row, it wants them for both."""
    a_q, b_q = (codes.contiguous() for codes in same_depth(a_q, b_q, 16))
    if a_s.shape[0] > 1 or b_s.shape[0] > 1:
        a_s = a_s.expand(a_q.shape[0], 1).contiguous()
        b_s = b_s.expand(b_q.shape[0], 1).contiguous()
    bias = None if bias is None else bias.to(torch.bfloat16)
    return torch._scaled_mm(
        a_q, b_q.t(), a_s, b_s.t(), bias=bias, out_dtype=out_dtype, use_fast_accum=fast_accum, out=out
    )  # fmt: skip


@functools.cache
def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.cache
def recorded() -> list[dict]:
    return json.loads(CHOICES.read_text()) if CHOICES.exists() else []


@functools.lru_cache(maxsize=4096)
def choose(device_name: str, m: int, n: int, k: int, fast_accum: bool, override: str | None) -> str:
    """The faster backend near [M, N, K] by the measurements on record for this GPU; cuBLASLt where there is none."""
    if override:
        if override not in BACKENDS:
            raise ValueError(f"COAT_SCALED_MM is {override!r}, expected one of {', '.join(BACKENDS)}, or unset")
        return override
    rows = [r for r in recorded() if r["gpu"] == device_name and r["fast_accum"] == fast_accum]
    if not rows:
        return "cublaslt"

    def distance(row):
        return sum(abs(math.log2(max(size, 1) / row[name])) for name, size in (("m", m), ("n", n), ("k", k)))

    nearest = min(rows, key=distance)
    return min(BACKENDS, key=lambda backend: nearest[f"{backend}_us"])


def scaled_mm(a_q, b_q, a_s, b_s, bias, out_dtype, fast_accum, out=None):
    m, n, k = a_q.shape[0], b_q.shape[0], max(a_q.shape[1], b_q.shape[1])
    per_row = a_s.shape[0] > 1 or b_s.shape[0] > 1
    if m > 0 and cublaslt_takes(n, -(-k // 16) * 16, per_row, bias, out_dtype):
        override = os.environ.get("COAT_SCALED_MM")
        if choose(gpu_name(a_q.device), m, n, k, fast_accum, override) == "cublaslt":
            return by_cublaslt(a_q, b_q, a_s, b_s, bias, out_dtype, fast_accum, out)
    return by_triton(a_q, b_q, a_s, b_s, bias, out_dtype, fast_accum, out)


def scaled_mm_into(a_q, b_q, a_s, b_s, bias, fast_accum, out):
    scaled_mm(a_q, b_q, a_s, b_s, bias, out.dtype, fast_accum, out)

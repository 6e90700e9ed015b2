"""scaled_mm: reference, Triton and cuBLASLt against float64, for any shape and any mix of scales."""

import coat_kernels as ck
import pytest
import torch
from coat_kernels.scaled_mm import scaled_mm_ref

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OPCHECKS = ("test_autograd_registration", "test_faketensor")  # the schema test cannot compare FP8
SHAPES = [(1, 16, 32), (37, 50, 100), (130, 70, 257), (64, 128, 256), (16, 5, 7)]


def operands(m, n, k, granularity="token", a_dtype=E4M3, device="cpu"):
    generator = torch.Generator().manual_seed(m + n + k)
    a = torch.randn(m, k, generator=generator).to(device)
    b = torch.randn(n, k, generator=generator).to(device)
    a_q, _, a_s = ck.quantize(a, a_dtype, granularity, power_of_two=granularity == "token")
    b_q, _, b_s = ck.quantize(b, E4M3, granularity, power_of_two=granularity == "token")
    return a_q, b_q, a_s, b_s


def exact(a_q, b_q, a_s, b_s, bias=None):
    y = (a_q.double() @ b_q.double().t()) * a_s.double() * b_s.double().t()
    return y if bias is None else y + bias.double()


def error(y, truth):
    return ((y.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def check(y, truth, out_dtype):
    """At most twice the error of rounding the exact result to BF16 (a tensor core sums in about 14 bits, so a float32
    result is held to the same bound), or to float32 where no tensor core is involved."""
    rounded = truth.to(torch.bfloat16 if y.is_cuda else out_dtype)
    slack = 0 if y.is_cuda or out_dtype == torch.bfloat16 else 2e-6  # float32 sums of up to 257 products
    assert y.dtype == out_dtype
    assert error(y, truth) <= 2 * error(rounded, truth) + slack


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_op_against_float64(device, shape, granularity, out_dtype):
    args = operands(*shape, granularity, device=device)
    for bias in (None, torch.randn(shape[1], device=device), torch.randn(shape[1], device=device).bfloat16()):
        for fast_accum in (False, True):
            y = ck.scaled_mm(*args, bias, out_dtype=out_dtype, fast_accum=fast_accum)
            check(y, exact(*args, bias), out_dtype)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_against_float64(device, shape, fast_accum, out_dtype):
    twin = pytest.importorskip("coat_kernels.scaled_mm_triton", reason="Triton is not installed")
    for granularity, a_dtype in (("token", E4M3), ("tensor", E5M2)):
        a_q, b_q, a_s, b_s = operands(*shape, granularity, a_dtype, device)
        for scales in ((a_s, b_s), (a_s.amax().view(1, 1), b_s), (a_s, b_s.amax().view(1, 1))):
            bias = torch.randn(shape[1], device=device)
            y = twin.by_triton(a_q, b_q, *scales, bias, out_dtype, fast_accum)
            check(y, exact(a_q, b_q, *scales, bias), out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cublaslt"])
@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize(
    "shape", [(2048, 4096, 4096), (4096, 11008, 4096), (300, 1000, 4112), (8192, 4096, 11008), (512, 2048, 12288)]
)
def test_gpu_backends_at_size(monkeypatch, shape, granularity, fast_accum, backend):
    monkeypatch.setenv("COAT_SCALED_MM", backend)
    args = operands(*shape, granularity, E4M3 if granularity == "token" else E5M2, "cuda")
    check(ck.scaled_mm(*args, fast_accum=fast_accum), exact(*args), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("shape", [(2304, 2048, 256), (2301, 2052, 300), (300, 400, 256), (40, 4096, 256)])
def test_gpu_every_tile(shape, fast_accum, out_dtype):
    twin, args = pytest.importorskip("coat_kernels.scaled_mm_triton"), operands(*shape, device="cuda")
    check(twin.by_triton(*args, None, out_dtype, fast_accum), exact(*args), out_dtype)


HOPPER, ADA = 232448, 101376  # bytes of shared memory that a program may have


@pytest.mark.parametrize("shared", [HOPPER, ADA])
@pytest.mark.parametrize("y_bytes", [2, 4])
@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("shape", [(1, 4096), (65, 100), (300, 400), (8192, 4096)])
def test_tiles_fit_into_shared_memory(shape, fast_accum, y_bytes, shared):
    twin = pytest.importorskip("coat_kernels.scaled_mm_triton", reason="Triton is not installed")
    tile = twin.tile_of(*shape, fast_accum, y_bytes, shared)
    block_m, block_n, stages = tile["BLOCK_M"], tile["BLOCK_N"], tile["num_stages"]
    product, operands_ = block_m * block_n * y_bytes, stages * (block_m + block_n) * 128
    assert stages >= 2, "the operands of a product arrive while others are multiplied"
    assert (product + operands_ if shared == HOPPER else max(product, operands_)) <= shared


@pytest.mark.gpu
def test_gpu_override_is_checked(monkeypatch):
    monkeypatch.setenv("COAT_SCALED_MM", "cutlass")
    with pytest.raises(ValueError, match="'cutlass'.*cublaslt, triton"):
        ck.scaled_mm(*operands(32, 32, 32, device="cuda"))


def test_choice_follows_the_nearest_record(monkeypatch):
    twin = pytest.importorskip("coat_kernels.scaled_mm_triton", reason="Triton is not installed")
    row = dict(gpu="A", fast_accum=True, n=4096, k=4096)
    rows = [
        row | dict(m=1024, triton_us=1.0, cublaslt_us=2.0),
        row | dict(m=65536, triton_us=2.0, cublaslt_us=1.0),
    ]
    monkeypatch.setattr(twin, "recorded", lambda: rows)
    twin.choose.cache_clear()
    assert twin.choose("A", 700, 4096, 4096, True, None) == "triton"
    assert twin.choose("A", 50000, 4096, 4096, True, None) == "cublaslt"
    assert twin.choose("A", 50000, 4096, 4096, True, "triton") == "triton"
    assert twin.choose("B", 700, 4096, 4096, True, None) == "cublaslt", "no record of this GPU"
    twin.choose.cache_clear()


def test_shorter_operand_ends_in_zeros(device):
    a_q, b_q, a_s, b_s = operands(20, 24, 40, device=device)
    short = a_q[:, :37].contiguous()
    padded = a_q.view(torch.uint8).clone()
    padded[:, 37:] = 0
    assert torch.equal(ck.scaled_mm(short, b_q, a_s, b_s), ck.scaled_mm(padded.view(E4M3), b_q, a_s, b_s))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 24, 32)])
def test_written_where_it_is_wanted(device, shape, out_dtype):
    """The same bits in the middle of a larger memory, and nothing around them."""
    args, (m, n, _) = operands(*shape, "tensor", device=device), shape
    memory = torch.full((m * n + 64,), -7.0, dtype=out_dtype, device=device)
    out = memory[32 : 32 + m * n].view(m, n)
    y = ck.scaled_mm(*args, out_dtype=out_dtype, out=out)
    assert y is out and torch.equal(out, ck.scaled_mm(*args, out_dtype=out_dtype))
    assert (memory[:32] == -7).all() and (memory[32 + m * n :] == -7).all()


def test_where_it_cannot_be_written(device):
    args = operands(16, 24, 32, device=device)
    for out in (
        torch.empty(16, 24, device=device),
        torch.empty(16, 25, device=device).bfloat16(),
        torch.empty(24, 16, device=device).bfloat16().t(),
        torch.empty(16 * 24 + 1, device=device).bfloat16()[1:].view(16, 24),
    ):
        with pytest.raises(ValueError, match="scaled_mm: out is .* expected contiguous torch.bfloat16"):
            ck.scaled_mm(*args, out=out)


def test_empty(device):
    a_q, b_q, a_s, b_s = operands(4, 24, 40, device=device)
    assert ck.scaled_mm(a_q[:0], b_q, a_s[:0], b_s).shape == (0, 24)
    nothing = ck.scaled_mm(a_q[:, :0], b_q[:, :0], a_s, b_s, torch.ones(24, device=device))
    assert torch.equal(nothing, torch.ones(4, 24, device=device, dtype=torch.bfloat16))


def test_broken_numbers_stay_visible(device):
    a_q, b_q, a_s, b_s = operands(4, 24, 40, device=device)
    a_s[2] = float("nan")
    y = ck.scaled_mm(a_q, b_q, a_s, b_s)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


def test_registration(device):
    args = operands(20, 32, 48, device=device)
    for bias in (None, torch.ones(32, device=device)):
        torch.library.opcheck(
            torch.ops.coat_kernels.scaled_mm.default, (*args, bias, torch.bfloat16, True), test_utils=OPCHECKS
        )
    assert torch.equal(
        ck.scaled_mm(*operands(20, 32, 48)), scaled_mm_ref(*operands(20, 32, 48), None, torch.bfloat16, False)
    )


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(4, 8), "a_q is torch.float32"),
        (2, torch.ones(3, 1), r"a_s is torch.float32 \[3, 1\]"),
        (4, torch.ones(5), r"bias is \[5\]"),
    ],
)
def test_bad_input_is_named(position, value, message):
    args = [*operands(4, 24, 40), None]
    args[position] = value
    with pytest.raises((TypeError, ValueError), match=message):
        ck.scaled_mm(*args)
    a_q, b_q, a_s, b_s = operands(4, 24, 40)
    with pytest.raises(TypeError, match="torch.float16"):
        ck.scaled_mm(a_q, b_q, a_s, b_s, out_dtype=torch.float16)
    with pytest.raises(TypeError, match="both operands are torch.float8_e5m2"):
        ck.scaled_mm(a_q.to(E5M2), b_q.to(E5M2), a_s, b_s)

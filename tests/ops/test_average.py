"""average: the Triton twin against the reference, and both against the mean in float64."""

import pytest
import torch
from coat_kernels.average import average, average_ref

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def values(rows, n, dtype, device, gap=0):
    """The own values, and those of others whose rows lie apart."""
    generator = torch.Generator().manual_seed(rows * 31 + n)
    own = torch.randn(n, generator=generator).to(device, dtype)
    return own, torch.randn(rows, n + gap, generator=generator).to(device, dtype)[:, :n]


@pytest.fixture
def twin():
    return pytest.importorskip("coat_kernels.average_triton", reason="Triton is not installed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("n", [0, 1, 64, 4096 + 37])
def test_parity(twin, device, n, rows, dtype):
    """The same sums in the same order: not a bit differs."""
    own, others = values(rows, n, dtype, device, gap=27)
    expected, actual = own.clone(), own.clone()
    average_ref(expected, others)
    twin.average(actual, others)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_is_rounded_once(device, rows):
    """Of BF16 the mean is the nearest one but where float32's own steps decide: 2**-16 of BF16's at each sum."""
    own, others = values(rows, 5000, torch.bfloat16, device)
    exact = torch.cat((own[None], others)).double().mean(0)
    average(own, others)
    step = 2.0 ** (exact.abs().log2().floor() - 8)  # half of a BF16 step
    sums = torch.cat((own[None], others)).double().abs().sum(0) * 2**-24
    assert ((own.double() - exact).abs() <= step + sums).all()
    assert (own != exact.bfloat16()).float().mean() < 1e-2


def test_what_is_not_finite_stays_so(twin, device):
    own = torch.tensor([float("nan"), 1.0, float("inf"), float("inf")], device=device, dtype=torch.bfloat16)
    others = torch.tensor([[1.0, float("nan"), 1.0, float("-inf")]], device=device, dtype=torch.bfloat16)
    for run in (average_ref, twin.average):
        result = own.clone()
        run(result, others)
        assert result.isnan().tolist() == [True, True, False, True] and result[2] == float("inf")


def test_registration(device):
    for dtype in (torch.bfloat16, torch.float32):
        torch.library.opcheck(
            torch.ops.coat_kernels.average.default, values(2, 37, dtype, device), test_utils=OPCHECKS
        )


@pytest.mark.parametrize(
    ("own", "others", "message"),
    [
        (torch.ones(4).half(), torch.ones(1, 4).half(), "torch.float16"),
        (torch.ones(4), torch.ones(1, 4).bfloat16(), "others is torch.bfloat16"),
        (torch.ones(4), torch.ones(1, 5), r"\[4\] and others \[1, 5\]"),
        (torch.ones(2, 4), torch.ones(1, 4), r"\[2, 4\]"),
        (torch.ones(8)[::2], torch.ones(1, 4), "stride 2"),
    ],
)
def test_bad_input_is_named(own, others, message):
    with pytest.raises((TypeError, ValueError), match=message):
        average(own, others)

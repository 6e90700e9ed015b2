"""rotary: the Triton twin against the reference and float64, for every layout in which q and k come."""

import pytest
import torch
from coat_kernels.rotary import empty_rotated, rotary, rotary_ref

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
# B, N, Nk, S, D: one token, head sizes that are no power of two, more heads than a block, an empty batch, one head
SHAPES = [
    (1, 4, 4, 1, 64),
    (2, 4, 2, 37, 128),
    (2, 3, 1, 13, 80),
    (1, 5, 5, 7, 96),
    (1, 130, 1, 2, 50),
    (2, 1, 1, 9, 2),
]
EMPTY = [(0, 2, 2, 5, 64), (2, 2, 1, 0, 64)]


@pytest.fixture
def twin(monkeypatch):
    """The Triton launcher, with its results filled with garbage first."""
    triton_module = pytest.importorskip("coat_kernels.rotary_triton", reason="Triton is not installed")
    monkeypatch.setattr(triton_module, "empty_rotated", lambda x: empty_rotated(x).fill_(float("nan")))
    return triton_module


def angles(batch, length, width, dtype, device):
    """cos and sin as a model makes them, of the positions 1000 on (each sequence of a batch by another offset)."""
    positions = 1000 + 7 * torch.arange(batch)[:, None, None] + torch.arange(length)[None, :, None]
    angle = positions * 1e4 ** -(torch.arange(0, width, 2) / width)
    angle = torch.cat((angle, angle), dim=2)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def merged(batch, heads, heads_k, length, width, dtype, device):
    """q and k [B, N, S, D] as views of one projection output."""
    generator = torch.Generator().manual_seed(batch * 31 + length)
    qkv = torch.randn(batch, length, (heads + 2 * heads_k) * width, generator=generator).to(device, dtype)
    q, k, _ = qkv.split((heads * width, heads_k * width, heads_k * width), dim=2)
    return q.view(batch, length, heads, width).transpose(1, 2), k.view(batch, length, heads_k, width).transpose(1, 2)


def near(actual, x, cos, sin, inverse):
    """The error against float64 is at most twice that of the reference, which rounds as often, or one float32 step."""
    first, second = (x.double() * (sin.double()[:, None] if inverse else 1)).chunk(2, dim=3)
    turned = torch.cat((second, -first) if inverse else (-second, first), dim=3)
    exact = x.double() * cos.double()[:, None] + turned * (1 if inverse else sin.double()[:, None])
    reference = rotary_ref(x, x, cos, sin, inverse)[0]
    assert actual.shape == x.shape and actual.dtype == x.dtype
    assert actual.transpose(1, 2).is_contiguous() and reference.stride() == actual.stride()
    if x.numel():
        error, allowed = (y.double().sub(exact).abs().max() for y in (actual, reference))
        assert error <= 2 * allowed + 2**-24 * exact.abs().max()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_parity(twin, device, shape, dtype, inverse):
    q, k = merged(*shape, dtype, device)
    batch, _, _, length, width = shape
    for own in (False, True):  # one table of angles for the batch, or one a sequence
        cos, sin = angles(batch if own else 1, length, width, dtype, device)
        y_q, y_k = twin.rotary(q, k, cos, sin, inverse)
        near(y_q, q, cos, sin, inverse)
        near(y_k, k, cos, sin, inverse)


def test_other_layouts(twin, device):
    """Contiguous heads, values that lie apart, q and k of different layouts; angles in float32, expanded, strided."""
    q, k = merged(2, 4, 2, 5, 32, torch.bfloat16, device)
    cos, sin = angles(1, 5, 32, torch.float32, device)
    expected = rotary_ref(q, k, cos, sin, False)
    apart = torch.empty(2, 4, 5, 64, dtype=q.dtype, device=device)[..., ::2].copy_(q)
    expanded = cos.expand(2, -1, -1), sin.expand(2, -1, -1)
    strange = torch.stack((cos, sin), dim=3).unbind(3)
    mixed = cos, sin.transpose(1, 2).contiguous().transpose(1, 2)
    for q_, k_, cos_, sin_ in (
        (q.contiguous(), k, cos, sin),
        (q, k.contiguous(), *expanded),
        (apart, k, *strange),
        (q, k, *mixed),
    ):
        actual = twin.rotary(q_, k_, cos_, sin_, False)
        for a, e in zip(actual, expected, strict=True):
            # a fused multiply-add may round to the neighbour: 2**-8 of the larger of two BF16 numbers
            assert torch.allclose(a.float(), e.float(), rtol=2**-7, atol=1e-6) and (a != e).float().mean() < 1e-2


def test_the_halves_have_angles_of_their_own(twin, device):
    """Nothing assumes that the second half of cos and sin repeats the first."""
    q, k = merged(1, 2, 1, 6, 16, torch.float32, device)
    cos, sin = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(0)).to(device)
    for inverse in (False, True):
        y_q, y_k = twin.rotary(q, k, cos, sin, inverse)
        near(y_q, q, cos, sin, inverse)
        near(y_k, k, cos, sin, inverse)


def test_inverse_is_the_gradient_and_the_way_back(device):
    q, k = merged(2, 3, 1, 11, 24, torch.float32, device)
    cos, sin = angles(1, 11, 24, torch.float32, device)
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    there = rotary(q, k, cos, sin)
    back = rotary(*there, cos, sin, inverse=True)
    # two maps of two products and a sum each, of values below 6: a few float32 steps of 2**-24 * 8
    assert torch.allclose(back[0], q, rtol=0, atol=2**-19) and torch.allclose(back[1], k, rtol=0, atol=2**-19)
    x = q.double().requires_grad_()
    first, second = x.chunk(2, dim=3)
    (x * cos.double()[:, None] + torch.cat((-second, first), 3) * sin.double()[:, None]).backward(dy.double())
    assert torch.allclose(rotary(dy, k, cos, sin, inverse=True)[0].double(), x.grad, rtol=0, atol=2**-20)


def test_as_transformers_rotates(device):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    q, k = merged(2, 4, 2, 9, 32, torch.float32, device)
    cos, sin = angles(2, 9, 32, torch.float32, device)
    for actual, expected in zip(rotary(q, k, cos, sin), modeling.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=2**-20)


def test_registration(device):
    q, k = merged(2, 4, 2, 5, 32, torch.bfloat16, device)
    for inverse in (False, True):
        arguments = (q, k, *angles(1, 5, 32, torch.bfloat16, device), inverse)
        torch.library.opcheck(torch.ops.coat_kernels.rotary.default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.ones(1, 2, 3, 15)), r"\[1, 2, 3, 15\].*even"),
        (dict(q=torch.ones(1, 2, 3, 16, dtype=torch.int32)), "torch.int32"),
        (dict(k=torch.ones(1, 2, 3, 16, dtype=torch.bfloat16)), "k is torch.bfloat16"),
        (dict(k=torch.ones(1, 2, 4, 16)), r"k is \[1, 2, 4, 16\]"),
        (dict(cos=torch.ones(1, 3, 8)), r"cos is \[1, 3, 8\]"),
        (dict(sin=torch.ones(3, 3, 16)), r"sin is \[3, 3, 16\]"),
        (dict(sin=torch.ones(1, 3, 16).double()), "torch.float64"),
    ],
)
def test_bad_input_is_named(change, message):
    heads, table = torch.ones(1, 2, 3, 16), torch.ones(1, 3, 16)
    with pytest.raises((TypeError, ValueError), match=message):
        rotary(**{"q": heads, "k": heads, "cos": table, "sin": table, **change})

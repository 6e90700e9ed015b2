"""activation, its backward, its result made again: the Triton twins, the references, and torch's own functions."""

import pytest
import torch
import torch.nn.functional as F
from coat_kernels.activation import (
    ACTIVATIONS,
    _restore,
    activation,
    activation_backward,
    activation_backward_ref,
    activation_ref,
    activation_transposed,
    activation_transposed_ref,
    activation_values,
    activation_values_ref,
    value_and_slope,
)
from coat_kernels.quantize import quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The interpreter calculates with numpy, which says so where a result is stated to be inf, 0 or NaN.
pytestmark = pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")
OPCHECKS = ("test_autograd_registration", "test_faketensor")  # the schema test cannot compare FP8
SHAPES = [(1, 64), (37, 100), (18, 257), (0, 48)]  # one row, ragged rows with awkward widths, an empty batch
SCALES = [(16, torch.float32), (32, torch.uint8), (128, torch.bfloat16)]
TORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "identity": lambda x: x,
}
# Of act and its slope in float32: relative where they are not small (see activation_triton.py), absolute, in units of
# x, where 1 + erf cancels, and absolute in a slope, where x times a rounding of 1 - sigmoid is left over.
RELATIVE, CANCELLED, SLOPE = 2.0**-16, 2.0**-22, 2.0**-16
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture
def twin(poisoned_memory):
    """The Triton launchers, with every buffer they allocate filled with garbage first."""
    return pytest.importorskip("coat_kernels.activation_triton", reason="Triton is not installed")


@pytest.fixture
def equal(same_codes):
    """Every result but values is compared: scales bitwise, codes by ``same_codes``."""

    def equal(actual, expected):
        for a, b in zip(actual, expected, strict=True):
            if a.dtype in (E4M3, E5M2):
                same_codes(a, b)
            else:
                assert a.dtype == b.dtype and torch.equal(a.cpu(), b)

    return equal


def within(actual, truth, absolute, relative=RELATIVE):
    """``actual``, in its dtype, is ``truth`` (float64) up to the arithmetic's errors and one rounding."""
    error = (actual.cpu().double() - truth).abs()
    # the last term: half a step of a subnormal float32 or BF16, or a step of a subnormal float16
    bound = (relative + HALF_STEP[actual.dtype]) * truth.abs() + absolute
    assert (error <= bound + (2.0**-24 if actual.dtype == torch.float16 else 2.0**-126)).all()


def sample(tokens, width, dtype=torch.bfloat16, seed=0):
    """Values as activations have them, tokens of different size, with a few exact zeros."""
    generator = torch.Generator().manual_seed(tokens * 7919 + width + seed)
    x = 2 * torch.randn(tokens, width, generator=generator) * torch.exp(torch.randn(tokens, 1, generator=generator))
    x[torch.rand(tokens, width, generator=generator) < 0.01] = 0
    return x.to(dtype)


def halves(tokens, width, dtype=torch.bfloat16):
    """x and up as the halves of one [T, 2I] matrix."""
    return sample(tokens, 2 * width, dtype).chunk(2, dim=1)


def kept_sample(tokens, width, gated=True, group=32, scale_dtype=torch.uint8):
    x, up = halves(tokens, width)
    return activation_ref(x, up if gated else None, "identity", group, scale_dtype, False, False)[3:]


def to(device, *tensors):
    return [t if t is None else t.to(device) for t in tensors]


# --- The mathematics ---


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_reference_is_torchs_function(act):
    """In float64, where 1 + erf and 1 + tanh leave at most 30 * 2**-52 of torch's own rounding."""
    x = torch.cat((torch.linspace(-30, 30, 4001, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    x.requires_grad_()
    expected = TORCH[act](x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    actual = value_and_slope(x.detach(), act)
    torch.testing.assert_close(actual[0], expected.detach(), rtol=1e-13, atol=30 * 2.0**-52)
    torch.testing.assert_close(actual[1], slope, rtol=1e-13, atol=900 * 2.0**-52)
    assert actual[0][-1] == 0, "masks rely on it"


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_float32_arithmetic(twin, device, act):
    """The kernel's exp2, division and erf against float64, over the whole range of useful inputs and far beyond."""
    x = torch.cat((torch.linspace(-100, 100, 4000), torch.tensor([0.0, 1e4, -1e4, 1e8, -1e8, 1e18, -1e18]))).view(
        1, -1
    )
    for h in (
        activation_ref(x, None, act, 0, torch.uint8, True, False)[0],
        twin.activation(x.to(device), None, act, 0, torch.uint8, True, False)[0],
    ):
        within(h, value_and_slope(x.double(), act)[0], CANCELLED * x.double().abs() * (x.abs() < 100))
    kept = activation_ref(x, None, act, 16, torch.uint8, False, False)[3:]
    restored = _restore(*kept, False, 16)[0].double()
    one = torch.ones_like(x)
    for d in (
        activation_backward_ref(one, *kept, act, False, 16, False, E4M3, torch.float32)[0],
        twin.activation_backward(*to(device, one, *kept), act, False, 16, False, E4M3, torch.float32)[0],
    ):
        within(d, value_and_slope(restored, act)[1], SLOPE)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradient_is_autograds(device, act, gated):
    """Of torch's own function in float64, at the values that the groups hold."""
    kept = kept_sample(37, 100, gated)
    x, up = (None if v is None else v.double().requires_grad_() for v in _restore(*kept, gated, 32))
    dh = sample(37, 100, torch.float32, seed=1)
    h = TORCH[act](x) if up is None else TORCH[act](x) * up
    expected = torch.autograd.grad(h, [x, up] if gated else [x], dh.double())
    d = activation_backward(*to(device, dh, *kept), act=act, gated=gated, group_size=32)[0].cpu()
    factor = dh.double().abs() * (up.detach().abs() if gated else 1)
    within(d[:, :100], expected[0], SLOPE * factor)
    if gated:
        within(d[:, 100:], expected[1], CANCELLED * (dh.double() * x.detach()).abs())


# --- The twins ---


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("group", "scale_dtype"), SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_activation_parity(twin, equal, device, shape, group, scale_dtype, gated, codes):
    dtype = torch.float32 if shape[0] % 2 else torch.bfloat16
    x, up = halves(*shape, dtype)
    moved, moved_up = to(device, torch.cat((x, up), dim=1))[0].chunk(2, dim=1)
    options = ("silu", group, scale_dtype)
    expected = activation_ref(x, up if gated else None, *options, True, codes)
    actual = twin.activation(moved, moved_up if gated else None, *options, True, codes)
    truth = F.silu(x.double()) * (up.double() if gated else 1)
    within(actual[0], truth, 0)
    within(expected[0], truth, 0)
    equal(actual[1:], expected[1:])
    assert torch.equal(actual[3].cpu().float(), expected[3].float()), "kept codes hang on nothing but x and up"


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_parity_of_each_function(twin, equal, device, act):
    x, up = halves(20, 200)
    for gated in (True, False):
        pair = x, up if gated else None
        expected = activation_ref(*pair, act, 32, torch.uint8, False, True)
        actual = twin.activation(*to(device, *pair), act, 32, torch.uint8, False, True)
        equal(actual, expected)
        assert actual[0].numel() == 0, "values were not asked for"
        values = twin.activation(*to(device, *pair), act, 0, torch.uint8, True, False)
        factor = up.double() if gated else 1.0
        within(values[0], TORCH[act](x.double()) * factor, CANCELLED * (x.double() * factor).abs())
        assert [v.numel() for v in values[1:]] == [0] * 4, "nor anything else here"


@pytest.mark.parametrize(("gated", "code_dtype"), [(True, E4M3), (True, E5M2), (False, E4M3)])
@pytest.mark.parametrize(("group", "scale_dtype"), SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_parity(twin, equal, device, shape, group, scale_dtype, gated, code_dtype):
    dtype, out_dtype = (torch.float32, torch.bfloat16) if shape[0] % 2 else (torch.bfloat16, torch.float32)
    dh = sample(*shape, dtype, seed=1)
    kept = kept_sample(*shape, gated, group, scale_dtype)
    arguments = "silu", gated, group
    for codes, out in ((True, dtype), (False, out_dtype)):
        expected = activation_backward_ref(dh, *kept, *arguments, codes, code_dtype, out)
        actual = twin.activation_backward(*to(device, dh, *kept), *arguments, codes, code_dtype, out)
        equal(actual[1:], expected[1:])
        assert actual[0].shape == expected[0].shape and actual[0].dtype == out
    x, up = _restore(*kept, gated, group)
    y, slope = value_and_slope(x.double(), "silu")
    factor = dh.double() * (up.double() if gated else 1)
    within(actual[0][:, : shape[1]], factor * slope, SLOPE * factor.abs())
    if gated:
        within(actual[0][:, shape[1] :], dh.double() * y, 0)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_backward_parity_of_each_function(twin, equal, device, act):
    dh = sample(20, 200, seed=1)
    for gated in (True, False):
        kept = kept_sample(20, 200, gated)
        arguments = act, gated, 32, True, E4M3, torch.bfloat16
        equal(
            twin.activation_backward(*to(device, dh, *kept), *arguments),
            activation_backward_ref(dh, *kept, *arguments),
        )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("group", "scale_dtype"), SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_parity(twin, same_codes, device, shape, group, scale_dtype, gated):
    kept = kept_sample(*shape, gated, group, scale_dtype)
    scale = torch.full((1, 1), 0.25)
    for act in ACTIVATIONS if shape == (37, 100) else ("silu",):
        expected = activation_transposed_ref(*kept, scale, act, gated, group)
        actual = twin.activation_transposed(*to(device, *kept, scale), act, gated, group)
        assert actual.shape == (shape[1], -(-shape[0] // 16) * 16)
        same_codes(actual, expected)
        assert not actual[:, shape[0] :].view(torch.uint8).any(), "zeros behind the last token"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("group", "scale_dtype"), SCALES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 1100)])  # the last: two tiles in a row
def test_values_parity(twin, device, shape, group, scale_dtype, gated):
    """The h that the groups give, up to the arithmetic's errors and one rounding."""
    kept = kept_sample(*shape, gated, group, scale_dtype)
    x, up = (None if t is None else t.double() for t in _restore(*kept, gated, group))
    for act in ACTIVATIONS if shape == (37, 100) else ("silu",):
        truth, absolute = TORCH[act](x), CANCELLED * x.abs()
        if gated:
            truth, absolute = truth * up, absolute * up.abs()
        for dtype in HALF_STEP:
            arguments = (act, gated, group, dtype)
            values = twin.activation_values(*to(device, *kept), *arguments)
            assert values.shape == shape and values.dtype == dtype
            within(values, truth, absolute)
            within(activation_values_ref(*kept, *arguments), truth, absolute)


@pytest.mark.parametrize("width", [3000, 9000, 21000])
def test_rows_of_many_tiles(twin, equal, device, width, monkeypatch):
    """Wider than a tile: held in registers, the last one narrower or not, or computed twice."""
    monkeypatch.setattr(twin, "FORWARD", twin.FORWARD._replace(block=512, most=9))
    monkeypatch.setattr(twin, "BACKWARD", twin.BACKWARD._replace(block=2048, most=5))
    tiles = {3000: ((6, 0), (1, 1024)), 9000: ((9, 0), (4, 1024)), 21000: ((0, 0), (0, 0))}[width]
    for rows, (held, tail) in zip((twin.FORWARD, twin.BACKWARD), tiles, strict=True):
        plan = twin._plan(width, 32, True, rows)[0]
        assert (plan["HELD"], plan["TAIL"]) == (held, tail)
    x, up = halves(1, width)
    dh = sample(1, width, seed=1)
    expected = activation_ref(x, up, "silu", 32, torch.uint8, True, True)
    actual = twin.activation(*to(device, x, up), "silu", 32, torch.uint8, True, True)
    equal(actual[1:], expected[1:])
    within(actual[0], F.silu(x.double()) * up.double(), 0)
    arguments = *expected[3:], "silu", True, 32, True, E4M3, torch.bfloat16
    actual = twin.activation_backward(dh.to(device), *to(device, *arguments[:2]), *arguments[2:])
    equal(actual, activation_backward_ref(dh, *arguments))


def test_views(twin, equal, device):
    """Rows that lie apart, differently in x and up, and columns without unit stride."""
    wide = sample(40, 300).to(device)
    other = sample(40, 128, seed=1).to(device)
    for x, up in (
        (wide[::2, 4:132], other[1::2]),
        (wide[:, 20:148].t()[:40], other[:40, :40].t()),
    ):
        expected = activation_ref(x.cpu(), up.cpu(), "silu", 32, torch.uint8, False, True)
        equal(twin.activation(x, up, "silu", 32, torch.uint8, False, True), expected)
        dh = up
        kept = expected[3:]
        arguments = "silu", True, 32, True, E4M3, torch.bfloat16
        equal(
            twin.activation_backward(dh, *to(device, *kept), *arguments),
            activation_backward_ref(dh.cpu(), *kept, *arguments),
        )


# --- What holds for any input ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_are_those_of_quantize(device, dtype):
    x, up = to(device, *halves(37, 100, dtype))
    a = activation(x, up, act="silu", codes=True)
    h_q, _, h_s = quantize(a.h)
    assert torch.equal(a.h_q.view(torch.uint8), h_q.view(torch.uint8)) and torch.equal(a.h_s, h_s)
    kept = activation(x, up, act="silu", group_size=32)
    dh = sample(37, 100, dtype, seed=1).to(device)
    options = dict(act="silu", gated=True, group_size=32)
    d = activation_backward(dh, kept.kept_q, kept.kept_s, **options)[0]
    _, d_q, d_s = activation_backward(dh, kept.kept_q, kept.kept_s, codes=True, **options)
    expected_q, _, expected_s = quantize(d)
    assert torch.equal(d_q.view(torch.uint8), expected_q.view(torch.uint8)) and torch.equal(d_s, expected_s)


@pytest.mark.parametrize(("group", "scale_dtype"), SCALES)
def test_kept_error_is_half_a_step(device, group, scale_dtype):
    """Half of 2**-3 of a normal code, half a subnormal step below; x and up do not touch each other."""
    x, up = to(device, *halves(37, 200))
    options = dict(act="silu", group_size=group, scale_dtype=scale_dtype, values=False)
    both = activation(x, up, **options)
    assert both.h is None and both.h_q is None and both.h_s is None
    for i, part in enumerate((x, up)):
        q, s = both.kept_q.chunk(2, dim=1)[i].contiguous(), both.kept_s.chunk(2, dim=1)[i].contiguous()
        alone = activation(part, **options)
        assert torch.equal(alone.kept_q.view(torch.uint8), q.view(torch.uint8)) and torch.equal(alone.kept_s, s)
        y = _restore(q, s, False, group)[0]
        spread = torch.ones_like(q, dtype=torch.uint8).view(E4M3)  # each code 1: the smallest subnormal, 2**-9
        step = _restore(spread, s, False, group)[0]
        bound = torch.maximum(part.float().abs() * 2**-4, step / 2) * (1 + 2**-20)
        assert ((y - part.float()).abs() <= bound).all()
        if scale_dtype == torch.uint8:
            again = activation(y, **options)
            assert torch.equal(_restore(again.kept_q, again.kept_s, False, group)[0], y), "idempotent"


@pytest.mark.parametrize("shape", [(1, 64), (37, 100), (64, 32), (0, 16)])
def test_transposed_is_the_transpose(device, shape):
    """At a given scale: of the h that the groups give, and with the identity of the groups themselves."""
    kept_q, kept_s = to(device, *kept_sample(*shape))
    scale = torch.full((1, 1), 0.5, device=device)
    h_qt = activation_transposed(kept_q, kept_s, scale, act="identity", gated=True, group_size=32)
    x, up = _restore(kept_q, kept_s, True, 32)
    h_q = quantize(x * up, granularity="tensor", scale=scale)[0]
    assert torch.equal(h_qt[:, : shape[0]].view(torch.uint8) & 0x7F, h_q.view(torch.uint8).t() & 0x7F)
    kept = activation(sample(*shape).to(device), act="identity", group_size=32, values=False)
    x_qt = activation_transposed(kept.kept_q, kept.kept_s, scale, act="identity", gated=False, group_size=32)
    x_q = quantize(_restore(*kept[3:], False, 32)[0], granularity="tensor", scale=scale)[0]
    assert torch.equal(x_qt[:, : shape[0]].view(torch.uint8) & 0x7F, x_q.view(torch.uint8).t() & 0x7F)


def test_leading_dimensions_are_flattened(device):
    gate_up = sample(24, 128).to(device)
    flat = activation(*gate_up.chunk(2, dim=-1), act="silu", group_size=32, codes=True)
    deep = activation(*gate_up.view(2, 3, 4, 128).chunk(2, dim=-1), act="silu", group_size=32, codes=True)
    dh = sample(24, 64, seed=1).to(device)
    options = dict(act="silu", gated=True, group_size=32)
    flat += activation_backward(dh, *flat[3:], **options)[:1]
    deep += activation_backward(dh.view(2, 3, 4, 64), *deep[3:], **options)[:1]
    for a, b in zip(flat, deep, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("implementation", ["reference", "twin"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_zeros_nan_and_inf(twin, device, act, implementation):
    """They have stated outcomes and stay in their token, and in what is kept in their group of 16."""
    forward, backward, transposed, values = (
        (activation_ref, activation_backward_ref, activation_transposed_ref, activation_values_ref)
        if implementation == "reference"
        else (twin.activation, twin.activation_backward, twin.activation_transposed, twin.activation_values)
    )
    place = "cpu" if implementation == "reference" else device
    x, up = torch.ones(6, 48), torch.ones(6, 48)
    x[0] = 0
    up[1] = 0
    x[2, 20] = float("nan")
    up[3, 20] = float("inf")
    x[4, 20] = float("inf")
    h, h_q, h_s, kept_q, kept_s = (
        t.cpu() for t in forward(*to(place, x.bfloat16(), up.bfloat16()), act, 16, torch.uint8, True, True)
    )
    assert not h[:2].any() and not h_q[:2].float().any() and (h_s[:2] == 2.0**-126).all()
    assert h[2, 20].isnan() and h[3, 20].isinf() and h[4, 20].isinf()
    assert h_s.flatten().isnan().tolist() == [False, False, True, True, True, False]
    assert torch.equal(h[2:5, :20], h[5:, :20].expand(3, -1)) and torch.equal(h[2:5, 21:], h[5:, 21:].expand(3, -1))
    kept = _restore(kept_q, kept_s, True, 16)
    broken = torch.zeros(6, 48, dtype=torch.bool)
    broken[2:5, 16:32] = True
    of_x, of_up = broken.clone(), broken.clone()
    of_x[3] = of_up[2] = of_up[4] = False
    assert torch.equal(kept[0].isnan(), of_x) and torch.equal(kept[1].isnan(), of_up)
    ones = torch.ones(6, 48, device=place)
    d = backward(ones, *to(place, kept_q, kept_s), act, True, 16, False, E4M3, torch.float32)[0].cpu()
    assert torch.equal(d[:, 48:].isnan(), of_x), "dup = dh * act(x)"
    assert torch.equal(d[:, :48].isnan(), of_up if act == "identity" else broken), "dx = dh * up * act'(x)"
    d_s = backward(ones, *to(place, kept_q, kept_s), act, True, 16, True, E4M3, torch.float32)[2]
    assert d_s.flatten().isnan().tolist() == [False, False, True, True, True, False]
    h_qt = transposed(*to(place, kept_q, kept_s, torch.ones(1, 1)), act, True, 16).cpu()
    assert torch.equal(h_qt.float().t()[:6].isnan(), broken), "a given scale does not hide them"
    assert not h_qt[:, 6:].view(torch.uint8).any()
    again = values(*to(place, kept_q, kept_s), act, True, 16, torch.bfloat16).cpu()
    assert torch.equal(again.isnan(), broken)


@pytest.mark.parametrize("implementation", ["reference", "twin"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_slopes_far_out_and_at_zero(twin, device, act, implementation):
    """Exactly 0 or 1 (2 |x| for relu2), however large x is; at 0 as torch has it."""
    x = torch.tensor([[0.0, -64.0, -(2.0**40), -(2.0**100), 64.0, 2.0**40, 2.0**100, -0.0]]).repeat_interleave(16, 1)
    kept = activation_ref(x, None, act, 16, torch.uint8, False, False)[3:]
    backward = activation_backward_ref if implementation == "reference" else twin.activation_backward
    place = "cpu" if implementation == "reference" else device
    ones = torch.ones_like(x, device=place)
    d = backward(ones, *to(place, *kept), act, False, 16, False, E4M3, torch.float32)[0].cpu()[0, ::16]
    x = x[0, ::16]
    far = torch.where(x > 0, 2 * x if act == "relu2" else 1.0, 1.0 if act == "identity" else 0.0)
    torch.testing.assert_close(d[1:-1], far[1:-1], rtol=0, atol=2.0**-80)
    zero = torch.zeros(1, requires_grad=True)
    TORCH[act](zero).backward()
    assert d[0] == d[-1] == zero.grad[0]


# --- Registration and errors ---


def test_registration(device):
    """Fake and kernel agree (torch.library.opcheck), whatever is asked for."""
    ops = torch.ops.coat_kernels
    x, up = to(device, *halves(20, 100))
    for arguments in (
        (x, up, "silu", 32, torch.uint8, True, True),
        (x, None, "gelu", 0, torch.uint8, False, True),
        (x.float(), None, "identity", 16, torch.bfloat16, True, False),
    ):
        torch.library.opcheck(ops.activation.default, arguments, test_utils=OPCHECKS)
    kept = to(device, *kept_sample(20, 100))
    for options in ((True, E5M2, torch.bfloat16), (False, E4M3, torch.float32)):
        torch.library.opcheck(
            ops.activation_backward.default, (x, *kept, "silu", True, 32, *options), test_utils=OPCHECKS
        )
    torch.library.opcheck(
        ops.activation_transposed.default,
        (*kept, torch.ones(1, 1, device=device), "silu", True, 32),
        test_utils=OPCHECKS,
    )
    torch.library.opcheck(ops.activation_values.default, (*kept, "silu", True, 32, torch.float32), test_utils=OPCHECKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(act="swish"), "'swish', expected one of 'silu'"),
        (dict(x=torch.ones(2, 16, dtype=torch.int32)), "torch.int32"),
        (dict(up=torch.ones(2, 8)), r"\[2, 8\]"),
        (dict(up=torch.ones(2, 16).bfloat16()), "torch.bfloat16"),
        (dict(group_size=24), "group_size is 24"),
        (dict(scale_dtype=torch.float16), "torch.float16"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        activation(**{"x": torch.ones(2, 16), "act": "silu", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(act="tanh"), "'tanh'"),
        (dict(dh=torch.ones(2, 32)), r"\[2, 32\], expected \[2, 16\]"),
        (dict(dh=torch.ones(2, 16).double()), "dh is torch.float64"),
        (dict(out_dtype=torch.float64), "out_dtype is torch.float64"),
        (dict(code_dtype=torch.bfloat16), "code_dtype is torch.bfloat16"),
        (dict(gated=False), r"\[2, 2\], expected \[2, 1\]"),
        (dict(group_size=0), "group_size is 0"),
        (dict(kept_q=torch.ones(2, 32)), "kept_q is torch.float32"),
        (dict(kept_s=torch.ones(2, 2).half()), "kept_s is torch.float16"),
    ],
)
def test_bad_backward_input_is_named(change, message):
    kept_q, kept_s = kept_sample(2, 16)
    options = dict(dh=torch.ones(2, 16), kept_q=kept_q, kept_s=kept_s, act="silu", gated=True, group_size=32)
    with pytest.raises((TypeError, ValueError), match=message):
        activation_backward(**{**options, **change})


def test_bad_scale_or_dtype_is_named():
    with pytest.raises(ValueError, match=r"\[2, 1\], expected torch.float32 \[1, 1\]"):
        activation_transposed(*kept_sample(2, 16), torch.ones(2, 1), act="silu", gated=True, group_size=32)
    with pytest.raises(TypeError, match="dtype is torch.float64"):
        activation_values(*kept_sample(2, 16), act="silu", gated=True, group_size=32, dtype=torch.float64)

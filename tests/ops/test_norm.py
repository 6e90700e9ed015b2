"""norm, its backward, its output made again: the Triton twins, the references, all against float64 and autograd."""

import coat_kernels as ck
import pytest
import torch
from coat_kernels.formats import SMALLEST_NORMAL
from coat_kernels.norm import norm_backward_ref, norm_ref, norm_transposed_ref, norm_values_ref
from torch.nn.functional import layer_norm, rms_norm

BF16, FP32, E8M0, E4M3 = torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn
OPCHECKS = ("test_autograd_registration", "test_faketensor")  # the schema test cannot compare FP8
EPS = 1e-6
# one row, ragged rows with an awkward width, a head's width, off the 16 of tensor cores, an empty batch
SHAPES = [(1, 64), (37, 100), (50, 128), (40, 257), (0, 48)]
WIDE = (2, 8300)  # wider than a program holds
# center, offset, round_first, and the dtypes of the weight, of the bias (None: there is none) and of y
FORMS = {
    "llama": (False, 0.0, True, BF16, None, BF16),
    "llama fp32 weight": (False, 0.0, True, FP32, None, FP32),
    "gemma": (False, 1.0, False, BF16, None, BF16),
    "olmo2": (False, 0.0, False, FP32, None, BF16),
    "no weight": (False, 0.0, True, None, None, BF16),
    "layernorm": (True, 0.0, False, BF16, BF16, BF16),
    "layernorm no bias": (True, 0.0, False, FP32, None, FP32),
    "layernorm bare": (True, 0.0, False, None, None, BF16),
}
KEPT = [(16, E8M0), (128, E8M0), (32, BF16), (64, FP32)]


@pytest.fixture
def twin(poisoned_memory, monkeypatch):
    """The Triton launchers, with every buffer they allocate filled with garbage first, and few programs, so that each
    has more than one tile of the backward."""
    triton_module = pytest.importorskip("coat_kernels.norm_triton", reason="Triton is not installed")
    monkeypatch.setattr(triton_module, "processors", lambda device: 1)
    return triton_module


def error(actual, truth):
    return ((actual.cpu().double() - truth.cpu()).norm() / truth.cpu().norm().clamp(min=1e-300)).item()


def as_exact(actual, reference, truth):
    """At most twice the reference's error, and a float32 step: all values of a row share the last bit of its mean and
    rstd, which either of the two may have got right by luck."""
    return error(actual, truth) <= 2 * error(reference, truth) + 2**-23


def to(device, *tensors):
    return [tensor.to(device) if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


def sample(tokens, width, dtype=BF16):
    """Tokens of very different size, off zero, with a few exact zeros."""
    generator = torch.Generator().manual_seed(tokens * 7919 + width)
    x = torch.randn(tokens, width, generator=generator) + 0.3
    x *= torch.exp(2 * torch.randn(tokens, 1, generator=generator))
    x[torch.rand(tokens, width, generator=generator) < 0.01] = 0
    return x.to(dtype)


def vectors(width, weight_dtype, bias_dtype):
    generator = torch.Generator().manual_seed(width)
    weight, bias = (torch.randn(2, width, generator=generator)).unbind()
    return (
        None if weight_dtype is None else weight.to(weight_dtype),
        None if bias_dtype is None else bias.to(bias_dtype),
    )


def norm64(x, weight, bias, center, offset):
    """The norm in float64."""
    x = x.double()
    x = x - x.mean(1, keepdim=True) if center else x
    y = x * (x.square().mean(1, keepdim=True) + EPS).rsqrt()
    y = y if weight is None else y * (weight.double() + offset)
    return y if bias is None else y + bias.double()


def kept_case(shape, form, group, scale_dtype):
    """What the forward gives to the backward: arguments of norm_backward_ref after dy, and the bias."""
    center, offset, round_first, weight_dtype, bias_dtype, out_dtype = FORMS[form]
    x = sample(*shape)
    weight, bias = vectors(shape[1], weight_dtype, bias_dtype)
    kept = norm_ref(x, weight, bias, EPS, center, offset, round_first, out_dtype, group, scale_dtype, True)
    return kept, (kept[3], kept[4], kept[5] if center else None, kept[6], weight), bias, offset


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [*SHAPES, WIDE])
def test_norm_parity(twin, same_codes, device, shape, form):
    center, offset, round_first, weight_dtype, bias_dtype, out_dtype = FORMS[form]
    group, scale_dtype = KEPT[(len(form) + shape[0]) % len(KEPT)]
    x = sample(*shape, FP32 if shape[0] == 37 else BF16)
    weight, bias = vectors(shape[1], weight_dtype, bias_dtype)
    arguments = (EPS, center, offset, round_first, out_dtype, group, scale_dtype, True)
    y, _, _, x_q, x_s, mean, rstd = norm_ref(x, weight, bias, *arguments)
    actual = twin.norm(*to(device, x, weight, bias), *arguments)
    truth = norm64(x, weight, bias, center, offset)
    assert actual[0].dtype == out_dtype and actual[0].shape == x.shape
    assert as_exact(actual[0], y, truth)
    if out_dtype == BF16 or (round_first and x.dtype == BF16):  # where the last float32 bit is seldom seen
        assert (actual[0].cpu() != y).sum() <= 1e-3 * y.numel(), "rounded where the reference rounds"
    # exactly what quantize makes of y
    y_q, _, y_s = ck.quantize(actual[0])
    assert torch.equal(actual[1].float(), y_q.float()) and torch.equal(actual[2], y_s)
    same_codes(actual[3], x_q)
    assert torch.equal(actual[4].cpu(), x_s), "scales are bitwise equal"
    # a sum of 16 numbers in each thread, then of pairs: less than 32 roundings on the way to each
    bound = 32 * 2**-24
    assert ((actual[6].cpu() - rstd).abs() <= bound * rstd).all()
    if center:
        assert ((actual[5].cpu() - mean).abs() <= bound * x.float().abs().mean(1)).all()
    else:
        assert actual[5].numel() == 0


@pytest.mark.parametrize(("group", "scale_dtype"), KEPT)
def test_norm_parity_of_kept_groups(twin, device, group, scale_dtype):
    """Every format of the scales, and exactly what quantize makes of x."""
    x = sample(9, 200)
    actual = twin.norm(x.to(device), None, None, EPS, False, 0.0, True, BF16, group, scale_dtype, False)
    assert actual[1].numel() == actual[2].numel() == 0
    power_of_two = scale_dtype == E8M0
    x_q, _, x_s = ck.quantize(
        x.to(device), E4M3, "group", group_size=group, power_of_two=power_of_two, scale_dtype=scale_dtype
    )
    assert torch.equal(actual[3].float(), x_q.float()) and torch.equal(actual[4], x_s)


def test_norm_parity_keeps_nothing_and_strided(twin, device):
    """Rows that lie apart, rows and a weight that are not dense, and no group."""
    wide = sample(40, 300)
    weight = vectors(400, BF16, None)[0][::2]
    for x in (wide[::2, 8:208], wide.t()[:200, :40].t()):
        for center in (False, True):
            arguments = (None, EPS, center, 0.0, True, BF16, 0, E8M0, False)
            expected = norm_ref(x, weight, *arguments)
            actual = twin.norm(x.to(device), weight.to(device), *arguments)
            truth = norm64(x, weight, None, center, 0.0)
            assert as_exact(actual[0], expected[0], truth)
            assert all(actual[i].numel() == 0 for i in (1, 2, 3, 4))


@pytest.mark.parametrize("form", ["llama", "gemma", "no weight", "layernorm", "layernorm bare"])
@pytest.mark.parametrize("shape", [*SHAPES, WIDE])
def test_norm_backward_parity(twin, device, shape, form):
    group, scale_dtype = KEPT[(len(form) + shape[0]) % len(KEPT)]
    _, kept, _, offset = kept_case(shape, form, group, scale_dtype)
    dx_dtype = FP32 if shape[0] in (1, 37) else BF16
    dy = sample(shape[0], shape[1] + 16, dx_dtype)[:, 16:]  # rows apart
    some = [(True, False), (False, True), (False, False)] if shape[0] == 37 else []
    for dw, db in [*some, (True, True)]:
        arguments = (dy, *kept, offset, group, dx_dtype, dw, db)
        expected = norm_backward_ref(*arguments)
        truth = backward64(*arguments)
        actual = twin.norm_backward(*to(device, *arguments))
        assert actual[0].dtype == dx_dtype and actual[1].shape == expected[1].shape == (dw + db, shape[1])
        for a, e, t in zip(actual, expected, truth, strict=True):
            assert as_exact(a, e, t)
    again = twin.norm_backward(*to(device, *arguments))
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), "sums have a fixed order"


def backward64(dy, x_q, x_s, mean, rstd, weight, offset, group, dx_dtype, dw, db):
    """norm_backward_ref in float64; codes times scales are exact in float32."""
    x = ck.dequantize(x_q, x_s, group_size=group, dtype=FP32).double()
    xhat = (x if mean is None else x - mean.double()[:, None]) * rstd.double()[:, None]
    dy = dy.double()
    g = dy if weight is None else dy * (weight.double() + offset)
    dx = g - xhat * (g * xhat).mean(1, keepdim=True) - (0 if mean is None else g.mean(1, keepdim=True))
    sums = [(dy * xhat).sum(0)] * dw + [dy.sum(0)] * db
    return dx * rstd.double()[:, None], torch.stack(sums) if sums else dy.new_empty(0, dy.shape[1])


@pytest.mark.parametrize("form", ["llama", "gemma", "no weight", "layernorm", "layernorm no bias"])
@pytest.mark.parametrize("shape", [(1, 64), (37, 100), (40, 257), (70, 16), (0, 48)])
def test_norm_transposed_parity(twin, same_codes, device, shape, form):
    for group, scale_dtype in KEPT:
        forward, kept, bias, offset = kept_case(shape, form, group, scale_dtype)
        scale = forward[2].amax().view(1, 1) if shape[0] else torch.ones(1, 1)
        arguments = (*kept, bias, scale, offset, group)
        expected = norm_transposed_ref(*arguments)
        actual = twin.norm_transposed(*to(device, *arguments))
        assert actual.shape == (shape[1], -(-shape[0] // 16) * 16)
        same_codes(actual, expected)
        assert not actual[:, shape[0] :].view(torch.uint8).any()


@pytest.mark.parametrize("form", ["llama", "gemma", "no weight", "layernorm", "layernorm no bias"])
@pytest.mark.parametrize("shape", [*SHAPES, WIDE])
def test_norm_values_parity(twin, device, shape, form):
    group, scale_dtype = KEPT[(len(form) + shape[0]) % len(KEPT)]
    _, (*kept, weight), bias, offset = kept_case(shape, form, group, scale_dtype)
    x_q, x_s, mean, rstd = kept
    x = ck.dequantize(x_q, x_s, group_size=group, dtype=FP32).double()  # exact
    truth = (x if mean is None else x - mean.double()[:, None]) * rstd.double()[:, None]
    truth = truth if weight is None else truth * (weight.double() + offset)
    truth = truth if bias is None else truth + bias.double()
    for dtype in (BF16, FP32):
        arguments = (*kept, weight, bias, offset, group, dtype)
        actual = twin.norm_values(*to(device, *arguments))
        assert actual.shape == shape and actual.dtype == dtype
        assert as_exact(actual, norm_values_ref(*arguments), truth)


def plain(form, x, weight, bias):
    """The forms as transformers writes them."""
    if form.startswith("layernorm"):
        return layer_norm(x, x.shape[-1:], weight, bias, EPS)
    xhat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    if form.startswith("llama"):
        return weight * xhat.to(x.dtype)
    if form == "gemma":
        return (xhat * (1.0 + weight.float())).type_as(x)
    return (weight * xhat).to(x.dtype) if form == "olmo2" else xhat.to(x.dtype)


@pytest.mark.parametrize("form", ["llama", "llama fp32 weight", "gemma", "olmo2", "no weight", "layernorm"])
def test_norm_is_what_transformers_computes(device, form):
    """Equal but where a last bit of rstd moves a value across a rounding boundary. The default dtype is theirs too."""
    center, offset, round_first, weight_dtype, bias_dtype, _ = FORMS[form]
    x = sample(37, 100).to(device)
    weight, bias = to(device, *vectors(100, weight_dtype, bias_dtype))
    y = ck.norm(x, weight, bias, eps=EPS, center=center, offset=offset, round_first=round_first).y
    expected = plain(form, x, weight, bias)
    assert y.dtype == expected.dtype
    assert (y == expected).float().mean() >= 0.999
    if weight is not None and not center:
        other = ck.norm(x, weight, bias, eps=EPS, offset=offset, round_first=not round_first, out_dtype=y.dtype).y
        assert (other == expected).float().mean() < 0.99, "the order of the roundings can be seen"


class _Parts:
    """y and its leaves of the same quantized mathematics, in one dtype, for autograd to differentiate.

    The values of mean and rstd are those of the forward, before x was quantized; what the kept x lacks to give them is
    a constant.
    """

    def __init__(self, dtype, x, mean, rstd, weight, bias, offset):
        self.x = x.to(dtype).requires_grad_()
        self.weight = None if weight is None else weight.to(dtype).requires_grad_()
        self.bias = None if bias is None else bias.to(dtype).requires_grad_()
        centered = self.x
        if mean is not None:
            m = self.x.mean(1)
            centered = self.x - (m + (mean.to(dtype) - m).detach())[:, None]
        # a sum of squares about the mean does not change with the mean
        square = (self.x - (self.x - centered).detach()).square().mean(1)
        xhat = centered * (square + (rstd.to(dtype) ** -2 - square).detach()).rsqrt()[:, None]
        self.y = xhat if weight is None else xhat * (self.weight + offset)
        self.y = self.y if bias is None else self.y + self.bias

    def gradients(self, dy):
        self.y.backward(dy.to(self.y.dtype))
        return [leaf.grad for leaf in (self.x, self.weight, self.bias) if leaf is not None]


@pytest.mark.parametrize("form", ["llama", "gemma", "no weight", "layernorm", "layernorm bare"])
@pytest.mark.parametrize("shape", [(2, 3, 64), (37, 100), (40, 257)])
def test_gradients_against_autograd_in_float64(device, shape, form):
    center, offset, round_first, weight_dtype, bias_dtype, _ = FORMS[form]
    width = shape[-1]
    x = sample(torch.Size(shape[:-1]).numel(), width).view(shape).to(device)
    weight, bias = to(device, *vectors(width, weight_dtype, bias_dtype))
    dy = sample(x.numel() // width + 1, width, FP32)[1:].to(device)
    kept = ck.norm(x, weight, bias, eps=EPS, center=center, offset=offset, round_first=round_first, group_size=32)
    dx, dw, db = ck.norm_backward(
        dy.view(shape), kept.x_q, kept.x_s, kept.mean, kept.rstd, weight, offset=offset, group_size=32,
        dx_dtype=FP32, bias=bias is not None,
    )  # fmt: skip
    actual = [gradient for gradient in (dx, dw, db) if gradient is not None]
    x = ck.dequantize(kept.x_q, kept.x_s, group_size=32, dtype=FP32)
    parts = (x, kept.mean, kept.rstd, weight, bias, offset)
    truth, plain32 = (_Parts(dtype, *parts).gradients(dy) for dtype in (torch.float64, FP32))
    for a, t, p in zip(actual, truth, plain32, strict=True):
        assert as_exact(a, p, t)


@pytest.mark.parametrize("center", [False, True])
def test_gradients_of_what_fp8_holds_are_torchs(device, center):
    """Where x survives quantization, nothing is left of it in the gradients: they are those of torch's own norms."""
    x = sample(20, 96, FP32).to(device)
    x = ck.dequantize(*ck.quantize(x, E4M3, "group", group_size=32)[::2], group_size=32, dtype=FP32)
    weight, bias = to(device, *vectors(96, FP32, FP32 if center else None))
    dy = sample(21, 96, FP32)[1:].to(device)
    kept = ck.norm(x, weight, bias, eps=EPS, center=center, round_first=False, group_size=32)
    assert torch.equal(ck.dequantize(kept.x_q, unpacked(kept.x_s), group_size=32, dtype=FP32), x)
    actual = ck.norm_backward(
        dy, kept.x_q, kept.x_s, kept.mean, kept.rstd, weight, group_size=32, dx_dtype=FP32, bias=center
    )
    results = []
    for dtype in (torch.float64, FP32):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
        y = layer_norm(leaves[0], (96,), *leaves[1:], EPS) if center else rms_norm(leaves[0], (96,), leaves[1], EPS)
        y.backward(dy.to(dtype))
        results.append([leaf.grad for leaf in leaves])
    for a, t, p in zip([gradient for gradient in actual if gradient is not None], *results, strict=True):
        assert as_exact(a, p, t)


def unpacked(stored):
    return (stored.int() << 23).view(FP32)


def test_what_is_made_again_is_the_output(same_codes, device):
    """Where x survives quantization, made again is made the same: what quantize makes of a float32 y."""
    x = sample(20, 96, FP32).to(device)
    x = ck.dequantize(*ck.quantize(x, E4M3, "group", group_size=32)[::2], group_size=32, dtype=FP32)
    weight, bias = to(device, *vectors(96, BF16, BF16))
    kept = ck.norm(x, weight, bias, eps=EPS, center=True, round_first=False, group_size=32, codes=True)
    scale = kept.y_s.amax().view(1, 1)
    _, expected, _ = ck.quantize(kept.y, E4M3, "tensor", scale=scale, codes=False, transposed=True)
    arguments = kept.x_q, kept.x_s, kept.mean, kept.rstd, weight, bias
    same_codes(ck.norm_transposed(*arguments, scale, group_size=32), expected)
    again = ck.norm_values(*arguments, group_size=32, dtype=FP32)
    assert as_exact(again, kept.y, norm64(x, weight, bias, True, 0.0))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter, for what is tested here
@pytest.mark.parametrize("which", ["reference", "twin"])
@pytest.mark.parametrize("center", [False, True])
def test_special_tokens(twin, device, center, which):
    """Zeros, constants, subnormal, NaN, inf and overflowing tokens have stated outcomes, and do not touch others."""
    forward, backward, transposed, values = (
        (twin.norm, twin.norm_backward, twin.norm_transposed, twin.norm_values)
        if which == "twin"
        else (norm_ref, norm_backward_ref, norm_transposed_ref, norm_values_ref)
    )
    x = sample(7, 64, FP32).to(device)
    x[0] = 0
    x[1] = 3.0  # constant: nothing is left of it about its mean
    x[2] = 1e-40  # subnormal
    x[3, 5] = float("nan")
    x[4, 5] = float("-inf")
    x[5, 5] = 1e30  # finite, but its square is not
    weight, bias = to(device, *vectors(64, FP32, FP32))
    options = (EPS, center, 0.0, True, FP32, 32, E8M0, True)
    y, y_q, y_s, x_q, x_s, mean, rstd = forward(x, weight, bias, *options)
    assert torch.equal(y[0], bias)
    assert torch.equal(y[1], bias) if center else torch.allclose(y[1], weight + bias, rtol=1e-6, atol=1e-6)
    assert torch.allclose(y[2], bias, rtol=0, atol=1e-35)
    assert x_s[0].eq(1).all() and not x_q[0].float().any(), "2**-126, the smallest normal scale"
    broken = slice(3, 6)
    for value in (y, y_s, rstd):
        assert value[broken].isnan().all() and not value[:3].isnan().any() and not value[6].isnan().any()
    assert x_s[3].tolist()[0] == x_s[4].tolist()[0] == 255, "a NaN in E8M0"
    alone = forward(x[6:], weight, bias, *options)
    assert torch.equal(y[6:], alone[0]) and torch.equal(y_q[6:].float(), alone[1].float())
    assert forward(x[:1], None, None, *options)[2].item() == SMALLEST_NORMAL

    dy = sample(8, 64, FP32)[1:].to(device)
    mean = mean if center else None
    kept = (x_q, x_s, mean, rstd, weight)
    dx, sums = backward(dy, *kept, 0.0, 32, FP32, True, True)
    again = values(*kept, bias, 0.0, 32, FP32)
    for value in (dx, again):
        assert value[broken].isnan().all() and value[:3].isfinite().all() and value[6].isfinite().all()
    assert sums[0].isnan().all() and sums[1].isfinite().all(), "dw has seen them, db has not"
    if which == "reference" or x.is_cuda:  # the interpreter makes numbers of NaN codes
        codes = transposed(*kept, bias, torch.ones(1, 1, device=device), 0.0, 32).float().t()
        assert codes[broken].isnan().all() and not codes[:3].isnan().any() and not codes[6:].isnan().any()


def test_leading_dimensions_are_flattened(device):
    x, weight = sample(24, 64).to(device), vectors(64, BF16, None)[0].to(device)
    options = dict(eps=EPS, group_size=16, codes=True)
    view, flat = ck.norm(x.view(2, 3, 4, 64), weight, **options), ck.norm(x, weight, **options)
    for a, b in zip(view, flat, strict=True):
        assert a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert ck.norm(x, eps=EPS)[1:6] == (None,) * 5
    grads = [
        ck.norm_backward(dy, flat.x_q, flat.x_s, None, flat.rstd, weight, group_size=16, dx_dtype=BF16)
        for dy in (x, x.view(4, 6, 64))
    ]
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    assert grads[0][2] is None


@pytest.mark.parametrize("center", [False, True])
def test_registration(device, center):
    """Fake and kernel agree (torch.library.opcheck)."""
    ops = torch.ops.coat_kernels
    x = sample(20, 128).to(device)
    weight, bias = to(device, *vectors(128, BF16, BF16 if center else None))
    options = (EPS, center, 0.0, True, FP32, 32, E8M0)
    torch.library.opcheck(ops.norm.default, (x, weight, bias, *options, True), test_utils=OPCHECKS)
    torch.library.opcheck(
        ops.norm.default, (x, None, None, EPS, center, 0.0, True, BF16, 0, E8M0, False), test_utils=OPCHECKS
    )
    kept = ck.norm(x, weight, bias, eps=EPS, center=center, group_size=32)[3:]
    for dw, db in ((True, center), (False, False)):
        arguments = (x, *kept, weight, 0.0, 32, BF16, dw, db)
        torch.library.opcheck(ops.norm_backward.default, arguments, test_utils=OPCHECKS)
    arguments = (*kept, weight, bias, torch.ones(1, 1, device=device), 0.0, 32)
    torch.library.opcheck(ops.norm_transposed.default, arguments, test_utils=OPCHECKS)
    arguments = (*kept, weight, bias, 0.0, 32, FP32)
    torch.library.opcheck(ops.norm_values.default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(2, 16, dtype=torch.int32)), "x is torch.int32"),
        (dict(x=torch.ones(2, 0)), r"\[2, 0\]"),
        (dict(weight=torch.ones(15)), r"weight is \[15\]"),
        (dict(bias=torch.ones(2, 16)), r"bias is \[2, 16\]"),
        (dict(weight=torch.ones(16).half()), "weight is torch.float16"),
        (dict(weight=None, offset=1.0), "offset is 1.0"),
        (dict(out_dtype=torch.float16), "out_dtype is torch.float16"),
        (dict(group_size=24), "group_size is 24"),
        (
            dict(x=torch.ones(2, 8192), weight=None, group_size=8192),
            "group_size is 8192, expected a power of two up to 4096",
        ),
        (dict(group_size=16, scale_dtype=torch.int8), "scale_dtype is torch.int8"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ck.norm(**{"x": torch.ones(2, 16), "weight": torch.ones(16), "eps": EPS, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dy=torch.ones(3, 16)), r"dy is \[3, 16\]"),
        (dict(x_q=torch.ones(2, 16)), "x_q is torch.float32"),
        (dict(x_s=torch.ones(2, 2, dtype=E8M0)), r"x_s is torch.uint8 \[2, 2\]"),
        (dict(rstd=torch.ones(3)), r"rstd is torch.float32 \[3\]"),
        (dict(mean=torch.ones(2).double()), "mean is torch.float64"),
        (dict(dx_dtype=torch.float16), "dx_dtype is torch.float16"),
        (dict(group_size=0), "group_size is 0"),
    ],
)
def test_bad_input_of_the_backward_is_named(change, message):
    x = torch.ones(2, 16)
    _, _, _, x_q, x_s, mean, rstd = ck.norm(x, eps=EPS, group_size=16)
    arguments = dict(dy=x, x_q=x_q, x_s=x_s, mean=mean, rstd=rstd, group_size=16, dx_dtype=FP32)
    with pytest.raises((TypeError, ValueError), match=message):
        ck.norm_backward(**{**arguments, **change})
    with pytest.raises(ValueError, match=r"scale is torch.float32 \[2, 1\]"):
        ck.norm_transposed(x_q, x_s, mean, rstd, None, None, torch.ones(2, 1), group_size=16)
    with pytest.raises(TypeError, match="dtype is torch.float16"):
        ck.norm_values(x_q, x_s, mean, rstd, None, None, group_size=16, dtype=torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(4099, 4096), (40000, 128), (70001, 64), (3000, 1024), (2050, 5120), (600, 8192)])
def test_gpu_at_size(same_codes, shape, center):
    """Grids of the size they are meant for; the references run on the GPU too."""
    x, dy = sample(*shape).cuda(), sample(shape[0] + 1, shape[1]).cuda()[1:]
    weight, bias = to("cuda", *vectors(shape[1], BF16, BF16 if center else None))
    options = (EPS, center, 0.0, not center, BF16, 128, E8M0, True)
    expected = norm_ref(x, weight, bias, *options)
    actual = ck.norm(x, weight, bias, eps=EPS, center=center, round_first=not center, group_size=128, codes=True)
    truth = norm64(x, weight, bias, center, 0.0)
    assert as_exact(actual.y, expected[0], truth)
    y_q, _, y_s = ck.quantize(actual.y)
    assert torch.equal(actual.y_q.float(), y_q.float()) and torch.equal(actual.y_s, y_s)
    same_codes(actual.x_q, expected[3])
    assert torch.equal(actual.x_s, expected[4])
    kept = (actual.x_q, actual.x_s, actual.mean, actual.rstd, weight)
    for a, e, t in zip(
        ck.norm_backward(dy, *kept, group_size=128, dx_dtype=BF16, bias=True),
        (lambda dx, sums: (dx, *sums))(*norm_backward_ref(dy, *kept, 0.0, 128, BF16, True, True)),
        (lambda dx, sums: (dx, *sums))(*backward64(dy, *kept, 0.0, 128, BF16, True, True)),
        strict=True,
    ):
        assert as_exact(a, e, t)
    scale = y_s.amax().view(1, 1)
    same_codes(
        ck.norm_transposed(*kept, bias, scale, group_size=128), norm_transposed_ref(*kept, bias, scale, 0.0, 128)
    )
    values = norm_values_ref(*kept, bias, 0.0, 128, BF16)
    assert as_exact(
        ck.norm_values(*kept, bias, group_size=128, dtype=BF16),
        values,
        norm_values_ref(*kept, bias, 0.0, 128, FP32).double(),
    )


@pytest.mark.gpu
def test_gpu_new_lengths_do_not_compile_anew(monkeypatch):
    triton = pytest.importorskip("triton")
    weight = torch.ones(192, device="cuda", dtype=BF16)

    def step(tokens):
        x = torch.randn(tokens, 192, device="cuda", dtype=BF16)
        kept = ck.norm(x, weight, eps=EPS, group_size=32, codes=True)
        ck.norm_backward(x, *kept[3:], weight, group_size=32, dx_dtype=BF16)
        ck.norm_transposed(*kept[3:], weight, None, kept.y_s.amax().view(1, 1), group_size=32)
        ck.norm_values(*kept[3:], weight, None, group_size=32, dtype=BF16)

    step(4096)
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **details: compiled.append(details["repr"]), raising=True
    )
    for tokens in (1, 2, 16, 17, 1000, 4095, 65536, 65537):
        step(tokens)
    assert compiled == []

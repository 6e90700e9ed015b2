"""adamw_step: the Triton twin against the reference, and what encoded moments must hold for any input."""

import copy
import importlib
import math

import pytest
import torch
from coat_kernels.adamw import adamw_step, adamw_step_ref
from coat_kernels.states import (
    StateFormat,
    Weights,
    choose_expansion,
    decode_groups,
    decode_moments,
    encode_groups,
    encode_moments,
    group_shape,
    hashed,
    join_master,
    read_weights,
    round_stochastically,
    split_master,
    spread,
    weight_key,
)

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
# one row, ragged rows, off every tile, 3-D, empty, 0-D, 1-D, rows of whole groups, one value, rows below a group
SHAPES = [(1, 64), (37, 100), (13, 257), (3, 5, 130), (0, 48), (5, 0), ()]
SHAPES += [(1000,), (64, 256), (1,), (16, 3, 3, 3), (4, 24)]

# The twin's log2 of a code is off by 2**-22 of its value, at most 9. The power 1 / k makes that 9 * 2**-22 * ln(2) / k
# of the decoded value: 1.2e-5 for k = 1/8, and assert_close checks that k is no smaller. Rounding the exponent (up to
# 36) and exp2 add 6e-6. The error of m is relative to the sizes of its two terms, which may cancel.
DECODED = 2.0**-15


@pytest.fixture
def twin(monkeypatch):
    """The Triton launcher; in the interpreter, where a tile costs what an operation costs, with larger tiles."""
    module = pytest.importorskip("coat_kernels.adamw_triton", reason="Triton is not installed")
    shared = importlib.import_module("coat_kernels.states_triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(shared, "CUTS", {f: cut._replace(tile=16384) for f, cut in shared.CUTS.items()})
        monkeypatch.setattr(shared, "MOST_GROUPS", 16384)
    return module.adamw_step


class Case:
    """Parameters with their states; ``run`` steps them with an implementation of the op, on its device."""

    def __init__(self, params, format="paper", weights="nearest", group_size=128, **options):
        self.format, self.weights, self.group_size = StateFormat(format), Weights(weights), group_size
        self.options = OPTIONS | options
        self.params = [p.clone() for p in params]
        sides = [group_shape(p.shape, group_size) for p in params]
        self.moments = []  # of each: codes, scales, expansions
        for _ in range(2):
            expansions = [torch.full(side, 16, dtype=torch.uint8) for side in sides if self.format.expands]
            codes = [torch.zeros(p.shape, dtype=torch.uint8) for p in params]
            self.moments.append([codes, [torch.zeros(side) for side in sides], expansions])
        self.residuals = []
        if self.weights is Weights.MASTER:
            shapes = [p.shape if p.dtype == torch.bfloat16 else (0,) for p in params]
            self.residuals = [torch.zeros(shape, dtype=torch.uint8) for shape in shapes]
        self.steps = [torch.zeros(()) for _ in params]
        self.skipped = torch.zeros(1, dtype=torch.int64)
        self.firsts = [0] * len(params)

    def copy(self):
        return copy.deepcopy(self)

    def lists(self):
        """The lists of tensors that the op changes, in its order but for the skipped."""
        return [self.params, *self.moments[0], *self.moments[1], self.residuals]

    def tensors(self):
        return [*(t for tensors in self.lists() for t in tensors), self.skipped]

    def settings(self):
        numbers = list(range(len(self.params)))
        return self.group_size, self.format.value, self.weights.value, 3, numbers, self.firsts

    def run(self, step, grads, device="cpu"):
        for t in self.steps:
            t += 1
        margin = 64  # values on both sides of each tensor, which nobody may touch
        buffers, moved = [], []
        for t in self.tensors():
            buffer = torch.full((t.numel() + 2 * margin,), 77, dtype=t.dtype, device=device)
            moved.append(buffer[margin : margin + t.numel()].view(t.shape))
            moved[-1].copy_(t)
            buffers.append(buffer)
        rest = iter(moved)
        params, *states = [[next(rest) for _ in tensors] for tensors in self.lists()]
        lr, *others = self.options.values()
        lr = torch.tensor(lr, dtype=torch.float64)
        grads = [g.to(device) for g in grads]
        with torch.no_grad():
            step(params, grads, *states, self.steps, moved[-1], lr, *others, *self.settings())
        for t, result, buffer in zip(self.tensors(), moved, buffers, strict=True):
            assert (buffer[:margin] == 77).all() and (buffer[margin + t.numel() :] == 77).all()
            t.copy_(result)
        return self

    def encoded(self, i):
        return [
            (codes[i], scales[i], expansions[i] if expansions else None) for codes, scales, expansions in self.moments
        ]

    def decoded(self, i):
        return decode_moments(self.encoded(i), self.group_size, self.format)

    def master(self, i):
        return read_weights(
            self.params[i], self.residuals[i] if self.residuals and self.residuals[i].numel() else None
        )


def sample(shapes=SHAPES, seed=0):
    """Parameters of both dtypes, and gradients (of both, too) over many binades, with some zeros."""
    generator = torch.Generator().manual_seed(seed)
    params = [
        torch.randn(s, generator=generator).to([torch.bfloat16, torch.float32][i % 2]) for i, s in enumerate(shapes)
    ]

    def grads():
        for i, s in enumerate(shapes):
            g = torch.randn(s, generator=generator) * torch.exp(2 * torch.randn(s, generator=generator))
            g[torch.rand(s, generator=generator) < 0.01] = 0
            yield g.to([torch.bfloat16, torch.float32][i // 2 % 2])

    return params, lambda: list(grads())


def assert_close(actual, expected, before, grads):
    """``actual``, from the twin, is ``expected``, from the reference, but for what inexact log2 and exp2 explain."""
    lr, beta1, beta2, eps, _ = expected.options.values()
    assert torch.equal(actual.skipped, expected.skipped)
    lean = expected.format is StateFormat.LEAN
    groups = different = values = unequal = 0
    for i, grad in enumerate(grads):
        m, v = before.decoded(i)
        terms = [beta1 * m.abs() + (1 - beta1) * grad.float().abs(), beta2 * v + (1 - beta2) * grad.float() ** 2]
        step = expected.steps[i].item()
        denominator = (terms[1] / (1 - beta2**step)).sqrt() + eps
        bound = 2 * DECODED * lr / (1 - beta1**step) * terms[0] / denominator
        new, old = expected.master(i), actual.master(i)
        bits = 7 if expected.params[i].dtype == torch.bfloat16 else 22
        ulp = 2.0 ** -(15 if bits == 7 and expected.weights is Weights.MASTER else bits)
        assert ((old - new).abs() <= bound + ulp * new.abs()).all()
        for moment, (a, b) in enumerate(zip(actual.encoded(i), expected.encoded(i), strict=True)):
            different_groups = torch.zeros(b[1].shape, dtype=torch.bool)
            if lean:
                # that of the first moment is relative to a root with errors of its own
                assert ((a[1] - b[1]).abs() <= b[1] * 2 * DECODED + DECODED * 2.0**-9).all()
            else:
                side = group_shape(grad.shape, expected.group_size)
                largest = encode_moments([terms[moment]], expected.group_size, StateFormat.E4M3)[0][1].view(side)
                assert ((a[1] - b[1]).abs() <= DECODED * largest).all(), "scales"
            if expected.format.expands:
                different_groups = a[2] != b[2]
                assert ((a[2].int() - b[2].int()).abs() <= 1).all(), "expansions"
            groups, different = groups + different_groups.numel(), different + int(different_groups.sum())
            other = spread(different_groups, grad.shape, expected.group_size)
            # Under the same scale and expansion at most one code apart; else both within a rounding, at worst from 2.5
            # to 2 or 3 times 2**-9, of the same number.
            kind = torch.uint8 if moment else torch.int8
            q, r = (x[0].view(kind if lean else torch.float8_e4m3fn).float() for x in (a, b))
            steps = (q - r).abs() if lean else ((a[0] & 127).int() - (b[0] & 127).int()).abs()
            assert (steps[~other] <= 1).all() and ((q * r >= 0) | (steps <= 1)).all()
            values, unequal = values + q.numel(), unequal + int(((q != r) & ~other).sum())
            if expected.format.expands and b[2].numel():
                x, y = actual.decoded(i)[moment], expected.decoded(i)[moment]
                ratio = (x / y)[other & (y != 0)].log2().abs()
                power = b[2].min().item() / 16
                assert power >= 1 / 8 and (ratio <= 2 * math.log2(1.25) / power).all()
    assert different <= max(1, groups / 1000)
    assert unequal <= values / 1000


MODES = [("paper", "nearest"), ("e4m3", "stochastic"), ("lean", "nearest"), ("lean", "stochastic"), ("lean", "master")]


@pytest.mark.parametrize(
    ("format", "weights", "group_size"),
    [(*mode, 128) for mode in MODES] + [("paper", "master", 100), ("lean", "nearest", 16), ("paper", "nearest", 1)],
)
def test_parity(twin, device, format, weights, group_size):
    params, grads = sample()
    expected = Case(params, format, weights, group_size)
    for _ in range(2):
        before, g = expected.copy(), grads()
        actual = before.copy().run(twin, g, device)
        assert_close(actual, expected.run(adamw_step_ref, g), before, g)


@pytest.mark.parametrize("mode", [MODES[0], MODES[4]])
def test_parity_of_many_programs(mode, device):
    """The tiles as they are: several programs per parameter, several tiles per program, a search among parameters."""
    twin = pytest.importorskip("coat_kernels.adamw_triton", reason="Triton is not installed").adamw_step
    params, grads = sample([(70, 128), (3, 128), (1, 100), (4, 256), (2, 1000), (2, 128)])
    params = [p.bfloat16() for p in params]  # all of one kind: one launch
    expected, g = Case(params, *mode), [x.bfloat16() for x in grads()]
    before = expected.copy()
    actual = before.copy().run(twin, g, device)
    assert_close(actual, expected.run(adamw_step_ref, g), before, g)
    again = before.copy().run(twin, g, device)
    assert all(torch.equal(a, b) for a, b in zip(actual.tensors(), again.tensors(), strict=True)), "deterministic"


@pytest.mark.parametrize("implementation", ["reference", "twin"])
def test_strides_do_not_matter(implementation, request, device):
    step = request.getfixturevalue("twin") if implementation == "twin" else adamw_step_ref
    device = device if implementation == "twin" else "cpu"
    x, g = torch.randn(4, 6, 3, 5).to(device), torch.randn(4, 6, 3, 5).to(device)
    layouts = [
        (x, g),
        (x.to(memory_format=torch.channels_last), g),
        (x, g.to(memory_format=torch.channels_last)),
        (x.transpose(0, 2).contiguous().transpose(0, 2), g[:1, :1, :1, :1].expand_as(g) * 0 + g),
        (torch.zeros(4, 6, 3, 11, device=device)[..., 1::2].copy_(x), g),
    ]
    results = []
    for p, grad in layouts:
        p = p.clone(memory_format=torch.preserve_format) if p.is_contiguous() else p
        case = Case([x.cpu()])
        states = [[t.to(device) for t in tensors] for tensors in case.lists()[1:]]
        skipped = torch.zeros(1, dtype=torch.int64, device=device)
        version, stride = p._version, p.stride()
        options = (torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.0, *case.settings())
        step([p], [grad], *states, [torch.ones(())], skipped, *options)
        assert p._version > version and p.stride() == stride
        results.append([p.clone(memory_format=torch.contiguous_format), *(t for tensors in states for t in tensors)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_where_steps_are_counted_changes_nothing_but_roundings(twin, device):
    """Steps on the device, which a CUDA graph needs, give the same factors and the same chance."""
    if device == "cpu":
        pytest.skip("the CPU is host and device at once")
    params, grads = sample()
    case, g = Case(params, "lean", "stochastic"), grads()
    other = case.copy()
    case.run(twin, g, device)
    other.steps = [t.to(device) for t in other.steps]
    other.run(twin, g, device)
    assert_close(other, case, Case(params, "lean", "stochastic"), g)


@pytest.mark.parametrize("implementation", ["reference", "twin"])
def test_pieces_are_rounded_as_the_whole(implementation, request, device):
    """Chance is of a value's place in the whole parameter: two processes that share its rows end at the same bits."""
    step = request.getfixturevalue("twin") if implementation == "twin" else adamw_step_ref
    device = device if implementation == "twin" else "cpu"
    x, g = torch.randn(7, 300).bfloat16(), torch.randn(7, 300)
    whole, *pieces = (Case([x[rows]], "lean", "stochastic") for rows in (slice(7), slice(4), slice(4, 7)))
    pieces[1].firsts = [4 * 300]
    whole.run(step, [g], device)
    for piece, rows in zip(pieces, (slice(4), slice(4, 7)), strict=True):
        piece.run(step, [g[rows]], device)
    assert torch.equal(torch.cat([piece.params[0] for piece in pieces]), whole.params[0])
    elsewhere = Case([x[4:]], "lean", "stochastic").run(step, [g[4:]], device)
    assert not torch.equal(elsewhere.params[0], pieces[1].params[0]), "it does depend on the place"


@pytest.mark.parametrize("implementation", ["reference", "twin"])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("mode", [MODES[0], MODES[1], MODES[2], MODES[4]])
def test_amax_is_of_the_weights_as_stored(implementation, mode, request, device):
    """Also of groups that are skipped; zero without values, NaN or inf where a weight is; nothing else changes."""
    step = request.getfixturevalue("twin") if implementation == "twin" else adamw_step_ref
    device = device if implementation == "twin" else "cpu"
    params, grads = sample([(3, 5, 130), (0, 48), (), (50,), (2, 300), (3, 140), (2, 64), (2, 64)])
    params[-4][1, 140], params[-3][2, 139] = -50.0, 60.0
    params[-2][0, 3], params[-1][1, 0] = math.inf, math.nan
    case = Case(params, *mode)
    plain, amax = case.copy(), torch.full((len(params),), 77.0, device=device)
    for _ in range(2):
        g = grads()
        g[-4][1, 130], g[-3][2, 139] = math.nan, math.inf  # in the groups of the two large weights
        case.run(lambda *arguments: step(*arguments, amax), g, device)
        plain.run(step, g, device)
        expected = torch.stack([p.float().abs().amax() if p.numel() else torch.zeros(()) for p in case.params])
        assert torch.equal(amax.cpu().nan_to_num(77.0), expected.nan_to_num(77.0)) and amax[-1].isnan()
        assert amax[-4] == 50 and amax[-3] == 60 and case.skipped.item() % 2 == 0
    for a, b in zip(case.tensors(), plain.tensors(), strict=True):
        assert torch.equal(a.float().nan_to_num(77.0), b.float().nan_to_num(77.0))


def test_amax_of_many_programs(device):
    """The tiles as they are, whichever program has the largest value; a number for each parameter of each launch."""
    twin = pytest.importorskip("coat_kernels.adamw_triton", reason="Triton is not installed").adamw_step
    params, grads = sample([(40, 128), (3, 128), (1, 100), (17, 257)])
    for i, p in enumerate(params):
        p.view(-1)[(i * 37 + 11) * 97 % p.numel()] = -9.0 - i
    for mode in (MODES[0], (*MODES[2], 1024), MODES[3]):  # with 1024 a tile is a group
        case, amax = Case(params, *mode), torch.empty(len(params), device=device)
        case.run(lambda *arguments: twin(*arguments, amax), grads(), device)  # noqa: B023
        assert torch.equal(amax.cpu(), torch.stack([p.float().abs().amax() for p in case.params]))


# --- what encoding does with a group


def encode_moment(x, group_size, expand=True):
    """Codes, scale and expansion of a first moment in E4M3."""
    codes, scale, expansion = encode_moments([x], group_size, StateFormat.PAPER if expand else StateFormat.E4M3)[0]
    return codes, scale, expansion


def decode_moment(codes, scale, expansion, group_size):
    format = StateFormat.E4M3 if expansion is None else StateFormat.PAPER
    return decode_moments([(codes, scale, expansion)], group_size, format)[0]


def as_second(v, group_size, format):
    """Codes of a second moment, and what they decode to, beside a first one that is its root."""
    encoded = encode_moments([v.sqrt(), v], group_size, format)
    return encoded[1][0], decode_moments(encoded, group_size, format)[1]


def special_groups():
    """Groups of 128 values that break naive versions of dynamic range expansion."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(128, generator=generator)
    signs = torch.where(torch.arange(128) % 3 == 0, -1.0, 1.0)
    one_hot = torch.zeros(128)
    one_hot[17] = -3e-5
    some_zeros = normal.clone()
    some_zeros[::5] = 0
    wide = torch.exp2(torch.linspace(-120, 120, 128)) * signs
    return {
        "zeros": torch.zeros(128),
        "some zeros": some_zeros,
        "constant": torch.full((128,), 0.37),
        "mixed-sign constant": 0.37 * signs,
        "one-hot": one_hot,
        "subnormal": torch.full((128,), 1e-40) * signs,
        "subnormal beside normal": torch.where(torch.arange(128) == 5, 1.0, 1e-42) * normal.abs(),
        "smallest normal": torch.full((128,), 2.0**-126),
        "huge": normal * 1e30,
        "largest": torch.full((128,), torch.finfo(torch.float32).max) * signs,
        "tiny": normal * 1e-30,
        "240 binades": wide,
    }


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("name", special_groups())
def test_special_groups(name, expand):
    x = special_groups()[name]
    codes, scale, expansion = encode_moment(x, 128, expand=expand)
    decoded = decode_moment(codes, scale, expansion, 128)
    x = torch.where(x.abs() < 2.0**-126, 0.0, x)  # what counts as zero
    assert scale == x.abs().max() and decoded.isfinite().all()
    assert (decoded[x == 0] == 0).all()
    assert (decoded[decoded != 0].sign() == x[decoded != 0].sign()).all()
    if not x.any():
        assert expansion == (16 if expand else None)
    elif x.abs().min() == x.abs().max() or name == "one-hot":
        assert torch.equal(decoded, x) and expansion == (255 if expand else None)
    elif expand:
        # The smallest code is 2 * 2**-9 or more, hence off by at most 1.25 times: the k-th root of that when decoded.
        assert (decoded[x != 0] != 0).all()
        error = (decoded / x)[x != 0].log2().abs()
        assert (error <= math.log2(1.25) * 16 / expansion * (1 + 1e-5)).all()
    else:
        assert (decoded - x).abs().max() <= scale / 28  # half a step at 448, and less below


def test_zeros_do_not_spoil_the_group():
    """A zero in front changes nothing for the others: it has no part in the minimum."""
    x = torch.randn(64, 127)
    alone = decode_moment(*encode_moment(x, 127), 127)
    beside = decode_moment(*encode_moment(torch.cat([torch.zeros(64, 1), x], dim=1), 128), 128)
    assert torch.equal(beside[:, 1:], alone) and not beside[:, 0].any()


@pytest.mark.parametrize("format", list(StateFormat))
def test_second_moment_never_becomes_zero(format):
    """v = 0 beside m != 0 would make the step m / eps. The smallest of v gets a code, whatever stands beside it."""
    x = torch.exp2(torch.empty(256, 128).uniform_(-90, 90, generator=torch.Generator().manual_seed(0)))
    x[:, 0] = 2.0**-107
    x[:128, 1] = 1e38
    codes, decoded = as_second(x, 128, format)
    assert (codes > 0).all() and (decoded > 0).all()
    plain = encode_moment(x, 128, expand=format.expands)[0]
    if format is StateFormat.PAPER:
        assert torch.equal(codes, plain), "expanded groups do not need the rule"
    elif format is StateFormat.E4M3:
        assert (plain == 0).any(), "plain E4M3 does"


@pytest.mark.parametrize("name", special_groups())
def test_special_groups_in_lean(name):
    """v within its code's rounding or at the smallest code; m / sqrt(v) within half a step of its group's largest."""
    g = special_groups()[name]
    g = torch.where(g.abs() < 1e18, g, g.sign() * 1e18)  # squares that float32 can hold
    m, v = 0.3 * g, g * g
    encoded = encode_moments([m, v], 128, StateFormat.LEAN)
    m_again, v_again = decode_moments(encoded, 128, StateFormat.LEAN)
    some = v >= 2.0**-126
    assert m_again.isfinite().all() and v_again.isfinite().all()
    assert not m_again[~some].any() and not v_again[~some].any() and (v_again[some] > 0).all()
    root, again = v[some].sqrt(), v_again[some].sqrt()
    if some.any():
        top = root.max()
        # codes are half a step of sqrt(root / top) off, 1 / 510, at most; the smallest is 1
        apart = ((again / top).sqrt() - (root / top).sqrt()).abs()
        assert ((apart <= 1 / 510 + 1e-6) | ((again / top <= 1 / 65025 * 1.001) & (root < again))).all()
        ratio = m[some] / root
        assert (m_again[some] / again - ratio).abs().max() <= ratio.abs().max() * (1 / 254 + 1e-6)
        assert v_again.max() == pytest.approx(v.max().item(), rel=1e-6)


def test_lean_keeps_what_it_has_decoded():
    """Encoded again and again, codes and scales stay as they are: nothing drifts."""
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(64, 300, generator=generator) * torch.exp(2 * torch.randn(64, 300, generator=generator))
    g[torch.rand(64, 300, generator=generator) < 0.05] = 0
    moments = [g * torch.rand(64, 300, generator=generator), g * g]
    encoded = encode_moments(moments, 128, StateFormat.LEAN)
    (codes, scale, _), (v_codes, v_scale, _) = encoded
    for _ in range(20):
        encoded = encode_moments(decode_moments(encoded, 128, StateFormat.LEAN), 128, StateFormat.LEAN)
        assert torch.equal(encoded[0][0], codes) and torch.equal(encoded[1][0], v_codes)
    for first, last in ((scale, encoded[0][1]), (v_scale, encoded[1][1])):
        assert (last / first - 1).abs().nan_to_num().max() <= 20 * 2.0**-22, "rounded twice in each round"


def test_expansion_follows_the_formula():
    generator = torch.Generator().manual_seed(2)
    spread = torch.empty(5000, 1).uniform_(0.01, 200, generator=generator)
    magnitude = torch.exp2(-spread * torch.rand(5000, 128, generator=generator) + 60)
    expansion = choose_expansion(magnitude, magnitude.amax(dim=1))
    for group, e in zip(magnitude.double(), expansion.tolist(), strict=True):
        ratio = float(group.max()) / float(group.min())
        assert e == min(255, max(1, math.floor(16 * math.log2(448**2 / 2) / math.log2(ratio))))
    assert expansion.unique().numel() > 100


def test_every_code_survives_every_expansion():
    """Decoding and encoding under the same scale and expansion changes no code (of values that float32 can hold)."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127].expand(255, -1).contiguous()  # without the NaNs
    expansion = torch.arange(1, 256).to(torch.uint8)
    scale = torch.full((255,), 0.7)
    values = decode_groups(codes, scale, expansion)
    again = encode_groups(values, scale, expansion, False)
    kept = (values.abs() >= 2.0**-126) | (codes & 127 == 0)
    assert torch.equal(again[kept], codes[kept])
    assert kept[2:].all(), "only below k = 3/16 is float32 too narrow"
    assert torch.equal(values[:, 126], scale), "the largest code is the scale itself"


def test_wide_groups_settle():
    """Encoded again and again, groups wider than 2**8 reach codes, scales and expansions that stay."""
    generator = torch.Generator().manual_seed(3)
    x = torch.exp2(
        -torch.empty(1000, 1).uniform_(8, 60, generator=generator) * torch.rand(1000, 128, generator=generator)
    )
    x[:, 0], x[:, 1] = 1.0, torch.minimum(x.amin(dim=1), torch.tensor(2.0**-8))
    for _ in range(8):
        encoded = encode_moment(x, 128)
        x = decode_moment(*encoded, 128)
    assert all(torch.equal(a, b) for a, b in zip(encode_moment(x, 128), encoded, strict=True))


def test_groups_are_independent_and_powers_of_two_are_neutral():
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(4))
    codes, scale, expansion = encode_moment(x, 128)
    assert codes.shape == (8, 300) and scale.shape == expansion.shape == (8, 3)
    for columns, group in ((slice(0, 128), 0), (slice(128, 256), 1), (slice(256, 300), 2)):
        alone = encode_moment(x[:, columns], 128)
        assert torch.equal(alone[0], codes[:, columns])
        assert torch.equal(alone[1][:, 0], scale[:, group]) and torch.equal(alone[2][:, 0], expansion[:, group])
    scaled = encode_moment(x * 2.0**-40, 128)
    assert (
        torch.equal(scaled[0], codes)
        and torch.equal(scaled[1], scale * 2.0**-40)
        and torch.equal(scaled[2], expansion)
    )


def adam(format, steps, beta2, seed=5):
    """The paper's measure (Table 1), the mean error of m / sqrt(v), over that of m / sqrt(v): of moments that were
    encoded in each step, and of exact ones encoded once. Gradients of many sizes, which shrink as in training."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(1.5 * torch.randn(16, 512, generator=generator))
    exact = moments = [torch.zeros(16, 512), torch.zeros(16, 512)]
    for t in range(steps):
        g = size * torch.randn(16, 512, generator=generator) * (1 + 3 * math.exp(-t / 50))
        exact, moments = ([0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g * g] for m, v in (exact, moments))
        moments = decode_moments(encode_moments(moments, 128, format), 128, format)
    once = decode_moments(encode_moments(exact, 128, format), 128, format)
    u = exact[0] / exact[1].sqrt()
    return [((m / v.sqrt() - u).abs().mean() / u.abs().mean()).item() for m, v in (moments, once)]


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_errors_of_the_step(beta2):
    """Expansion is at least 1.25 times better than plain E4M3, lean another 1.5 times; the gain lasts over steps."""
    plain, paper, lean = (
        adam(format, 300, beta2) for format in (StateFormat.E4M3, StateFormat.PAPER, StateFormat.LEAN)
    )
    assert paper[1] * 1.25 < plain[1] and lean[1] < 0.65 * paper[1], (plain, paper, lean)
    assert lean[0] < paper[0] < plain[0], (plain, paper, lean)


# --- weights


def test_stochastic_rounding_is_unbiased():
    """Up with the probability of the place between two BF16 numbers: each count within five standard deviations."""
    n = 40000
    low, high = torch.tensor([1.0, -3.0, 1e-30]).bfloat16().float(), []
    for x in low:
        bits = x.view(1).view(torch.int32) + 0x10000
        high.append(bits.view(torch.float32))
    for x, y in zip(low, high, strict=True):
        for place in (0.1, 0.5, 0.8125):
            values = (x + place * (y - x)).expand(n).contiguous()
            rounded = round_stochastically(values, weight_key(7, 2, torch.tensor(3.0))).float()
            assert ((rounded == x) | (rounded == y)).all()
            expected = ((values[0] - x) / (y - x)).item()
            assert abs((rounded == y).float().mean().item() - expected) <= 5 * math.sqrt(expected / n) + 2.0**-16
    exact = torch.randn(100).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), weight_key(7, 2, torch.tensor(3.0))), exact)


def test_chance_depends_on_seed_parameter_step_and_place():
    keys = [weight_key(s, p, torch.tensor(t)) for s in (0, 1) for p in (0, 1) for t in (1.0, 2.0)]
    draws = torch.stack([hashed(torch.arange(20000), key) for key in keys])
    assert len({int(key) for key in keys}) == 8
    bits = (draws[:, :, None] >> torch.arange(32)) & 1
    assert (bits.double().mean(dim=1) - 0.5).abs().max() < 6 * 0.5 / math.sqrt(20000), "each bit is fair"
    chance = draws.double() / 2**32 - 0.5
    correlation = chance @ chance.T / 20000 * 12
    assert (correlation - torch.eye(8)).abs().max() < 6 / math.sqrt(20000)
    far = hashed(torch.arange(20000) + 2**33, keys[0])
    assert (far == draws[0]).sum() == 0, "indices above 2**32 count in full"


def test_master_holds_24_bits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10000, generator=generator) * torch.exp2(
        torch.empty(10000).uniform_(-100, 100, generator=generator)
    )
    x[:4] = torch.tensor([0.0, -0.0, 2.0**-126, -(2.0**-140)])
    param, residual = split_master(x)
    joined = join_master(param, residual)
    assert ((joined - x).abs() <= 2.0**-16 * x.abs() + 2.0**-141).all()
    again = split_master(joined)
    assert torch.equal(again[0], param) and torch.equal(again[1], residual), "what it holds it keeps"
    assert ((param.float() - joined).abs() <= 2.0**-8 * joined.abs() + 2.0**-133).all(), "the parameter is the nearest"
    foreign = torch.tensor([0.0, -0.0, 1.0, -2.0]).bfloat16()[:, None].expand(4, 256).contiguous()
    every = torch.arange(256, dtype=torch.uint8).expand(4, 256).contiguous()
    moved = join_master(foreign, every)  # parameters from elsewhere beside old residuals
    assert (
        moved.isfinite().all()
        and ((moved - foreign.float()).abs() <= 2.0**-8 * foreign.float().abs() + 2.0**-126).all()
    )


# --- what a step does


@pytest.mark.parametrize("implementation", ["reference", "twin"])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("format", ["lean", "paper"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -math.nan, 1e25])
def test_groups_without_finite_gradients_are_skipped(implementation, bad, format, request, device):
    """NaN, inf, a gradient whose square overflows: its group stays as it is, the others move, the count says it."""
    step = request.getfixturevalue("twin") if implementation == "twin" else adamw_step_ref
    device = device if implementation == "twin" else "cpu"
    params, grads = sample([(4, 300)])
    before = Case(params, format).run(adamw_step_ref, grads())
    g = [x.float() for x in grads()]
    whole = before.copy().run(step, g, device)
    g[0][1, 140], g[0][3, 299] = bad, bad
    broken = before.copy().run(step, g, device)
    assert broken.skipped.item() == 2
    for old, new, result in zip(before.tensors()[:-1], whole.tensors(), broken.tensors(), strict=False):
        expected = new.clone()
        if new.shape == (4, 300):
            expected[1, 128:256], expected[3, 256:] = old[1, 128:256], old[3, 256:]
        else:
            expected[1, 1], expected[3, 2] = old[1, 1], old[3, 2]
        assert torch.equal(result, expected)
        assert not torch.equal(result, new)


@pytest.mark.parametrize("implementation", ["reference", "twin"])
@pytest.mark.parametrize("weights", Weights)
def test_weights_that_are_not_finite_stay_so(implementation, weights, request, device):
    """No rounding makes a number of them; a GPU's own NaN is the largest of all bit patterns."""
    step = request.getfixturevalue("twin") if implementation == "twin" else adamw_step_ref
    device = device if implementation == "twin" else "cpu"
    params, grads = sample([(4, 300)])
    params[0][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    case = Case(params, "lean", weights.value)
    for _ in range(3):
        case.run(step, grads(), device)
    assert case.params[0][0, 0].isnan() and case.params[0][0, 1:3].tolist() == [math.inf, -math.inf]
    assert case.params[0].isfinite().sum() == 4 * 300 - 3


@pytest.mark.parametrize("format", ["lean", "paper"])
@pytest.mark.parametrize("implementation", ["reference", "twin"])
def test_special_gradients(implementation, format, request, device):
    """The special groups as moments of a step (betas of zero keep them as they are), with a finite, bounded update."""
    step = request.getfixturevalue("twin") if implementation == "twin" else adamw_step_ref
    device = device if implementation == "twin" else "cpu"
    groups = {name: x for name, x in special_groups().items() if x.abs().max() < 1e18}  # squares that float32 can hold
    g = torch.stack(list(groups.values()))
    case = Case([torch.ones_like(g)], format, beta1=0.0, beta2=0.0, weight_decay=0.0)
    for _ in range(2):
        case.run(step, [g], device)
    assert case.skipped.item() == 0
    if format == "paper":
        m = case.decoded(0)[0]
        expected = decode_moment(*encode_moment(g, 128), 128)
        assert ((m - expected).abs() <= DECODED * expected.abs()).all()
        assert torch.equal(case.moments[0][2][0], encode_moment(g, 128)[2])
    # |g| / (sqrt(g**2) + eps) is at most one, so two steps move no parameter by more than 2 lr (and two roundings).
    assert ((case.params[0] - 1).abs() <= 2 * case.options["lr"] + 2.0**-22).all()
    assert (case.params[0][g == 0] == 1).all()


@pytest.mark.parametrize("format", list(StateFormat))
def test_a_step_never_explodes(format):
    """A gradient 1e-9 times its neighbours': plain E4M3 would keep its m and lose its v, and step by m / eps."""
    g = torch.ones(1, 128)
    g[0, 1] = 1e-4  # v is 1e-8 of the group's largest, far below 448 * 2**-10
    case = Case([torch.zeros(1, 128)], format, weight_decay=0.0)
    for _ in range(20):
        before = case.params[0].clone()
        case.run(adamw_step_ref, [g])
        assert (case.params[0] - before).abs().max() <= 1.5 * case.options["lr"]


@pytest.mark.parametrize("mode", MODES)
def test_zero_gradients_and_zero_lr_leave_zero_states(mode):
    """What torch.distributed.checkpoint does before it loads: a step that must not give NaN."""
    params, _ = sample()
    case = Case(params, *mode, lr=0.0)
    before = case.copy()
    case.run(adamw_step_ref, [torch.zeros_like(p) for p in params])
    assert all(torch.equal(a, b) for a, b in zip(case.tensors(), before.tensors(), strict=True))


def arguments(**changes):
    case = Case([torch.ones(4, 200), torch.ones(3)])
    values = {
        "params": case.params,
        "grads": [torch.ones(4, 200), torch.ones(3)],
        "exp_avg": tuple(case.moments[0]),
        "exp_avg_sq": tuple(case.moments[1]),
        "residuals": case.residuals,
        "steps": [torch.ones(()) for _ in case.steps],
        "skipped": case.skipped,
        "group_size": 128,
        "format": case.format,
        "weights": case.weights,
        "seed": 0,
        "numbers": [0, 1],
        "firsts": [0, 0],
    }
    return values | case.options | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"params": [torch.ones(4, 200).half(), torch.ones(3)]}, TypeError, r"params\[0\] is torch.float16"),
        ({"grads": [torch.ones(4, 200), torch.ones(3).to_sparse()]}, TypeError, r"grads\[1\].*sparse"),
        ({"grads": [torch.ones(4, 200), torch.ones(4)]}, ValueError, r"grads\[1\] is \[4\]"),
        ({"grads": [torch.ones(4, 200)]}, ValueError, "1 grads for 2 params"),
        ({"group_size": 64}, ValueError, r"exp_avg_scales\[0\].*\[4, 2\].*\[4, 4\]"),
        ({"group_size": 2048}, ValueError, "group_size is 2048, expected 1 to 1024"),
        ({"format": StateFormat.E4M3}, ValueError, "2 exp_avg_expansions, expected none with .*E4M3"),
        ({"weights": Weights.MASTER}, ValueError, "0 residuals for 2 params"),
        ({"numbers": [0]}, ValueError, "1 numbers for 2 params"),
        ({"firsts": [0]}, ValueError, "1 firsts for 2 params"),
        ({"steps": [torch.ones(2), torch.ones(())]}, ValueError, r"steps\[0\] has the shape \[2\]"),
        ({"skipped": torch.zeros(1)}, ValueError, "skipped is torch.float32"),
        ({"lr": torch.ones(2)}, ValueError, r"lr has the shape \[2\]"),
        ({"amax": torch.ones(3)}, ValueError, r"amax is torch.float32 \[3\] on cpu, expected contiguous .*\[2\]"),
    ],
)
def test_errors_name_the_value(changes, error, message):
    with pytest.raises(error, match=message):
        adamw_step(**arguments(**changes))


@pytest.mark.parametrize("mode", [MODES[0], MODES[4]])
def test_operator(mode):
    params, grads = sample([(4, 200), (3,)])
    case = Case(params, *mode)
    lr, *scalars = OPTIONS.values()
    states = (
        case.params,
        grads(),
        *case.lists()[1:],
        [torch.ones(()) for _ in params],
        case.skipped,
        torch.tensor(lr),
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.coat_kernels.adamw_step.default
    for amax in ((), (torch.ones(2),)):
        torch.library.opcheck(op, (*states, *scalars, *case.settings(), *amax), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize(("format", "weights"), [("lean", "nearest"), ("lean", "master"), ("paper", "nearest")])
def test_more_values_than_int32_counts(format, weights):
    """Parameters of more than 2**31 values, in whole and in ragged groups: the last values move as they should."""
    from coat_kernels.adamw_triton import adamw_step as twin

    free = torch.cuda.mem_get_info()[0]
    for shape in ((2**31 + 512,), (3, 2**30 + 8)):
        need = 8 * math.prod(shape)
        if free < need:
            pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory, there are {free / 2**30:.0f}")
        param, grad = (torch.ones(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        moments = []
        for _ in range(2):
            codes, scales = torch.zeros(shape, dtype=torch.uint8, device="cuda"), group_shape(shape, 128)
            expansions = [torch.full(scales, 16, dtype=torch.uint8, device="cuda")] if format == "paper" else []
            moments += [[codes], [torch.zeros(scales, device="cuda")], expansions]
        last = (*(n - 1 for n in shape[:-1]), slice(shape[-1] - 8, shape[-1]))
        grad[last] = -2.0
        skipped = torch.zeros(1, dtype=torch.int64, device="cuda")
        options = (torch.tensor(0.5), 0.9, 0.999, 1e-8, 0.0, 128, format, weights, 0, [0], [0])
        residuals = [torch.zeros(shape, dtype=torch.uint8, device="cuda")] if weights == "master" else []
        twin([param], [grad], *moments, residuals, [torch.ones(())], skipped, *options)
        assert (param[last] == 1.5).all() and (param == 0.5).sum().item() == math.prod(shape) - 8
        assert skipped.item() == 0
        del param, grad, moments, residuals

"""adamw_step: the Triton twin against the reference, and what encoded moments must hold for any input."""

import math

import pytest
import torch
from coat_kernels.adamw import (
    adamw_step,
    adamw_step_ref,
    choose_expansion,
    decode_groups,
    decode_moment,
    encode_groups,
    encode_moment,
    group_shape,
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
    if not torch.cuda.is_available():
        monkeypatch.setattr(module, "TILE", 16384)
        monkeypatch.setattr(module, "MOST_GROUPS", 16384)
    return module.adamw_step


class Case:
    """Parameters with their states; ``run`` steps them with an implementation of the op, on its device."""

    def __init__(self, params, group_size=128, expand=True, **options):
        self.group_size, self.expand = group_size, expand
        self.options = OPTIONS | options
        self.params = [p.clone() for p in params]
        self.moments = []
        for _ in range(2):
            self.moments.append([torch.zeros(p.shape, dtype=torch.uint8) for p in params])
            self.moments.append([torch.zeros(group_shape(p.shape, group_size)) for p in params])
            self.moments.append([torch.full(group_shape(p.shape, group_size), 16, dtype=torch.uint8) for p in params])
        self.steps = [torch.zeros(()) for _ in params]
        self.skipped = torch.zeros(1, dtype=torch.int64)

    def copy(self):
        case = Case(self.params, self.group_size, self.expand, **self.options)
        case.moments = [[t.clone() for t in tensors] for tensors in self.moments]
        case.steps = [step.clone() for step in self.steps]
        case.skipped = self.skipped.clone()
        return case

    def tensors(self):
        return [*self.params, *(t for tensors in self.moments for t in tensors), self.skipped]

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
        count = len(self.params)
        moments = [moved[i : i + count] for i in range(count, 7 * count, count)]
        lr, beta1, beta2, eps, decay = self.options.values()
        lr = torch.tensor(lr, dtype=torch.float64)
        grads = [g.to(device) for g in grads]
        with torch.no_grad():
            step(
                moved[:count],
                grads,
                *moments,
                self.steps,
                moved[-1],
                lr,
                beta1,
                beta2,
                eps,
                decay,
                self.group_size,
                self.expand,
            )
        for t, result, buffer in zip(self.tensors(), moved, buffers, strict=True):
            assert (buffer[:margin] == 77).all() and (buffer[margin + t.numel() :] == 77).all()
            t.copy_(result)
        return self

    def decoded(self, moment, i):
        codes, scales, expansions = self.moments[3 * moment : 3 * moment + 3]
        return decode_moment(codes[i], scales[i], expansions[i], self.group_size)


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
    groups = different = values = unequal = 0
    for i, grad in enumerate(grads):
        terms = [
            beta1 * before.decoded(0, i).abs() + (1 - beta1) * grad.float().abs(),
            beta2 * before.decoded(1, i) + (1 - beta2) * grad.float() ** 2,
        ]
        step = expected.steps[i].item()
        denominator = (terms[1] / (1 - beta2**step)).sqrt() + eps
        bound = 2 * DECODED * lr / (1 - beta1**step) * terms[0] / denominator
        new, old = expected.params[i], actual.params[i]
        ulp = 2.0**-7 if new.dtype == torch.bfloat16 else 2.0**-22
        assert ((old.float() - new.float()).abs() <= bound + ulp * new.float().abs()).all()
        for moment in (0, 1):
            a, b = (
                [tensors[i] for tensors in case.moments[3 * moment : 3 * moment + 3]] for case in (actual, expected)
            )
            largest = encode_moment(terms[moment], expected.group_size)[1]
            assert ((a[1] - b[1]).abs() <= DECODED * largest).all(), "scales"
            other = a[2] != b[2]
            assert ((a[2].int() - b[2].int()).abs() <= 1).all(), "expansions"
            groups, different = groups + other.numel(), different + int(other.sum())
            x, y = actual.decoded(moment, i), expected.decoded(moment, i)
            if b[0].dim():
                other = other.repeat_interleave(expected.group_size, -1)[..., : b[0].shape[-1]]
            # Under the same expansion at most one code apart; else both within a rounding, at worst from 2.5 to 2 or 3
            # times 2**-9, of the same number.
            q, r = (codes[0].view(torch.float8_e4m3fn).float() for codes in (a, b))
            steps = ((a[0] & 127).int() - (b[0] & 127).int()).abs()
            assert (steps[~other.view(q.shape)] <= 1).all() and ((q * r >= 0) | (steps <= 1)).all()
            values, unequal = values + q.numel(), unequal + int(((q != r) & ~other.view(q.shape)).sum())
            ratio = (x / y)[other.view(q.shape) & (y != 0)].log2().abs()
            power = b[2].min().item() / 16 if b[2].numel() else 1
            assert power >= 1 / 8 and (ratio <= 2 * math.log2(1.25) / power).all()
    assert different <= max(1, groups / 1000)
    assert unequal <= values / 1000


@pytest.mark.parametrize(("group_size", "expand"), [(128, True), (128, False), (100, True), (16, True), (1, True)])
def test_parity(twin, device, group_size, expand):
    params, grads = sample()
    expected = Case(params, group_size, expand)
    for _ in range(2):
        before, g = expected.copy(), grads()
        actual = before.copy().run(twin, g, device)
        assert_close(actual, expected.run(adamw_step_ref, g), before, g)


def test_parity_of_many_programs(device):
    """The tiles as they are: several programs per parameter, several tiles per program, a search among parameters."""
    twin = pytest.importorskip("coat_kernels.adamw_triton", reason="Triton is not installed").adamw_step
    params, grads = sample([(70, 128), (3, 128), (1, 100), (4, 256), (2, 1000), (2, 128)])
    params = [p.float() for p in params]  # all of one kind: one launch
    expected, g = Case(params), [x.bfloat16() for x in grads()]
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
        state = Case([x.cpu()])
        moments = [[t.to(device) for t in tensors] for tensors in state.moments]
        skipped = torch.zeros(1, dtype=torch.int64, device=device)
        version, stride = p._version, p.stride()
        step([p], [grad], *moments, [torch.ones(())], skipped, torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.0, 128, True)
        assert p._version > version and p.stride() == stride
        results.append([p.clone(memory_format=torch.contiguous_format), *(t for tensors in moments for t in tensors)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# --- what encoding does with a group


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
        assert expansion == 16
    elif x.abs().min() == x.abs().max() or name == "one-hot":
        assert torch.equal(decoded, x) and expansion == (255 if expand else 16)
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


@pytest.mark.parametrize("expand", [True, False])
def test_second_moment_never_becomes_zero(expand):
    """v = 0 beside m != 0 would make the step m / eps. The smallest of v gets a code, whatever stands beside it."""
    x = torch.exp2(torch.empty(256, 128).uniform_(-90, 90, generator=torch.Generator().manual_seed(0)))
    x[:, 0] = 2.0**-107  # the head of adamw.py: nothing above 2**-108 may decode to zero
    x[:128, 1] = 1e38
    codes, scale, expansion = encode_moment(x, 128, expand=expand, positive=True)
    assert (codes > 0).all()
    assert (decode_moment(codes, scale, expansion, 128) > 0).all()
    if expand:
        assert torch.equal(codes, encode_moment(x, 128)[0]), "expanded groups do not need the rule"
    else:
        assert (encode_moment(x, 128, expand=False)[0] == 0).any(), "plain E4M3 does"


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


def test_expansion_lowers_the_error_of_the_step():
    """The paper's measure (Table 1), on moments as Adam has them: plain E4M3 is at least 1.25 times worse."""
    generator = torch.Generator().manual_seed(5)
    size = torch.exp(1.5 * torch.randn(64, 512, generator=generator))
    m, v = torch.zeros(64, 512), torch.zeros(64, 512)
    for _ in range(300):
        g = size * torch.randn(64, 512, generator=generator)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    error = []
    for expand in (True, False):
        m_again = decode_moment(*encode_moment(m, 128, expand=expand), 128)
        v_again = decode_moment(*encode_moment(v, 128, expand=expand, positive=True), 128)
        error.append((m_again / v_again.sqrt() - m / v.sqrt()).abs().mean().item())
    assert error[0] * 1.25 < error[1], error


# --- what a step does


@pytest.mark.parametrize("implementation", ["reference", "twin"])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -math.nan, 1e25])
def test_groups_without_finite_gradients_are_skipped(implementation, bad, request, device):
    """NaN, inf, a gradient whose square overflows: its group stays as it is, the others move, the count says it."""
    step = request.getfixturevalue("twin") if implementation == "twin" else adamw_step_ref
    device = device if implementation == "twin" else "cpu"
    params, grads = sample([(4, 300)])
    before = Case(params).run(adamw_step_ref, grads())
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
        assert torch.equal(result, expected) and not torch.equal(result, new)


@pytest.mark.parametrize("implementation", ["reference", "twin"])
def test_special_gradients(implementation, request, device):
    """The special groups as moments of a step (betas of zero keep them as they are), with a finite, bounded update."""
    step = request.getfixturevalue("twin") if implementation == "twin" else adamw_step_ref
    device = device if implementation == "twin" else "cpu"
    groups = {name: x for name, x in special_groups().items() if x.abs().max() < 1e18}  # squares that float32 can hold
    g = torch.stack(list(groups.values()))
    case = Case([torch.ones_like(g)], beta1=0.0, beta2=0.0, weight_decay=0.0)
    for _ in range(2):
        case.run(step, [g], device)
    assert case.skipped.item() == 0
    m = case.decoded(0, 0)
    expected = decode_moment(*encode_moment(g, 128), 128)
    assert ((m - expected).abs() <= DECODED * expected.abs()).all()
    assert torch.equal(case.moments[2][0], encode_moment(g, 128)[2])
    # |g| / (sqrt(g**2) + eps) is at most one, so two steps move no parameter by more than 2 lr (and two roundings).
    assert ((case.params[0] - 1).abs() <= 2 * case.options["lr"] + 2.0**-22).all()
    assert (case.params[0][g == 0] == 1).all()


@pytest.mark.parametrize("expand", [True, False])
def test_a_step_never_explodes(expand):
    """A gradient 1e-9 times its neighbours': plain E4M3 would keep its m and lose its v, and step by m / eps."""
    g = torch.ones(1, 128)
    g[0, 1] = 1e-4  # v is 1e-8 of the group's largest, far below 448 * 2**-10
    case = Case([torch.zeros(1, 128)], expand=expand, weight_decay=0.0)
    for _ in range(20):
        before = case.params[0].clone()
        case.run(adamw_step_ref, [g])
        assert (case.params[0] - before).abs().max() <= 1.5 * case.options["lr"]


def test_zero_gradients_and_zero_lr_leave_zero_states():
    """What torch.distributed.checkpoint does before it loads: a step that must not give NaN."""
    params, _ = sample()
    case = Case(params, lr=0.0)
    before = case.copy()
    case.run(adamw_step_ref, [torch.zeros_like(p) for p in params])
    assert all(torch.equal(a, b) for a, b in zip(case.tensors(), before.tensors(), strict=True))


def arguments(device="cpu", **changes):
    case = Case([torch.ones(4, 200), torch.ones(3)])
    names = [
        "exp_avgs",
        "exp_avg_scales",
        "exp_avg_expansions",
        "exp_avg_sqs",
        "exp_avg_sq_scales",
        "exp_avg_sq_expansions",
    ]
    values = {
        "params": case.params,
        "grads": [torch.ones(4, 200), torch.ones(3)],
        **dict(zip(names, case.moments, strict=True)),
    }
    return values | {"steps": [torch.ones(()) for _ in case.steps], "skipped": case.skipped} | case.options | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"params": [torch.ones(4, 200).half(), torch.ones(3)]}, TypeError, r"params\[0\] is torch.float16"),
        ({"grads": [torch.ones(4, 200), torch.ones(3).to_sparse()]}, TypeError, r"grads\[1\].*sparse"),
        ({"grads": [torch.ones(4, 200), torch.ones(4)]}, ValueError, r"grads\[1\] is \[4\]"),
        ({"grads": [torch.ones(4, 200)]}, ValueError, "1 grads for 2 params"),
        ({"group_size": 64}, ValueError, r"exp_avg_scales\[0\].*\[4, 2\].*\[4, 4\]"),
        ({"group_size": 2048}, ValueError, "group_size is 2048, expected 1 to 1024"),
        ({"skipped": torch.zeros(1)}, ValueError, "skipped is torch.float32"),
        ({"lr": torch.ones(2)}, ValueError, r"lr has the shape \[2\]"),
    ],
)
def test_errors_name_the_value(changes, error, message):
    with pytest.raises(error, match=message):
        adamw_step(**arguments(**changes))


def test_operator():
    tensors = list(arguments().values())[:10]
    scalars = [torch.tensor(OPTIONS["lr"]), *list(OPTIONS.values())[1:], 128, True]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.coat_kernels.adamw_step.default, (*tensors, *scalars), test_utils=checks)


@pytest.mark.gpu
def test_more_values_than_int32_counts():
    """Parameters of more than 2**31 values, in whole and in ragged groups: the last values move as they should."""
    from coat_kernels.adamw_triton import adamw_step as twin

    free = torch.cuda.mem_get_info()[0]
    for shape in ((2**31 + 512,), (3, 2**30 + 8)):
        need = 7 * math.prod(shape)
        if free < need:
            pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory, there are {free / 2**30:.0f}")
        big = {
            "params": torch.ones(shape, dtype=torch.bfloat16, device="cuda"),
            "grads": torch.ones(shape, dtype=torch.bfloat16, device="cuda"),
        }
        moments = []
        for _ in range(2):
            moments.append([torch.zeros(shape, dtype=torch.uint8, device="cuda")])
            moments.append([torch.zeros(group_shape(shape, 128), device="cuda")])
            moments.append([torch.full(group_shape(shape, 128), 16, dtype=torch.uint8, device="cuda")])
        last = (*(n - 1 for n in shape[:-1]), slice(shape[-1] - 8, shape[-1]))
        big["grads"][last] = -2.0
        skipped = torch.zeros(1, dtype=torch.int64, device="cuda")
        twin(
            [big["params"]],
            [big["grads"]],
            *moments,
            [torch.ones(())],
            skipped,
            torch.tensor(0.5),
            0.9,
            0.999,
            1e-8,
            0.0,
            128,
            True,
        )
        assert (big["params"][last] == 1.5).all() and (big["params"] == 0.5).sum().item() == math.prod(shape) - 8
        assert skipped.item() == 0
        del big, moments

"""quantize, dequantize, transpose: the Triton twins against the references, and what must hold for any input."""

import itertools

import coat_kernels as ck
import pytest
import torch
from coat_kernels.formats import SCALE_DTYPES, largest, scale_from_amax, unpack_scale
from coat_kernels.quantize import dequantize_ref, quantize_each_ref, quantize_ref, transpose_ref

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OPCHECKS = ("test_autograd_registration", "test_faketensor")  # the schema test cannot compare FP8
RECIPES = [("tensor", 0), ("token", 0), ("group", 16), ("group", 128)]
# one row, ragged rows with an awkward width, off the 16 of tensor cores, an empty batch
SHAPES = [(1, 64), (37, 100), (130, 257), (0, 48)]
WIDE = [((2, 16500), "token", 0), ((2, 4100), "tensor", 0), ((2, 4100), "group", 16)]  # wider than a block
CASES = [(shape, *recipe) for shape in SHAPES for recipe in RECIPES] + WIDE


@pytest.fixture
def twin(poisoned_memory):
    """The Triton launchers, with every buffer they allocate filled with garbage first."""
    return pytest.importorskip("coat_kernels.quantize_triton", reason="Triton is not installed")


def layouts(granularity):
    """Codes, transposed codes, or both."""
    return [(True, False), (False, True), (True, True)] if granularity == "tensor" else [(True, False)]


def sample(tokens, width, dtype=torch.bfloat16, device="cpu"):
    """Values over many binades, as activations have them, with a few exact zeros."""
    generator = torch.Generator().manual_seed(tokens * 7919 + width)
    x = torch.randn(tokens, width, generator=generator) * torch.exp(3 * torch.randn(tokens, 1, generator=generator))
    x[torch.rand(tokens, width, generator=generator) < 0.01] = 0
    return x.to(dtype).to(device)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize(("shape", "granularity", "group"), CASES)
def test_quantize_parity(twin, same_codes, device, shape, granularity, group, power_of_two, dtype):
    x = sample(*shape, torch.float32 if shape[0] % 2 else torch.bfloat16)
    for codes, transposed in layouts(granularity):
        arguments = (dtype, granularity, group, power_of_two, None, codes, transposed, torch.float32, 0)
        expected = quantize_ref(x, *arguments)
        actual = twin.quantize([x.to(device)], *arguments)
        assert torch.equal(actual[2].cpu(), expected[2]), "scales are bitwise equal"
        same_codes(actual[0], expected[0])
        same_codes(actual[1], expected[1])


@pytest.mark.parametrize(("granularity", "group"), RECIPES)
def test_quantize_parity_given_scale_and_strided(twin, same_codes, device, granularity, group):
    wide = sample(40, 300)
    x = wide[::2, 4:260]  # a view with rows apart
    scale = quantize_ref(x, E4M3, granularity, group, True, None, True, False)[2] * 4
    rest = (True, granularity == "tensor", torch.float32, 0)
    expected = quantize_ref(x, E4M3, granularity, group, True, scale, *rest)
    actual = twin.quantize([wide.to(device)[::2, 4:260]], E4M3, granularity, group, True, scale.to(device), *rest)
    same_codes(actual[0], expected[0])
    same_codes(actual[1], expected[1])
    assert actual[2].numel() == 0
    columns = wide.to(device).t()  # no unit stride along H
    actual = twin.quantize([columns], E4M3, "token", 0, True, None, True, False, torch.float32, 0)
    assert torch.equal(actual[2].cpu(), quantize_ref(wide.t(), E4M3, "token", 0, True, None, True, False)[2])


STORED = [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False), (torch.uint8, True)]


@pytest.mark.parametrize(("scale_dtype", "power_of_two"), STORED)
@pytest.mark.parametrize(("shape", "group"), [((1, 64), 16), ((37, 100), 16), ((37, 257), 128), ((0, 48), 16)])
def test_group_scales_as_stored_parity(twin, same_codes, device, shape, group, scale_dtype, power_of_two):
    x = sample(*shape, torch.float32)  # the interpreter reads subnormal BF16 numbers as zero
    if shape[0] > 4:
        x[1], x[2, 0], x[3, 0], x[4] = 0.0, float("nan"), float("inf"), 1e-39
    options = (E4M3, "group", group, power_of_two)
    expected = quantize_ref(x, *options, None, True, False, scale_dtype)
    actual = twin.quantize([x.to(device)], *options, None, True, False, scale_dtype, 0)
    assert actual[2].dtype == scale_dtype
    assert torch.equal(actual[2].cpu().nan_to_num(7.0), expected[2].nan_to_num(7.0))
    broken = unpack_scale(expected[2]).isnan().repeat_interleave(group, 1)[:, : shape[1]]  # whose codes do not matter

    def sound(codes):
        return codes.cpu().view(torch.uint8).masked_fill(broken, 0).view(codes.dtype)

    same_codes(sound(actual[0]), sound(expected[0]))
    given = twin.quantize([x.to(device)], *options, actual[2], True, False, scale_dtype, 0)
    assert torch.equal(sound(given[0]).view(torch.uint8), sound(actual[0]).view(torch.uint8)), "stored scales count"
    values = twin.dequantize(actual[0], actual[2], group, torch.float32).cpu()
    expected = dequantize_ref(actual[0].cpu(), actual[2].cpu(), group, torch.float32)
    assert values[broken].isnan().all() and torch.equal(values[~broken], expected[~broken])


# Rows: parts off the 16 of tensor cores, an empty one, one row; the widths of three weights of a grouped attention
ROWS = [((48, 16, 16), 64), ((37, 5, 70), 100), ((8, 0, 64), 48), ((1, 130), 257), ((0, 0), 32), ((3, 3, 3, 3, 3), 16)]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("granularity", "group"), RECIPES)
@pytest.mark.parametrize(("tokens", "width"), ROWS)
def test_rows_of_several_tensors(twin, same_codes, device, tokens, width, granularity, group, given):
    """Equal to the concatenation, with zeros behind the last part only, for every layout."""
    parts = [sample(n, width) * 2.0**i for i, n in enumerate(tokens)]
    scale = quantize_ref(parts, E4M3, granularity, group, True, None, True, False)[2] * 2 if given else None
    for codes, transposed in layouts(granularity):
        rest = (codes, transposed, torch.float32, 0)
        expected = quantize_ref(torch.cat(parts), E4M3, granularity, group, True, scale, *rest)
        moved = scale if scale is None else scale.to(device)
        actual = twin.quantize([part.to(device) for part in parts], E4M3, granularity, group, True, moved, *rest)
        assert torch.equal(actual[2].cpu(), expected[2])
        same_codes(actual[0], expected[0])
        same_codes(actual[1], expected[1])


@pytest.mark.parametrize(("granularity", "group"), RECIPES)
def test_rows_of_several_tensors_that_lie_anyhow(twin, same_codes, device, granularity, group):
    """Parts whose rows lie apart, each by another stride, or run the other way; one row of a wider matrix."""
    wholes = [sample(12, 300).to(device), sample(64, 40).to(device), sample(7, 64).to(device)]
    for a, b, c in itertools.permutations((wholes[0][1:2, :64], wholes[0][::2, 4:68], wholes[1].t())):
        parts = [a, b, wholes[2], c]
        for codes, transposed in layouts(granularity):
            rest = (E4M3, granularity, group, True, None, codes, transposed, torch.float32, 0)
            expected, actual = quantize_ref([part.cpu() for part in parts], *rest), twin.quantize(parts, *rest)
            assert torch.equal(actual[2].cpu(), expected[2])
            same_codes(actual[0], expected[0])
            same_codes(actual[1], expected[1])


SPECIAL = {"zeros": 0.0, "nan": float("nan"), "-nan": -float("nan"), "inf": float("inf"), "tiny": 1e-39, "huge": 3e38}


@pytest.mark.parametrize("implementation", ["reference", "twin"])
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_given_amax_changes_nothing(implementation, request, device, shape, dtype, power_of_two, monkeypatch):
    """Codes and scale to the bit, without the pass that finds the amax."""
    step = quantize_ref if implementation == "reference" else request.getfixturevalue("twin").quantize
    device = "cpu" if implementation == "reference" else device
    samples = {"sample": sample(*shape, torch.float32)}
    if shape == (37, 100) and (implementation == "reference" or dtype == torch.float32):
        for name, value in SPECIAL.items():
            samples[name] = samples["sample"] * 0 if name in ("zeros", "tiny") else samples["sample"].clone()
            samples[name][5, 7] = value
    found = []
    for x in samples.values():
        x = x.to(device, dtype)
        amax = x.float().abs().amax() if x.numel() else torch.zeros((), device=device)
        for codes, transposed in layouts("tensor"):
            rest = (E4M3, "tensor", 0, power_of_two, None, codes, transposed, torch.float32, 0)
            found.append(((x, *rest), amax, step(x if implementation == "reference" else [x], *rest)))
    if implementation == "twin":
        monkeypatch.setattr(request.getfixturevalue("twin"), "_amax_kernel", None)
    for (x, *rest), amax, expected in found:
        actual = step(x if implementation == "reference" else [x], *rest, amax)
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_given_amax_in_public(device):
    """Of several tensors it is the largest of theirs; what it does not go with is refused."""
    parts = [sample(n, 96, device=device) for n in (7, 20)]
    amax = torch.stack([part.float().abs().amax() for part in parts])
    for power_of_two in (True, False):
        options = dict(granularity="tensor", power_of_two=power_of_two, transposed=True)
        given, found = ck.quantize(parts, amax=amax.amax(), **options), ck.quantize(parts, **options)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(given, found, strict=True))
    with pytest.raises(ValueError, match="amax .* granularity is 'token' and scale None"):
        ck.quantize(parts[0], amax=amax[0])
    with pytest.raises(ValueError, match="amax .* granularity is 'tensor' and scale given"):
        ck.quantize(parts[0], granularity="tensor", scale=torch.ones(1, 1, device=device), amax=amax[0])
    with pytest.raises(ValueError, match=r"amax is torch.float32 \[2\].*, expected one torch.float32 number"):
        ck.quantize(parts[0], granularity="tensor", amax=amax)
    with pytest.raises(ValueError, match=r"amax is torch.float64 \[\]"):
        ck.quantize(parts[0], granularity="tensor", amax=amax[0].double())
    arguments = (parts, E4M3, "tensor", 0, True, None, True, True, torch.float32, 0, amax.amax())
    torch.library.opcheck(torch.ops.coat_kernels.quantize.default, arguments, test_utils=OPCHECKS)


# Columns: equal ones, those of a grouped attention, awkward ones, an empty part, more than one launch takes, no token
COLUMNS = [(5, (64, 64)), (37, (64, 16, 16)), (7, (100, 1, 33, 257)), (3, (16, 0, 48)), (1, (16,) * 5), (0, (32, 16))]


@pytest.mark.parametrize(
    ("granularity", "group", "power_of_two"),
    [("token", 0, True), ("token", 0, False), ("tensor", 0, True), ("group", 16, True)],
)
@pytest.mark.parametrize(("tokens", "widths"), COLUMNS)
def test_columns_of_several_tensors(twin, same_codes, device, tokens, widths, granularity, group, power_of_two):
    """Equal to the concatenation, also of parts whose rows lie apart, each by another stride."""
    whole = [sample(tokens, n + 8 * i) for i, n in enumerate(widths)]
    parts = [x[:, 8 * i :] for i, x in enumerate(whole)]
    moved = [x.to(device)[:, 8 * i :] for i, x in enumerate(whole)]
    for codes, transposed in layouts(granularity):
        arguments = (E4M3, granularity, group, power_of_two, None, codes, transposed, torch.float32, 1)
        expected = quantize_ref(torch.cat(parts, 1), *arguments)
        actual = twin.quantize(moved, *arguments)
        assert torch.equal(actual[2].cpu(), expected[2])
        same_codes(actual[0], expected[0])
        same_codes(actual[1], expected[1])


def test_columns_wider_than_a_block(twin, same_codes, device):
    """The largest magnitude may lie in the part of a row that is read twice."""
    parts = [torch.full((2, n), 2.0**-i) for i, n in enumerate((16500, 24))]
    parts[0][1, 16450] = 100.0
    arguments = (E5M2, "token", 0, True, None, True, False, torch.float32, 1)
    expected, actual = quantize_ref(parts, *arguments), twin.quantize([x.to(device) for x in parts], *arguments)
    assert torch.equal(actual[2].cpu(), expected[2])
    same_codes(actual[0], expected[0])


def test_several_tensors_in_public(device):
    """Tensors of any leading shape, one launch's worth or copied together, and one in a list as it is alone."""
    x = sample(24, 96, device=device)
    columns = [part.view(2, 12, -1) for part in x.split((48, 16, 32), 1)]
    for options in ({}, {"granularity": "tensor", "transposed": True}):
        alone = [t for t in ck.quantize(x, **options) if t is not None]
        for parts, dim in (([x], 0), (columns, 1), (x.split(7), 0), (x.split(3), 0)):
            joined = [t for t in ck.quantize(parts, dim=dim, **options) if t is not None]
            pairs = zip(joined, alone, strict=True)
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("granularity", "group"), RECIPES)
def test_dequantize_parity(twin, device, granularity, group, dtype):
    x_q, _, x_s = quantize_ref(sample(37, 200), E4M3, granularity, group, False, None, True, False)
    expected = dequantize_ref(x_q, x_s, group, dtype)
    assert torch.equal(twin.dequantize(x_q.to(device), x_s.to(device), group, dtype).cpu(), expected)


@pytest.mark.parametrize("shape", [(1, 64), (37, 100), (130, 257)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("move", [True, False])
def test_transpose_parity(twin, same_codes, device, shape, dtype, move):
    x_q, _, x_s = quantize_ref(sample(*shape), dtype, "token", 0, True, None, True, False)
    scale = x_s if move else None
    expected, actual = (
        transpose_ref(x_q, scale),
        twin.transpose([x_q.to(device)], scale if scale is None else scale.to(device)),
    )
    same_codes(actual[0], expected[0])
    assert torch.equal(actual[1].cpu(), expected[1])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize(("granularity", "group"), RECIPES)
def test_error_is_half_a_step(device, granularity, group, power_of_two, dtype):
    """Rounding to nearest: half of 2**-3 (E4M3) or 2**-2 (E5M2) of a normal number, half a subnormal step below."""
    x = sample(37, 200, torch.float32, device)
    x_q, _, x_s = ck.quantize(x, dtype, granularity, group_size=group, power_of_two=power_of_two)
    y = ck.dequantize(x_q, x_s, group_size=group, dtype=torch.float32)
    relative, smallest = (2**-4, 2**-9) if dtype == E4M3 else (2**-3, 2**-16)
    spread = x_s.repeat_interleave(group, 1)[:, :200] if group else x_s
    assert ((y - x).abs() <= torch.maximum(x.abs() * relative, spread * smallest / 2) * (1 + 1e-6)).all()


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize(("granularity", "group"), RECIPES)
def test_idempotent(device, granularity, group, power_of_two):
    options = dict(group_size=group, power_of_two=power_of_two)
    x_q, _, x_s = ck.quantize(sample(37, 200, device=device), E4M3, granularity, **options)
    y = ck.dequantize(x_q, x_s, group_size=group, dtype=torch.float32)
    again_q, _, again_s = ck.quantize(y, E4M3, granularity, **options)
    assert torch.equal(ck.dequantize(again_q, again_s, group_size=group, dtype=torch.float32), y) or not power_of_two
    # a float32 scale comes back through one division and one product: at most two float32 steps away
    assert torch.allclose(
        ck.dequantize(again_q, again_s, group_size=group, dtype=torch.float32), y, rtol=2**-22, atol=0
    )


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_idempotent_as_stored(device, scale_dtype):
    """Powers of two come back bit for bit, whatever they are stored as."""
    options = dict(group_size=16, scale_dtype=scale_dtype)
    x_q, _, x_s = ck.quantize(sample(37, 200, device=device), E4M3, "group", **options)
    y = ck.dequantize(x_q, x_s, group_size=16, dtype=torch.float32)
    again_q, _, again_s = ck.quantize(y, E4M3, "group", **options)
    assert x_s.dtype == again_s.dtype == scale_dtype
    assert torch.equal(ck.dequantize(again_q, again_s, group_size=16, dtype=torch.float32), y)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_bfloat16_scales_hold_every_value(device, power_of_two):
    """Stored scales are rounded up: no code is cut off, and a code's error grows by at most a BF16 step, 2**-7."""
    x = sample(37, 200, torch.float32, device)
    options = dict(group_size=16, power_of_two=power_of_two)
    _, _, x_s = ck.quantize(x, E4M3, "group", **options)
    x_q, _, stored = ck.quantize(x, E4M3, "group", scale_dtype=torch.bfloat16, **options)
    assert (stored.float() >= x_s).all() and (stored.float() <= x_s * (1 + 2**-7)).all()
    y = ck.dequantize(x_q, stored, group_size=16, dtype=torch.float32)
    step = torch.maximum(x.abs() * 2**-4, stored.float().repeat_interleave(16, 1)[:, :200] * 2**-10)
    assert ((y - x).abs() <= step * (1 + 1e-6)).all()


@pytest.mark.parametrize(("granularity", "group"), RECIPES)
def test_power_of_two_scaling_leaves_codes_alone(device, granularity, group):
    x = sample(37, 200, torch.float32, device)
    a_q, _, a_s = ck.quantize(x, E4M3, granularity, group_size=group)
    b_q, _, b_s = ck.quantize(x * 2.0**-11, E4M3, granularity, group_size=group)
    assert torch.equal(a_q.view(torch.uint8), b_q.view(torch.uint8))
    assert torch.equal(a_s * 2.0**-11, b_s)


def test_scale_is_the_smallest_power_of_two_that_fits():
    amax = torch.tensor([448.0, 448.0 * (1 + 2**-22), 449.0, 224.0, 1.0, 3e-39, 0.0, 3.4e38])
    scale = scale_from_amax(amax, E4M3, True)
    assert torch.equal(scale[:5], torch.tensor([1.0, 2.0, 2.0, 0.5, 2.0**-8]))
    assert torch.equal(scale[5:7], torch.full((2,), 2.0**-126)), "never below the smallest normal number"
    assert (amax / scale <= largest(E4M3)).all()


def test_special_groups(device):
    """Zeros, constants, one-hot, subnormal, NaN and inf groups have stated outcomes, and do not touch each other."""
    x = torch.zeros(1, 7 * 16, device=device)
    groups = x.view(7, 16)
    groups[1] = -3.0  # constant
    groups[2, 5] = 2.0**100  # one hot
    groups[3] = 1e-40  # subnormal
    groups[4, 3] = float("nan")
    groups[5, 3] = float("-inf")
    groups[6] = torch.linspace(-1, 1, 16)
    for power_of_two in (True, False):
        x_q, _, x_s = ck.quantize(x, E4M3, "group", group_size=16, power_of_two=power_of_two)
        y = ck.dequantize(x_q, x_s, group_size=16, dtype=torch.float32).view(7, 16)
        assert torch.equal(y[0], groups[0])
        assert torch.allclose(y[1:3], groups[1:3], rtol=2**-22, atol=0)
        assert (y[3] - groups[3]).abs().max() <= 2.0**-126 * 2**-10, "half a step under the smallest normal scale"
        assert y[4].isnan().all() and y[5].isnan().all(), "a broken number stays visible"
        alone_q, _, alone_s = ck.quantize(groups[6:], E4M3, "group", group_size=16, power_of_two=power_of_two)
        assert torch.equal(y[6:], ck.dequantize(alone_q, alone_s, group_size=16, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(1, 64), (37, 100), (64, 32), (0, 16)])
def test_transposed_equals_transpose(device, shape):
    x_q, x_qt, _ = ck.quantize(sample(*shape, device=device), E4M3, "tensor", transposed=True)
    assert x_qt.shape == (shape[1], -(-shape[0] // 16) * 16)
    assert torch.equal(x_qt[:, : shape[0]].view(torch.uint8), x_q.view(torch.uint8).t())
    assert not x_qt[:, shape[0] :].view(torch.uint8).any()


def test_transpose_moves_power_of_two_scales_exactly(device):
    """Rows down to 2**-14 of the largest keep every bit: 2**15 normal binades of E4M3 less the code's own one."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).clamp(0.5, 1).to(device)
    x *= 2.0 ** -(torch.arange(32, device=device) % 13)[:, None].float()
    x_q, _, x_s = ck.quantize(x)
    x_qt, top = ck.transpose(x_q, x_s)
    assert top == x_s.max()
    assert torch.equal(ck.dequantize(x_qt, top, dtype=torch.float32).t(), ck.dequantize(x_q, x_s, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_transpose_moves_every_code_by_every_ratio(twin, device, dtype):
    """All codes, NaN too, times 2**0 to 2**-40 and less: the reference's codes, and the exact product rounded once."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7C] if dtype == E5M2 else codes  # inf, which quantize never writes
    exponents = torch.tensor([*range(41), 60, 100, 126, 200, 229], dtype=torch.float64)  # of scales down to 2**-129
    x_s = torch.exp2(100 - exponents)[:, None].float()
    x_q = codes.expand(len(exponents), -1).contiguous().view(dtype)
    expected, actual = transpose_ref(x_q, x_s), twin.transpose([x_q.to(device)], x_s.to(device))
    assert actual[1].item() == expected[1].item() == 2.0**100
    moved = actual[0].cpu().float()
    assert torch.equal(moved.nan_to_num(7e37), expected[0].float().nan_to_num(7e37))
    exact = (
        (x_q.double() * torch.exp2(-exponents)[:, None]).float().to(dtype).float().t()
    )  # float32 holds all products
    assert torch.equal(moved[:, : len(exponents)].nan_to_num(7e37), exact.nan_to_num(7e37))
    assert moved[:, : len(exponents)].isnan().sum() == x_q.float().isnan().sum() > 0


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_transpose_of_broken_and_of_vanished_scales(twin, device, dtype):
    """One NaN scale makes all codes NaN; scales below the smallest normal number are measured against that."""
    x_q = quantize_ref(sample(5, 32), dtype, "token", 0, True, None, True, False)[0]
    broken = torch.tensor([1.0, 2.0, float("nan"), 0.5, 0.0])[:, None]
    x_qt, top = twin.transpose([x_q.to(device)], broken.to(device))
    assert top.isnan().all() and x_qt[:, :5].float().isnan().all()
    for scales in ([0.0] * 5, [2.0**-130, 2.0**-128, 0.0, 2.0**-149, 2.0**-127]):
        x_s = torch.tensor(scales)[:, None]
        expected, actual = transpose_ref(x_q, x_s), twin.transpose([x_q.to(device)], x_s.to(device))
        assert torch.equal(actual[0].cpu().float(), expected[0].float()) and torch.equal(actual[1].cpu(), expected[1])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(
    "rows", [(32, 16, 16), (5, 130, 7), (40, 0, 3), (3, 0), (0, 0), (48, 144), (16,) * 8, (3,) * 6]
)
def test_transpose_of_several_is_that_of_them_joined(twin, device, rows, dtype):
    x_q, _, x_s = quantize_ref(sample(sum(rows), 100), dtype, "token", 0, True, None, True, False)
    parts = [part.to(device) for part in x_q.split(rows)]
    for scale in (x_s, None) if sum(rows) else (None,):
        expected = transpose_ref(x_q, scale)
        for transpose in (twin.transpose, ck.transpose):
            codes, top = transpose(parts, scale if scale is None else scale.to(device))
            assert codes.dtype == dtype and torch.equal(codes.cpu().float(), expected[0].float())
            assert scale is None or torch.equal(top.cpu(), expected[1])


def test_leading_dimensions_are_flattened(device):
    x = sample(24, 64, device=device)
    x_q, _, x_s = ck.quantize(x.view(2, 3, 4, 64))
    flat_q, _, flat_s = ck.quantize(x)
    assert torch.equal(x_q.view(torch.uint8), flat_q.view(torch.uint8)) and torch.equal(x_s, flat_s)


@pytest.mark.parametrize(("granularity", "group"), RECIPES)
def test_registration(device, granularity, group):
    """Fake and kernel agree (torch.library.opcheck), with and without a given scale, for one tensor and several."""
    x = sample(20, 128, device=device)
    arguments = (E4M3, granularity, group, True)
    quantize = torch.ops.coat_kernels.quantize.default
    x_q, _, x_s = ck.quantize(x, E4M3, granularity, group_size=group)
    for parts, dim in (([x], 0), (list(x.split(9)), 0), (list(x.split(48, 1)), 1)):
        rest = (torch.float32, dim, None)
        layout = (True, granularity == "tensor")
        torch.library.opcheck(quantize, (parts, *arguments, None, *layout, *rest), test_utils=OPCHECKS)
        torch.library.opcheck(quantize, (parts, *arguments, x_s, True, False, *rest), test_utils=OPCHECKS)
    for scale_dtype in SCALE_DTYPES if group else (torch.float32,):
        x_q, _, x_s = ck.quantize(x, E4M3, granularity, group_size=group, scale_dtype=scale_dtype)
        rest = (None, True, False, scale_dtype, 0, None)
        torch.library.opcheck(quantize, ([x], *arguments, *rest), test_utils=OPCHECKS)
        torch.library.opcheck(
            torch.ops.coat_kernels.dequantize.default, (x_q, x_s, group, torch.bfloat16), test_utils=OPCHECKS
        )
    for scale in (None, *([x_s] if granularity == "token" else [])):
        for parts in ([x_q], list(x_q.split(9))):
            torch.library.opcheck(torch.ops.coat_kernels.transpose.default, (parts, scale), test_utils=OPCHECKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(2, 16, dtype=torch.int32)), "torch.int32"),
        (dict(dtype=torch.float8_e4m3fnuz), "float8_e4m3fnuz"),
        (dict(granularity="row"), "'row'"),
        (dict(granularity="group"), "group_size is 0"),
        (dict(granularity="group", group_size=24), "group_size is 24"),
        (dict(group_size=16), "group_size is 16"),
        (dict(scale=torch.ones(3, 1)), r"\[3, 1\]"),
        (dict(scale_dtype=torch.float16), "torch.float16"),
        (dict(scale_dtype=torch.bfloat16), "torch.bfloat16"),
        (
            dict(granularity="group", group_size=16, scale_dtype=torch.uint8, power_of_two=False),
            "power_of_two is False",
        ),
        (dict(granularity="group", group_size=16, scale=torch.ones(2, 1), scale_dtype=torch.uint8), "torch.uint8"),
        (dict(x=[]), "empty sequence"),
        (dict(dim=2), "dim is 2"),
        (dict(codes=False), "codes and transposed are both False"),
        (dict(transposed=True), "granularity 'token'; .* expected 'tensor', or transpose"),
        (dict(x=[torch.ones(2, 16), torch.ones(2, 8)]), r"\[2, 8\]"),
        (dict(x=[torch.ones(2, 16), torch.ones(3, 16)], dim=1), r"\[3, 16\]"),
        (dict(x=[torch.ones(2, 16), torch.ones(2, 16).bfloat16()]), "torch.bfloat16"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ck.quantize(**{"x": torch.ones(2, 16), **change})


@pytest.mark.parametrize(
    ("x_q", "scale", "message"),
    [
        ([], None, "empty sequence"),
        (torch.ones(2, 16), None, "x_q is torch.float32"),
        ([torch.ones(2, 16).to(E4M3), torch.ones(2, 8).to(E4M3)], None, r"\[2, 8\] .* cannot stand below"),
        ([torch.ones(2, 16).to(E4M3), torch.ones(2, 16).to(E5M2)], None, "cannot stand below"),
        ([torch.ones(2, 16).to(E4M3)] * 2, torch.ones(2, 1), r"\[2, 1\], expected torch.float32 \[4, 1\]"),
        (torch.ones(2, 16).to(E4M3), torch.ones(1, 1), r"\[1, 1\], expected torch.float32 \[2, 1\]"),
    ],
)
def test_bad_input_of_transpose_is_named(x_q, scale, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ck.transpose(x_q, scale)


EACH = [
    [(8, 64), (3, 4112), (16, 64)],
    [(8, 64), (3, 5000), (16, 64)],
    [(1, 17), (37, 100), (0, 48), (5, 4096)],
    [(2, 0), (6, 33)],
]


@pytest.mark.parametrize("shapes", EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantize_each_parity(twin, same_codes, device, shapes, dtype):
    x = [sample(*shape, dtype) for shape in shapes]
    expected = quantize_each_ref(x)
    actual = twin.quantize_each([part.to(device) for part in x])
    assert torch.equal(actual[1].cpu(), expected[1]), "scales are bitwise equal"
    same_codes(actual[0], expected[0])


def test_quantize_each_parity_of_what_lies_anywhere(twin, same_codes, device):
    """An address that is no multiple of 16, strided values, rows with no finite scale or a tiny one."""

    def matrices(where):  # views do not stay views on their way to a GPU
        shifted = sample(1, 8 * 64 + 1, torch.float32, where).flatten()[1:].view(8, 64)
        strided = sample(6, 130, torch.float32, where)[:, ::2]
        strided[0], strided[1, 3], strided[2] = 0.0, float("inf"), 1e-39
        return [shifted, strided]

    expected = quantize_each_ref(matrices("cpu"))
    codes, scales = twin.quantize_each(matrices(device))
    assert torch.equal(scales.cpu().nan_to_num(7.0), expected[1].nan_to_num(7.0))
    broken = slice(8 * 64 + 65, 8 * 64 + 130)  # codes of the row that has no scale, which do not matter
    for made in (codes, expected[0]):
        made.view(torch.uint8)[broken] = 0
    same_codes(codes, expected[0])


def test_quantize_each_is_quantize_of_each(device):
    x = [sample(*shape).to(device) for shape in EACH[2]]
    for (codes, scale), part in zip(ck.quantize_each(x), x, strict=True):
        q, _, s = ck.quantize(part)
        assert torch.equal(codes.view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(scale, s)
        assert codes.shape == q.shape
        assert scale.shape == s.shape
    torch.library.opcheck(torch.ops.coat_kernels.quantize_each.default, (x,), test_utils=OPCHECKS)


def test_quantize_each_refuses_what_does_not_fit():
    x = [sample(4, 64), sample(4, 32)]
    with pytest.raises(ValueError, match="empty sequence"):
        ck.quantize_each([])
    with pytest.raises(TypeError, match="torch.int32"):
        ck.quantize_each([x[0].int()])
    with pytest.raises(ValueError, match="torch.float32.*expected matrices of the first"):
        ck.quantize_each([x[0], x[1].float()])

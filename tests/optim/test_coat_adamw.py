"""CoatAdamW against torch.optim.AdamW, through checkpoints, and with input that it must refuse."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hf_coat.optim import CoatAdamW, CoatLion

MODES = [("lean", "stochastic"), ("lean", "master"), ("paper", "nearest"), ("e4m3", "stochastic")]
SHAPES = [(40, 200), (3, 5, 70), (300,), (), (0, 4), (6, 3, 2, 2)]


def parameters(dtype=torch.float32, device="cpu", shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def set_gradients(params, seed, low=0.0):
    """Random gradients; with ``low``, their magnitudes lie between it and 1, their signs do not depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.Generator().manual_seed(99)
    for p in params:
        g = torch.randn(p.shape, generator=generator)
        if low:
            magnitude = low + (1 - low) * torch.rand(p.shape, generator=generator)
            g = magnitude * torch.where(torch.rand(p.shape, generator=signs) < 0.5, -1.0, 1.0)
        p.grad = g.to(p)


def assert_same(actual, expected):
    """Two optimizers hold bitwise equal parameters, states and settings."""
    for group, other in zip(actual.param_groups, expected.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
        for p, q in zip(group["params"], other["params"], strict=True):
            assert p.dtype == q.dtype and torch.equal(p, q)
            assert list(actual.state[p]) == list(expected.state[q])
            for key, value in actual.state[p].items():
                assert value.dtype == expected.state[q][key].dtype and torch.equal(value, expected.state[q][key]), key


# --- the same as torch.optim.AdamW, but for the rounding of the states


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}, {"weight_decay": 0.0}],
    ids=["defaults", "other", "no-decay"],
)
def test_first_step_is_adamws(options, device):
    """Before the states are rounded for the first time all is float32 arithmetic: a few roundings of its terms."""
    ours, theirs = parameters(device=device), parameters(device=device)
    set_gradients(ours, 1), set_gradients(theirs, 1)
    mine, reference = CoatAdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    mine.step(), reference.step()
    step = 2 * mine.defaults["lr"]  # the first update is lr * g / (|g| + eps), at most lr; twice, for the decay
    for p, q in zip(ours, theirs, strict=True):
        assert ((p - q).abs() <= 2.0**-21 * (q.abs() + step)).all()


@pytest.mark.parametrize("format", ["lean", "paper", "e4m3"])
def test_later_steps_stay_near_adamws(format, device):
    """The error of every step is what rounding the states explains.

    Gradients of constant sign in [1/2, 1] give |m| and v a range of at most 2 and 4 in a group. A code is off by at
    most 1/16 (half a step at the bottom of a binade); expansions of 255 and floor(265.8 / 2) = 132 take the 15.9th and
    8.25th root of that: d_m = 0.4 % and d_v = 0.8 %. Without expansion (ranges far inside E4M3's) both are 1/16. In
    lean a code of v is at least 255 / 2**0.5, and off by 1 / 2, four times as much of v: d_v = 1.1 %; m has the error
    of v's root (0.6 %) and half a step of m / sqrt(v), of 1 / 127 of the largest, itself at most twice the smallest:
    d_m = 1.4 %. Terms of one sign add up, so after t steps m is off by at most (1 + d_m)**t, v likewise, and the step,
    which is at most 2 lr (m <= 1 after its correction, sqrt(v) >= 1/2), by the product of the one and the root of the
    other.
    """
    lr, steps = 1e-2, 6
    ours, theirs = parameters(device=device), parameters(device=device)
    mine, reference = CoatAdamW(ours, lr=lr, format=format), torch.optim.AdamW(theirs, lr=lr)
    paper = (17 / 16) ** (16 / 255), (17 / 16) ** (16 / 132)
    d_m, d_v = {"lean": (1.014, 1.011), "paper": paper, "e4m3": (17 / 16, 17 / 16)}[format]
    bound = 0.0
    for t in range(steps):
        set_gradients(ours, t, low=0.5), set_gradients(theirs, t, low=0.5)
        mine.step(), reference.step()
        bound += 2 * lr * ((d_m * d_v**0.5) ** t - 1) + 2.0**-20
        for p, q in zip(ours, theirs, strict=True):
            assert ((p - q).abs() <= bound).all()
    assert any(not torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_bf16_parameters_are_rounded_once(device):
    """A step on BF16 parameters is the float32 step of the same values, rounded to nearest even."""
    low, full = (
        parameters(torch.bfloat16, device),
        [nn.Parameter(p.float()) for p in parameters(torch.bfloat16, device)],
    )
    mine, reference = CoatAdamW(low, lr=0.05, weights="nearest"), CoatAdamW(full, lr=0.05)
    for t in range(3):
        set_gradients(low, t)
        for p, q in zip(low, full, strict=True):
            q.data.copy_(p)
            q.grad = p.grad.float()
        mine.step(), reference.step()
        for p, q in zip(low, full, strict=True):
            assert torch.equal(p, q.bfloat16())


# --- BF16 weights


def small_steps(weights, dtype=torch.bfloat16, device="cpu", steps=400):
    """Ones after steps of -1 / 40 of the distance to the next lower BF16 number, 2**-8, and their optimizer."""
    p = nn.Parameter(torch.ones(64, 128, dtype=dtype, device=device))
    optimizer = CoatAdamW([p], lr=2.0**-8 / 40, weight_decay=0.0, weights=weights)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p, optimizer


def test_small_updates(device):
    """After 400 steps: nearest stands still, by chance the mean arrives, and so does the master of each value."""
    expected = 1 - 400 / 40 * 2.0**-8
    exact, _ = small_steps("stochastic", torch.float32, device)
    assert (exact - expected).abs().max() < 1e-4
    assert (small_steps("nearest", device=device)[0] == 1).all()
    # Each of 8192 values makes 400 draws of a variance of at most p = 1 / 40 of (2**-8)**2.
    deviation = 2.0**-8 * (400 / 40 / 8192) ** 0.5
    assert abs(small_steps("stochastic", device=device)[0].float().mean().item() - expected) < 5 * deviation
    p, optimizer = small_steps("master", device=device)
    master = optimizer.master_weights()[p]
    assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), p)
    # steps of 2**-8 / 40 are 6.4 of the 24-bit numbers below one, of 2**-16; each is rounded to one, by at most 0.4
    assert (master - expected).abs().max() < 400 * 0.41 * 2.0**-16
    other = CoatAdamW([nn.Parameter(p.detach().clone())], weights="master")
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert torch.equal(next(iter(other.master_weights().values())), master)


def test_master_of_weights_that_were_loaded():
    """Weights from outside count; the old residual moves them by half of a BF16 step at most."""
    p, optimizer = small_steps("master", steps=5)
    loaded = torch.randn_like(p)
    loaded[0, :4] = torch.tensor([0.0, -0.0, 1e-38, -1e-38])
    with torch.no_grad():
        p.copy_(loaded)
    master = optimizer.master_weights()[p]
    assert ((master - loaded.float()).abs() <= 2.0**-8 * loaded.float().abs() + 2.0**-126).all()
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert p.isfinite().all() and torch.equal(optimizer.master_weights()[p], master)


def test_seeds_matter_and_float32_weights_are_exact():
    def run(seed, dtype):
        params = parameters(dtype)
        optimizer = CoatAdamW(params, lr=1e-4, seed=seed)
        set_gradients(params, 0)
        optimizer.step()
        return params

    a, b, c = run(0, torch.bfloat16), run(0, torch.bfloat16), run(1, torch.bfloat16)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a[0], c[0])
    assert all(torch.equal(x, y) for x, y in zip(run(0, torch.float32), run(1, torch.float32), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regression_converges_like_adamw(dtype, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator).to(device)
    y = torch.tanh(x @ torch.randn(32, 8, generator=generator).to(device) / 4)
    losses = []
    for optimizer_class in (CoatAdamW, torch.optim.AdamW):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(32, 160), nn.Tanh(), nn.Linear(160, 8)).to(device, dtype)
        optimizer = optimizer_class(model.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=150)
        history = []
        for _ in range(150):
            loss = nn.functional.mse_loss(model(x.to(dtype)).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0] / 20
    assert losses[0][-1] < 1.3 * losses[1][-1], "at most 30 % above AdamW at the end of a 20-fold descent"


# --- the interface of torch.optim


@pytest.mark.parametrize(("format", "weights"), MODES)
def test_state_is_what_it_says(format, weights, device):
    params = parameters(torch.bfloat16, device, shapes=[(64, 300), ()])
    optimizer = CoatAdamW(params, format=format, weights=weights)
    assert not optimizer.state and optimizer.state_bytes() == 0, "made with the first gradient"
    set_gradients(params, 0)
    optimizer.step()
    for p, groups in zip(params, [(64, 3), (1,)], strict=True):
        state = optimizer.state[p]
        assert state["step"].dtype == torch.float32 and state["step"].device.type == "cpu" and state["step"] == 1
        held = {key: (value.dtype, value.shape) for key, value in state.items() if key != "step"}
        expected = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            expected |= {f"{moment}_codes": (torch.uint8, p.shape), f"{moment}_scale": (torch.float32, groups)}
            if format == "paper":
                expected[f"{moment}_expansion"] = torch.uint8, groups
        if weights == "master":
            expected["weight_residual"] = torch.uint8, p.shape
        assert held == expected and all(value.device == p.device for key, value in state.items() if key != "step")
    per_value = 3 if weights == "master" else 2
    per_group = 10 if format == "paper" else 8
    assert optimizer.state_bytes() == per_value * (64 * 300 + 1) + per_group * (64 * 3 + 1) + 2 * 4
    assert "group_size: 128" in repr(optimizer) and f"format: {format}" in repr(optimizer)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 2 + 8 / 128), ({"format": "paper"}, 2 + 10 / 128), ({"weights": "master"}, 3 + 8 / 128)],
)
def test_bytes_per_parameter(options, expected):
    p = nn.Parameter(torch.zeros(256, 1024, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    optimizer = CoatAdamW([p], **options)
    optimizer.step()
    assert optimizer.state_bytes() / p.numel() == pytest.approx(expected, abs=1e-4)


def test_vectors_are_columns(device):
    """Their states are the same however many processes share them; FSDP2 cuts vectors anywhere."""
    (vector,) = parameters(device=device, shapes=[(300,)])
    column = nn.Parameter(vector.detach()[:, None].clone())
    optimizer, other = CoatAdamW([vector]), CoatAdamW([column])
    for t in range(3):
        set_gradients([vector], t), set_gradients([column], t)
        optimizer.step(), other.step()
    assert torch.equal(vector, column[:, 0]) and optimizer.state[vector]["exp_avg_codes"].shape == (300,)
    assert optimizer.state[vector]["exp_avg_scale"].shape == other.state[column]["exp_avg_scale"].shape == (300, 1)


def test_parameter_groups_and_late_parameters(device):
    """Settings and step counts are each group's and each parameter's own."""
    first, second, third = parameters(device=device, shapes=[(8, 130)] * 3)
    frozen = second.detach().clone()
    optimizer = CoatAdamW([{"params": [first], "weight_decay": 0.5}, {"params": [second], "lr": 0.0}], lr=1e-2)
    set_gradients([first, second], 0)
    optimizer.step()
    optimizer.add_param_group({"params": [third], "betas": (0.5, 0.9), "group_size": 64})
    set_gradients([first, third], 1)
    second.grad = None
    optimizer.step()
    assert torch.equal(second, frozen)
    assert [optimizer.state[p]["step"].item() for p in (first, second, third)] == [2, 1, 1]
    assert optimizer.state[third]["exp_avg_scale"].shape == (8, 3)
    (alone,) = parameters(device=device, shapes=[(8, 130)] * 3)[2:]
    alone.grad = third.grad.clone()
    CoatAdamW([alone], lr=1e-2, betas=(0.5, 0.9), group_size=64).step()
    assert torch.equal(alone, third)


def test_learning_rates_that_are_tensors(device):
    ours, same = parameters(device=device), parameters(device=device)
    tensor = CoatAdamW(ours, lr=torch.tensor(0.02, device=device))
    number = CoatAdamW(same, lr=0.02)
    for optimizer, params in ((tensor, ours), (number, same)):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for t in range(3):
            set_gradients(params, t)
            optimizer.step()
            schedule.step()
    for p, q in zip(ours, same, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=3 * 0.04 * 2.0**-22 + 2.0**-22 * 5)  # lr itself is rounded to float32


def test_closure():
    (p,) = parameters(shapes=[(4,)])
    optimizer = CoatAdamW([p])

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    assert optimizer.step(closure).item() == pytest.approx((before**2).sum().item())
    assert not torch.equal(p, before) and optimizer.step() is None


def test_autograd_notices_the_step(device):
    """A graph that saved a parameter must not be used after the step changed it."""
    (p,) = parameters(device=device, shapes=[(4, 4)])
    loss = (p @ p).sum()
    loss.backward(retain_graph=True)
    CoatAdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_that_are_not_finite(device):
    params, same = parameters(device=device), parameters(device=device)
    optimizer, reference = CoatAdamW(params), CoatAdamW(same)
    for t in range(4):
        set_gradients(params, t), set_gradients(same, t)
        if t == 1:
            params[0].grad[7, 150] = float("nan")
            params[2].grad[-1] = float("inf")
        optimizer.step(), reference.step()
    assert optimizer.skipped_groups() == 2 and reference.skipped_groups() == 0
    for p, q in zip(params, same, strict=True):
        assert p.isfinite().all()
        differs = (p != q).nonzero()
        assert all(index[0] == 7 and index[1] >= 128 for index in differs) or p is params[2]
    assert not torch.equal(params[0][7, 128:], same[0][7, 128:])
    assert torch.equal(params[2][:256], same[2][:256]) and not torch.equal(params[2][256:], same[2][256:])
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize(("format", "weights"), MODES)
def test_two_runs_are_equal(format, weights, device):
    runs = []
    for _ in range(2):
        params = parameters(torch.bfloat16, device)
        optimizer = CoatAdamW(params, format=format, weights=weights)
        for t in range(3):
            set_gradients(params, t)
            optimizer.step()
        runs.append(optimizer)
    assert_same(*runs)


# --- checkpoints


def trained(dtype=torch.float32, device="cpu", steps=3, **options):
    params = parameters(dtype, device)
    optimizer = CoatAdamW(params, lr=0.01, **options)
    for t in range(steps):
        set_gradients(params, t)
        optimizer.step()
    return optimizer


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@pytest.mark.parametrize(("format", "weights"), MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_continue_equals_the_straight_run(dtype, format, weights, device):
    mode = {"format": format, "weights": weights}
    straight = trained(dtype, device, steps=5, seed=3, **mode)
    half = trained(dtype, device, seed=3, **mode)
    params = [nn.Parameter(p.detach().clone()) for p in half.param_groups[0]["params"]]
    resumed = CoatAdamW(params, lr=0.5, weight_decay=0.9, **mode)  # the checkpoint's settings replace these
    resumed.load_state_dict(state_dict=through_a_file(half.state_dict()))
    assert_same(resumed, half)
    for t in (3, 4):
        set_gradients(params, t)
        resumed.step()
    assert_same(resumed, straight)


def test_loaded_states_are_copies():
    source = trained()
    params = [nn.Parameter(p.detach().clone()) for p in source.param_groups[0]["params"]]
    other = CoatAdamW(params)
    other.load_state_dict(source.state_dict())
    before = copy.deepcopy(source.state_dict())
    set_gradients(params, 9)
    other.step()
    after = source.state_dict()
    assert all(torch.equal(after["state"][i][k], v) for i, state in before["state"].items() for k, v in state.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_of_the_optimizer_go_on_alike(copied):
    optimizer = trained()
    twin = copied(optimizer)
    assert_same(twin, optimizer)
    for o in (optimizer, twin):
        set_gradients(o.param_groups[0]["params"], 7)
        o.step()
    assert_same(twin, optimizer)
    assert twin.skipped_groups() == 0


def test_hooks_and_names():
    """load_state_dict is our own; what torch.optim promises around it still holds."""
    model = nn.Linear(130, 4)
    optimizer = CoatAdamW(model.named_parameters())
    set_gradients(list(model.parameters()), 0)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    called = []
    optimizer.register_load_state_dict_pre_hook(lambda o, s: called.append("pre") or {**s, "extra": 1})
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("post"))
    optimizer.load_state_dict(saved)
    optimizer.load_state_dict(optimizer.state_dict())  # and again
    assert called == ["pre", "post"] * 2 and optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    bad = copy.deepcopy(saved)
    bad["state"][0]["exp_avg_codes"] = bad["state"][0]["exp_avg_codes"][:, :100]
    with pytest.raises(ValueError, match="state of weight: exp_avg_codes is torch.uint8 .4, 100."):
        optimizer.load_state_dict(bad)


def test_distributed_checkpoint_api():
    """It takes a step with zero gradients and lr = 0 to make states, and passes state_dict by keyword."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def make():
        torch.manual_seed(0)
        model = nn.Linear(150, 3)
        return model, CoatAdamW(model.parameters(), lr=0.01)

    model, optimizer = make()
    set_gradients(list(model.parameters()), 0)
    optimizer.step()
    saved = through_a_file(get_optimizer_state_dict(model, optimizer))
    fresh, other = make()
    untouched = copy.deepcopy(fresh.state_dict())
    set_optimizer_state_dict(fresh, other, saved)
    assert all(torch.equal(value, untouched[key]) for key, value in fresh.state_dict().items())
    fresh.load_state_dict(model.state_dict())
    assert_same(other, optimizer)


def adamw_states():
    params = parameters()
    optimizer = torch.optim.AdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    return optimizer.state_dict()


def changed(**changes):
    """The state dict of a trained optimizer, entries of the first parameter's state replaced or (None) removed."""
    saved = trained().state_dict()
    for key, value in changes.items():
        if value is None:
            del saved["state"][0][key]
        else:
            saved["state"][0][key] = value
    return saved


def other_model():
    params = parameters(shapes=[(40, 200), (3, 5, 70), (301,), (), (0, 4), (6, 3, 2, 2)])
    optimizer = CoatAdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            adamw_states,
            "group 0 of the state dict lacks group_size, format, weights, seed: it is of another optimizer",
        ),
        (other_model, r"parameter 2 of group 0: exp_avg_codes is torch.uint8 \[301\], expected torch.uint8 \[300\]"),
        (lambda: trained(group_size=64).state_dict(), "group_size=64, this optimizer group_size=128: construct"),
        (lambda: trained(format="paper").state_dict(), "format='paper', this optimizer format='lean': construct"),
        (lambda: trained(weights="master").state_dict(), "weights='master', this optimizer weights='stochastic'"),
        (lambda: changed(exp_avg_sq_scale=None), "parameter 0 of group 0 has the entries .*it is damaged"),
        (
            lambda: changed(exp_avg_codes=torch.zeros(40, 200)),
            r"exp_avg_codes is torch.float32 \[40, 200\], expected torch.uint8",
        ),
        (lambda: changed(exp_avg_codes=7), "exp_avg_codes is a int, expected a torch.uint8 tensor"),
        (lambda: {"param_groups": []}, "the state dict lacks state"),
        (lambda: CoatAdamW(parameters()[:2]).state_dict(), r"groups of \[2\] parameters, this optimizer of \[6\]"),
        (lambda: {**trained().state_dict(), "state": {17: {}}}, r"states of parameters \[17\]"),
    ],
    ids=[
        "adamw",
        "shape",
        "group_size",
        "format",
        "weights",
        "entry",
        "dtype",
        "type",
        "no-state",
        "groups",
        "unknown",
    ],
)
def test_states_that_do_not_fit_change_nothing(make, message):
    optimizer, same = trained(), trained()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    assert_same(optimizer, same)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.ones(2)}, r"lr is a tensor of shape \[2\]"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas are \(0.9,\)"),
        ({"eps": 0.0}, "eps is 0.0; expected at least 1e-15"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"group_size": 0}, "group_size is 0; expected an integer from 1 to 1024"),
        ({"group_size": 128.0}, "group_size is 128.0"),
        ({"format": "fp8"}, "format is 'fp8'; expected one of 'lean', 'paper', 'e4m3'"),
        ({"weights": None}, "weights is None; expected one of 'nearest', 'stochastic', 'master'"),
        ({"seed": 0.5}, "seed is 0.5; expected an integer"),
        ({"capturable": 1}, "capturable is 1; expected True or False"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        CoatAdamW(parameters(), **options)
    optimizer = CoatAdamW(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(seed=1), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    optimizer = CoatAdamW(parameters())
    with pytest.raises(TypeError, match=f"parameter 1 of the group, .2, 2., is {dtype}.*bf16 rather than fp16"):
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2, dtype=dtype))]}
        )
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'maximize'"):
        CoatAdamW(parameters(), maximize=True)


@pytest.mark.parametrize("key", ["amsgrad", "maximize"])
def test_what_torchs_adamw_can_and_this_cannot_is_refused_in_groups(key):
    with pytest.raises(ValueError, match=f"{key} is True in a parameter group"):
        CoatAdamW([{"params": list(parameters()), key: True}])
    CoatAdamW([{"params": list(parameters()), key: False, "name": "all"}])


def test_sparse_gradients_are_refused_before_anything_moves():
    dense = nn.Parameter(torch.ones(3))
    embedding = nn.Embedding(5, 4, sparse=True)
    (embedding(torch.tensor([1, 2])).sum() + dense.sum()).backward()
    optimizer = CoatAdamW([dense, embedding.weight])
    with pytest.raises(RuntimeError, match="torch.sparse_coo.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3)) and not optimizer.state


def test_steps_that_are_counted_on_the_device(device):
    """capturable only moves the step counts, also when states are loaded."""
    params, same = parameters(device=device), parameters(device=device)
    optimizer, reference = CoatAdamW(params, capturable=True), CoatAdamW(same)
    for t in range(3):
        set_gradients(params, t), set_gradients(same, t)
        optimizer.step(), reference.step()
    assert all(state["step"].device == params[0].device for state in optimizer.state.values())
    for p, q in zip(params, same, strict=True):
        assert torch.allclose(p, q, rtol=2.0**-20, atol=1e-7)
    reference.load_state_dict(optimizer.state_dict())
    assert all(state["step"].device.type == "cpu" for state in reference.state.values())
    assert not reference.param_groups[0]["capturable"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [CoatAdamW, CoatLion])
@pytest.mark.parametrize(("format", "weights"), MODES)
def test_cuda_graph(format, weights, kind):
    """A captured step, replayed, is the step: on new gradients and with another learning rate."""
    runs = []
    for captured in (True, False):
        params = parameters(torch.bfloat16, "cuda")
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = kind(params, lr=lr, format=format, weights=weights, capturable=True)
        set_gradients(params, 0)
        optimizer.step()
        torch.cuda.synchronize()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for t in range(1, 4):
            generator = torch.Generator().manual_seed(t)
            for p in params:
                p.grad.copy_(torch.randn(p.shape, generator=generator))
            lr.fill_(1e-2 / t)
            graph.replay() if captured else optimizer.step()
        runs.append(optimizer)
    assert_same(*runs)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [CoatAdamW, CoatLion])
@pytest.mark.parametrize(("format", "weights"), MODES)
def test_a_step_never_waits_for_the_device(format, weights, kind):
    params = parameters(torch.bfloat16, "cuda") + parameters(torch.float32, "cuda", seed=1)
    optimizer = kind(params, lr=torch.tensor(1e-3, device="cuda"), format=format, weights=weights)
    set_gradients(params, 0)
    optimizer.step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped_groups() == 0

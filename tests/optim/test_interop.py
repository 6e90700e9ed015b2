"""States of torch.optim.AdamW taken over by CoatAdamW, and given back."""

import copy

import pytest
import torch
from torch import nn

from hf_coat.optim import CoatAdamW, from_adamw_state_dict, to_adamw_state_dict

# What rounding moves a value by, in parts of the largest of its group, for the first and the second moment. "paper": a
# code is off by 1/16 of itself at most; under an expansion k a value moves by the k-th root of that, and where a group
# spans 2**33 k is 1/2. "lean": half of 127 steps of m / sqrt(v); of 255 steps of the fourth root of v, times four.
ROUNDING = {
    "paper": ((17 / 16) ** 2 - 1, (17 / 16) ** 2 - 1),
    "lean": (1.01 / 254, 1.01 * 4 / 510),
    "e4m3": (1 / 16, 1 / 16),
}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 150), nn.Tanh(), nn.LayerNorm(150), nn.Linear(150, 8)).to(dtype)


def groups(model):
    """Two groups, as Trainer makes them; the settings are not the defaults."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == two] for two in (True, False))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]


SETTINGS = {"lr": 5e-3, "betas": (0.85, 0.98), "eps": 1e-7}


def train(model, optimizer, steps):
    losses = []
    target = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)) / 6
    for step in steps:
        x = torch.randn(64, 40, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(model(x.to(model[0].weight.dtype)).float(), x @ target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def half():
    """A model and its AdamW after 40 steps."""
    model = net()
    optimizer = torch.optim.AdamW(groups(model), **SETTINGS)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # leaves initial_lr in the groups
    train(model, optimizer, range(40))
    return model, optimizer


def go_on(half, cls, state_dict):
    model = copy.deepcopy(half[0])
    optimizer = cls(groups(model))
    optimizer.load_state_dict(state_dict)
    return model, optimizer


@pytest.mark.parametrize("settings", [{}, {"group_size": 32, "format": "paper"}, {"format": "e4m3"}])
def test_there_and_back(half, settings):
    """Every moment within its rounding; settings, steps and scheduler's marks as they were."""
    format, size = settings.get("format", "lean"), settings.get("group_size", 128)
    before = copy.deepcopy(half[1].state_dict())
    coat = from_adamw_state_dict(half[1].state_dict(), **settings)
    back = to_adamw_state_dict(coat)
    for key, state in before["state"].items():
        assert back["state"][key]["step"] == 40 and coat["state"][key]["exp_avg_codes"].dtype == torch.uint8
        pairs = [(back["state"][key][moment], state[moment]) for moment in ("exp_avg", "exp_avg_sq")]
        assert all(now.dtype == torch.float32 for now, _ in pairs)
        if state["exp_avg"].dim() == 1:  # each value of a vector has its own scale
            assert all(torch.allclose(now, then, rtol=1e-5) for now, then in pairs)
        if format == "lean":
            pairs[0] = [m / v.sqrt() for m, v in zip(*pairs, strict=True)]
        for (now, then), bound in zip(pairs, ROUNDING[format], strict=True):
            for a, b in zip(now.split(size, dim=-1), then.split(size, dim=-1), strict=True):
                assert ((a - b).abs() <= bound * b.abs().amax(dim=-1, keepdim=True)).all()
    keys = before["param_groups"][0].keys()
    for group, then in zip(back["param_groups"], before["param_groups"], strict=True):
        assert {key: group[key] for key in keys} == then
    assert to_adamw_state_dict(from_adamw_state_dict(back, **settings))["state"].keys() == before["state"].keys()


@pytest.mark.parametrize("format", ["lean", "e4m3"])
def test_exporting_is_exact(half, format):
    """Going back and forth once more moves nothing but the last bits: what was decoded has the same codes."""
    once = to_adamw_state_dict(from_adamw_state_dict(half[1].state_dict(), format=format))
    twice = to_adamw_state_dict(from_adamw_state_dict(once, format=format))
    for key, state in once["state"].items():
        for name, value in state.items():
            assert torch.allclose(value, twice["state"][key][name], rtol=1e-5, atol=0), name


def test_training_goes_on(half):
    """AdamW -> CoatAdamW -> AdamW: the loss goes on where it was, and ends where AdamW's does."""
    model, optimizer = copy.deepcopy(half)
    straight = train(model, optimizer, range(40, 80))
    coat_model, coat = go_on(half, CoatAdamW, from_adamw_state_dict(half[1].state_dict()))
    assert [group["lr"] for group in coat.param_groups] == [5e-3, 3e-3] and coat.param_groups[0]["betas"] == (
        0.85,
        0.98,
    )
    losses = train(coat_model, coat, range(40, 60))
    back_model, back = go_on((coat_model, coat), torch.optim.AdamW, to_adamw_state_dict(coat.state_dict()))
    assert all(s["step"] == 60 and s["exp_avg"].dtype == torch.float32 for s in back.state.values())
    losses += train(back_model, back, range(60, 80))
    assert losses[0] == straight[0]
    assert losses == pytest.approx(straight, rel=0.1)
    fresh = copy.deepcopy(half[0])
    forgotten = train(fresh, torch.optim.AdamW(groups(fresh), **SETTINGS), range(40, 80))
    error = [max(abs(a - b) for a, b in zip(run, straight, strict=True)) for run in (losses, forgotten)]
    assert error[0] < error[1] / 5, "far nearer than a start without states"


def test_bf16_states(half):
    model = net(torch.bfloat16)
    optimizer = torch.optim.AdamW(groups(model), **SETTINGS)
    train(model, optimizer, range(3))
    _, coat = go_on((model, optimizer), CoatAdamW, from_adamw_state_dict(optimizer.state_dict()))
    assert all(s["exp_avg_codes"].dtype == torch.uint8 and s["step"] == 3 for s in coat.state.values())
    master = from_adamw_state_dict(optimizer.state_dict(), weights="master")
    CoatAdamW(groups(model), weights="master").load_state_dict(master)


def test_names_and_parameters_without_states():
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    coat = CoatAdamW(model.named_parameters())
    coat.load_state_dict(from_adamw_state_dict(optimizer.state_dict()))
    assert list(coat.state) == [model[0].weight] and coat.param_groups[0]["param_names"][0] == "0.weight"
    assert (
        to_adamw_state_dict(coat.state_dict())["param_groups"][0]["param_names"] == coat.param_groups[0]["param_names"]
    )


def without(state_dict, key):
    return {k: v for k, v in state_dict.items() if k != key}


def adamw(**options):
    model = net()
    optimizer = options.pop("cls", torch.optim.AdamW)(model.parameters(), **options)
    train(model, optimizer, range(1))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("convert", "make", "message"),
    [
        (from_adamw_state_dict, lambda: adamw(amsgrad=True), "group 0 has amsgrad=True"),
        (from_adamw_state_dict, lambda: adamw(maximize=True), "group 0 has maximize=True"),
        (from_adamw_state_dict, lambda: adamw(cls=torch.optim.Adam, weight_decay=0.1), "0.1 that is not decoupled"),
        (from_adamw_state_dict, lambda: adamw(cls=torch.optim.SGD), "group 0 lacks betas, eps"),
        (from_adamw_state_dict, lambda: adamw(cls=CoatAdamW), "it is CoatAdamW's already"),
        (from_adamw_state_dict, lambda: adamw(cls=torch.optim.Adamax), "parameter 0 lacks exp_avg_sq"),
        (from_adamw_state_dict, lambda: without(adamw(), "state"), "the state dict lacks state"),
        (to_adamw_state_dict, adamw, "group 0 lacks settings of CoatAdamW"),
    ],
)
def test_what_cannot_be_converted(convert, make, message):
    with pytest.raises(ValueError, match=message):
        convert(make())


def test_settings_that_do_not_exist():
    with pytest.raises(
        TypeError, match="no setting 'lr' that AdamW lacks; those are group_size, format, weights, seed"
    ):
        from_adamw_state_dict(adamw(), lr=1.0)
    with pytest.raises(ValueError, match="group_size is 0"):
        from_adamw_state_dict(adamw(), group_size=0)
    assert from_adamw_state_dict(adamw(cls=torch.optim.Adam))["param_groups"][0]["weight_decay"] == 0

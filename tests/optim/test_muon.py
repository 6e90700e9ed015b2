"""CoatMuon against torch.optim.Muon, its split of a model, its states and checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hf_coat.optim import CoatAdamW, CoatMuon, GradientRelease, MuonScale, muon_groups
from hf_coat.optim.muon import orthogonal

SHAPES = [(40, 200), (200, 40), (64, 64), (1, 130)]


def matrices(device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def of_matrices(params, **options):
    return CoatMuon([{"params": params, "use_muon": True}], **options)


class Net(nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.norm = nn.Embedding(20, 48), nn.Linear(48, 136), nn.LayerNorm(136)
        self.conv, self.down = nn.Conv1d(136, 136, 3, padding=1), nn.Linear(136, 48, bias=False)
        self.lm_head, self.frozen = nn.Linear(48, 20), nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.to(device)

    def forward(self, ids):
        x = self.norm(torch.tanh(self.up(self.embed(ids))))
        return self.lm_head(self.down(torch.tanh(self.conv(x.mT).mT)))


def train(model, optimizer, steps, release=False):
    released = GradientRelease(optimizer) if release else None
    losses = []
    for step in steps:
        ids = torch.randint(20, (8, 9), generator=torch.Generator().manual_seed(step)).to(model.lm_head.weight.device)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), (ids * 3 % 20).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if release:
        released.remove()
    return losses


def assert_same(one, other):
    for group, group_2 in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(group["params"], group_2["params"], strict=True):
            assert torch.equal(p, q) and list(one.state[p]) == list(other.state[q])
            for key, value in one.state[p].items():
                assert value.dtype == other.state[q][key].dtype and torch.equal(value, other.state[q][key]), key


# --- the mathematics


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (64, 64)])
def test_orthogonal(shape, device):
    """The singular values of what comes out are in [0.6, 1.3], which is where the published polynomial leaves them.

    They begin at 0.04 or more of the norm's here. BF16 adds a hundredth or two.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    spread = torch.linspace(0.3, 1.0, min(shape))
    y = orthogonal((u * spread @ v).to(device)).float().cpu()
    assert y.shape == x.shape
    values = torch.linalg.svdvals(y)
    assert 0.6 < values.min() and values.max() < 1.3
    aligned = torch.einsum("ij,ij->j", u, y @ v.mT)  # the singular vectors are those of x
    assert (aligned > 0.55).all()
    assert torch.equal(orthogonal(torch.zeros(shape, device=device)).float().cpu(), torch.zeros(shape))


@pytest.mark.parametrize("scale", list(MuonScale))
@pytest.mark.parametrize("nesterov", [True, False])
def test_first_step_is_torchs(scale, nesterov, device):
    """Nothing has been rounded to FP8 yet; a few float32 roundings, which BF16 inside Newton-Schulz may enlarge.

    Values of the orthogonal factor are below 1; BF16 carries them with 2**-8, and 15 products with that.
    """
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    ours, theirs = matrices(device), matrices(device)
    set_gradients(ours, 1), set_gradients(theirs, 1)
    of_matrices(ours, scale=scale, **options).step()
    torch.optim.Muon(theirs, adjust_lr_fn=scale.value, **options).step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= 0.02 * scale.factor(*p.shape) * 16 * 2.0**-8
        assert (p - q).abs().mean() <= 0.02 * scale.factor(*p.shape) * 2.0**-12, "and hardly ever"


def test_training_like_torchs(device):
    """With momentum rounded to 8 bits the loss falls as with torch's Muon and AdamW side by side."""
    histories = []
    for coat in (True, False):
        model = Net(device)
        groups = muon_groups(model)
        if coat:
            losses = train(model, CoatMuon(groups, lr=3e-3), range(60))
        else:
            muon = torch.optim.Muon(
                groups[0]["params"], lr=3e-3, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw", momentum=0.95
            )
            adamw = torch.optim.AdamW([{k: v for k, v in g.items() if k != "use_muon"} for g in groups[1:]], lr=3e-3)
            muon.register_step_post_hook(lambda *_, other=adamw: other.step())
            muon.register_step_post_hook(lambda *_, other=adamw: other.zero_grad())
            losses = train(model, muon, range(60))
        histories.append(losses)
    coat, torchs = histories
    assert coat[-1] < coat[0] / 4
    assert sum(coat[-10:]) / 10 == pytest.approx(sum(torchs[-10:]) / 10, abs=0.05 * torchs[0])


def test_momentum_is_within_its_rounding(device):
    """A value is off by 1/16 of itself, or of the smallest normal number under its scale, at most."""
    ours, theirs = matrices(device), matrices(device)
    mine, reference = of_matrices(ours, lr=0.0), torch.optim.Muon(theirs, lr=0.0)
    set_gradients(ours, 1), set_gradients(theirs, 1)
    mine.step(), reference.step()
    for p, q in zip(ours, theirs, strict=True):
        state, exact = mine.state[p], reference.state[q]["momentum_buffer"]
        scale = (state["momentum_scale"].int() << 23).view(torch.float32)
        scale = scale.repeat_interleave(128, dim=1)[:, : p.shape[1]]
        kept = state["momentum_codes"].view(torch.float8_e4m3fn).float() * scale
        assert ((kept - exact).abs() <= torch.maximum(exact.abs(), scale * 2.0**-6) / 16).all()


def test_bf16_parameters_are_rounded_once(device):
    low = matrices(device, torch.bfloat16)
    full = [nn.Parameter(p.float()) for p in low]
    set_gradients(low, 0)
    for p, q in zip(low, full, strict=True):
        q.grad = p.grad.float()
    of_matrices(low, lr=0.05, weights="nearest").step(), of_matrices(full, lr=0.05).step()
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(low, full, strict=True))


def test_24_bit_weights(device):
    """BF16 matrices with 8 more bits follow float32 ones to 2**-16 of themselves a step."""
    low = matrices(device, torch.bfloat16)
    full = [nn.Parameter(p.float()) for p in low]
    mine, reference = of_matrices(low, lr=1e-3, weights="master"), of_matrices(full, lr=1e-3)
    for t in range(4):
        set_gradients(low, t)
        for p, q in zip(low, full, strict=True):
            q.grad = p.grad.float()
        mine.step(), reference.step()
    masters = mine.master_weights()
    for p, q in zip(low, full, strict=True):
        assert mine.state[p]["weight_residual"].shape == p.shape
        assert ((masters[p] - q).abs() <= 4 * 2.0**-16 * q.abs().clamp(min=1e-2)).all()


def test_gradients_that_are_not_finite(device):
    params = matrices(device)
    optimizer = of_matrices(params)
    set_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
    set_gradients(params, 1)
    params[0].grad[3, 7] = float("nan")
    optimizer.step()
    assert torch.equal(params[0], before[1][0]) and not torch.equal(params[1], before[1][1])
    for key in ("momentum_codes", "momentum_scale"):
        assert torch.equal(optimizer.state[params[0]][key], before[0][0][key])
    assert optimizer.skipped_groups() == 40 * 2


# --- what goes where


def test_the_split():
    model = Net()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = CoatMuon(muon_groups(model), lr=1e-3, weight_decay=0.1)
    split = [(g["use_muon"], g["weight_decay"], {names[id(p)] for p in g["params"]}) for g in optimizer.param_groups]
    assert split == [
        (True, 0.1, {"up.weight", "down.weight"}),
        (False, 0.1, {"embed.weight", "conv.weight", "lm_head.weight"}),
        (False, 0.0, {"up.bias", "norm.weight", "norm.bias", "conv.bias", "lm_head.bias"}),
    ]
    assert optimizer.param_groups[0]["param_names"] == ["up.weight", "down.weight"]
    tied = Net()
    tied.down.weight = tied.embed.weight
    assert [len(g["params"]) for g in muon_groups(tied)][:1] == [1], "what an embedding shares is an embedding"


def test_other_groups_are_coat_adamws(device):
    model, same = Net(device), Net(device)
    groups = [{**group, "use_muon": False} for group in muon_groups(model)]
    train(model, CoatMuon(groups, lr=1e-2), range(3))
    train(same, CoatAdamW(muon_groups(same), lr=1e-2), range(3))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))


def test_state_is_what_it_says(device):
    model = Net(device)
    optimizer = CoatMuon(muon_groups(model))
    train(model, optimizer, range(1))
    state = optimizer.state[model.down.weight]
    layout = {key: (value.dtype, tuple(value.shape)) for key, value in state.items()}
    assert layout == {
        "step": (torch.float32, ()),
        "momentum_codes": (torch.uint8, (48, 136)),
        "momentum_scale": (torch.uint8, (48, 2)),
    }
    p = nn.Parameter(torch.zeros(256, 1024, device=device))
    p.grad = torch.zeros_like(p)
    alone = of_matrices([p])
    alone.step()
    assert alone.state_bytes() / p.numel() == pytest.approx(1 + 1 / 128, abs=1e-4)
    assert not p.any()


# --- checkpoints and company


def test_resume_equals_the_straight_run(device):
    model = Net(device)
    straight = CoatMuon(muon_groups(model), lr=1e-2)
    losses = train(model, straight, range(5))
    half = Net(device)
    saved = CoatMuon(muon_groups(half), lr=1e-2)
    train(half, saved, range(3))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed = CoatMuon(muon_groups(half), lr=0.5, momentum=0.1)
    resumed.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    assert_same(resumed, saved)
    assert train(half, resumed, range(3, 5)) == losses[3:]
    assert_same(resumed, straight)
    assert straight.param_groups[0]["scale"] == "match_rms_adamw" and resumed.param_groups[0]["momentum"] == 0.95


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_go_on_alike(copied):
    params = matrices("cpu")
    optimizer = of_matrices(params, lr=0.01)
    set_gradients(params, 0)
    optimizer.step()
    twin = copied(optimizer)
    for o in (optimizer, twin):
        set_gradients(o.param_groups[0]["params"], 1)
        o.step()
    assert_same(twin, optimizer)
    twin.add_param_group({"params": matrices("cpu", seed=1), "use_muon": True})


def test_gradient_release(device):
    model, same = Net(device), Net(device)
    optimizer, other = CoatMuon(muon_groups(model), lr=1e-2), CoatMuon(muon_groups(same), lr=1e-2)
    assert train(model, optimizer, range(3), release=True) == train(same, other, range(3))
    assert_same(optimizer, other)


def test_states_that_do_not_fit():
    model = Net()
    optimizer = CoatMuon(muon_groups(model))
    train(model, optimizer, range(1))
    groups = [{**group, "use_muon": False} for group in muon_groups(model)]
    with pytest.raises(ValueError, match="group 0 of the state dict has use_muon=True, this optimizer use_muon=False"):
        CoatMuon(groups).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="has the entries .*momentum_codes"):
        CoatAdamW(muon_groups(model)).load_state_dict(optimizer.state_dict())
    other = CoatMuon(muon_groups(model), group_size=64)
    with pytest.raises(ValueError, match="group_size=128, this optimizer group_size=64"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"nesterov": 1}, "nesterov is 1"),
        ({"ns_steps": 0}, "ns_steps is 0"),
        ({"scale": "mine"}, "scale is 'mine'; expected one of 'original', 'match_rms_adamw'"),
        ({"group_size": 100}, "group_size is 100; expected a power of two"),
        ({"group_size": 2048}, "group_size is 2048"),
        ({"lr": -1.0}, "lr is -1.0"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        of_matrices(matrices("cpu"), **options)
    optimizer = of_matrices(matrices("cpu"))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": matrices("cpu", seed=1), "use_muon": True, **options})
    assert len(optimizer.param_groups) == 1


def test_groups_that_do_not_say_what_they_are():
    with pytest.raises(ValueError, match="use_muon=True or False.*muon_groups"):
        CoatMuon(Net().parameters())
    with pytest.raises(ValueError, match=r"parameter 0 of the group has the shape \[3\].*use_muon=False"):
        of_matrices([nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="float16"):
        of_matrices([nn.Parameter(torch.ones(3, 3, dtype=torch.float16))])

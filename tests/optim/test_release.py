"""Gradient release: the steps inside the backward are those after it, and what it cannot do is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_coat.optim import CoatAdamW, GradientRelease


class Net(nn.Module):
    """A head tied to the embedding, a module that is used twice, one that is not used, a frozen parameter."""

    def __init__(self, device, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.twice = nn.Embedding(20, 150), nn.Linear(150, 150)
        self.norm, self.unused = nn.LayerNorm(150), nn.Linear(3, 3)
        self.head = nn.Linear(150, 20, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(150), requires_grad=False)
        self.to(device, dtype)
        self.reentrant = None  # or how to checkpoint

    def body(self, x):
        return self.norm(torch.tanh(self.twice(torch.tanh(self.twice(x)))) + x) * self.frozen

    def forward(self, ids):
        x = self.embed(ids)
        x = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), ids.roll(1).flatten())


def ids(step, device):
    return torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(step)).to(device)


def train(
    device, released, *, steps=4, dtype=torch.float32, reentrant=None, model=None, optimizer=None, first=0, **options
):
    """Losses, model and optimizer of a short training with a schedule of learning rates."""
    model = model or Net(device, dtype)
    model.reentrant = reentrant
    optimizer = optimizer or CoatAdamW([{"params": model.parameters(), "lr": 3e-2}])
    release = GradientRelease(optimizer, **options) if released else None
    losses = []
    for step in range(first, first + steps):
        optimizer.param_groups[0]["lr"] = 3e-2 / (1 + step)
        loss = model(ids(step, device))
        loss.backward()
        if not released and options.get("max_norm"):
            for p in model.parameters():
                if p.grad is not None:
                    nn.utils.clip_grad_norm_([p], options["max_norm"])
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses, model, optimizer, release


def assert_same(one, other):
    assert one[0] == other[0] and len(set(one[0])) == len(one[0])
    for p, q in zip(one[1].parameters(), other[1].parameters(), strict=True):
        assert torch.equal(p, q) and list(one[2].state[p]) == list(other[2].state[q])
        for key, value in one[2].state[p].items():
            assert torch.equal(value, other[2].state[q][key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [None, False])
def test_it_is_the_step_after_the_backward(dtype, reentrant, device):
    assert_same(
        train(device, True, dtype=dtype, reentrant=reentrant), train(device, False, dtype=dtype, reentrant=reentrant)
    )


def test_reentrant_checkpointing(device):
    """A segment's own backward steps its parameters; the module that is used twice is used in one segment."""
    assert_same(train(device, True, reentrant=True), train(device, False, reentrant=True))


@pytest.mark.parametrize(
    ("batch_bytes", "alive", "steps"),
    [(0, [0] * 5, 5), (150 * 150 * 4, [0, 1, 2, 3, 0], 2), (2**28, [0, 1, 2, 3, 4], 1)],
    ids=["one by one", "the weight that is used twice is a batch's last", "all together"],
)
def test_gradients_never_exist_together(batch_bytes, alive, steps, device, monkeypatch):
    """No more wait than may; in the end none does, before optimizer.step() too, and each was stepped once."""
    model = Net(device)
    optimizer = CoatAdamW(model.parameters())
    GradientRelease(optimizer, batch_bytes=batch_bytes)
    step_params, batches, waiting = optimizer.step_params, [], []

    def counted(group, members):
        batches.append(len(members))
        step_params(group, members)

    monkeypatch.setattr(optimizer, "step_params", counted)
    for p in model.parameters():
        if p.requires_grad:  # before the gradient of this parameter is there
            p.register_hook(lambda _: waiting.append(sum(q.grad is not None for q in model.parameters())))
    model(ids(0, device)).backward()
    assert waiting == alive and all(p.grad is None for p in model.parameters())
    assert len(batches) == steps and sum(batches) == 5
    assert [int(s["step"]) for s in optimizer.state.values()] == [1] * 5, "tied and repeated parameters step once"
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_groups_and_batches(device):
    """Parameters of several groups in a batch, and batches of every size: the same steps with the group's settings."""

    def groups(model):
        vectors = [p for p in model.parameters() if p.dim() < 2]
        return [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.5},
            {"params": vectors, "lr": 1e-2},
        ]

    runs = []
    for batch_bytes in (None, 0, 2**10, 2**28):
        model = Net(device)
        optimizer = CoatAdamW(groups(model), lr=3e-2)
        options = {} if batch_bytes is None else {"batch_bytes": batch_bytes}
        runs.append(train(device, batch_bytes is not None, model=model, optimizer=optimizer, **options))
    for run in runs[1:]:
        assert_same(run, runs[0])


def test_a_backward_that_fails(device):
    """What had waited then is stepped by optimizer.step(), and the next step begins anew."""
    model = Net(device)
    optimizer = CoatAdamW(model.parameters())
    GradientRelease(optimizer)

    def fail(_):
        raise KeyError("on the way")

    handle = model.twice.weight.register_hook(fail)
    with pytest.raises(KeyError, match="on the way"):
        model(ids(0, device)).backward()
    handle.remove()
    optimizer.step()
    optimizer.zero_grad()
    model(ids(1, device)).backward()
    assert all(p.grad is None for p in model.parameters())
    assert int(optimizer.state[model.norm.weight]["step"]) == 2


def test_clipping_by_each_norm(device):
    """As clip_grad_norm_ of each parameter alone; and the norm of the whole is told, unclipped.

    On a GPU clip_grad_norm_ may round a norm in another way, which moves a code by one here and there.
    """
    one, other = train(device, True, max_norm=0.05), train(device, False, max_norm=0.05)
    assert one[0] == pytest.approx(other[0], rel=1e-3 if device == "cuda" else 0)
    unclipped = train(device, False)[0]
    assert max(abs(a - b) for a, b in zip(one[0], unclipped, strict=True)) > 1e-2, "it did clip"
    model = Net(device)
    model(ids(0, device)).backward()
    whole = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    for max_norm in (0.05, float("inf")):
        _, _, _, release = train(device, True, steps=1, max_norm=max_norm)
        assert torch.allclose(release.gradient_norm(), whole, rtol=1e-6)
    assert_same(train(device, True, max_norm=float("inf")), train(device, False))
    assert train(device, True)[3].gradient_norm() is None


def test_resume_equals_the_straight_run(device):
    straight = train(device, True)
    _, half, saved, _ = train(device, True, steps=2)
    model, optimizer = Net(device), None
    model.load_state_dict(half.state_dict())
    optimizer = CoatAdamW(model.parameters())
    release = GradientRelease(optimizer)  # made before the states are loaded, which replaces the groups
    optimizer.load_state_dict(saved.state_dict())
    release.remove()
    resumed = train(device, True, steps=2, model=model, optimizer=optimizer, first=2)
    assert resumed[0] == straight[0][2:]
    assert_same((straight[0], *resumed[1:]), straight)


def test_parameters_that_come_later(device):
    """What has no hook is stepped by step()."""
    model, same = Net(device), Net(device)
    optimizer, other = CoatAdamW(model.parameters()), CoatAdamW(same.parameters())
    GradientRelease(optimizer)
    for net, o in ((model, optimizer), (same, other)):
        net.frozen.requires_grad_()
        net(ids(0, device)).backward()
        o.step()
    assert_same(([0], model, optimizer), ([0], same, other))
    assert int(optimizer.state[model.frozen]["step"]) == 1


def test_removal(device):
    model = Net(device)
    optimizer = CoatAdamW(model.parameters())
    GradientRelease(optimizer).remove()
    assert_same(
        train(device, False, model=model, optimizer=CoatAdamW(model.parameters())),
        train(device, False, model=Net(device)),
    )
    model(ids(0, device)).backward()
    assert model.embed.weight.grad is not None
    assert optimizer.step(lambda: 7) == 7


# --- what is refused


def test_gradient_accumulation(device):
    model = Net(device)
    optimizer = CoatAdamW(model.parameters())
    GradientRelease(optimizer)
    model(ids(0, device)).backward()
    with pytest.raises(RuntimeError, match="second gradient before optimizer.step.*gradient accumulation"):
        model(ids(1, device)).backward()


def test_a_parameter_in_two_reentrant_segments(device):
    model = Net(device)
    GradientRelease(CoatAdamW(model.parameters()))
    x = model.embed(ids(0, device))
    for _ in range(2):
        x = checkpoint(model.body, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant': False"):
        x.square().mean().backward()


def test_closures_scalers_and_leftovers(device):
    model = Net(device)
    optimizer = CoatAdamW(model.parameters())
    release = GradientRelease(optimizer)
    for step in (lambda: optimizer.step(lambda: None), lambda: optimizer.step(closure=lambda: None)):
        with pytest.raises(ValueError, match="step.closure.*call the closure yourself"):
            step()
    scaler = torch.amp.GradScaler(device, init_scale=2.0)
    scaler.scale(model(ids(0, device))).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)
    release.remove()
    model(ids(0, device)).backward()
    with pytest.raises(ValueError, match="has a gradient already.*zero_grad"):
        GradientRelease(optimizer)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="max_norm is 0.0"):
        GradientRelease(optimizer, max_norm=0.0)
    with pytest.raises(ValueError, match="batch_bytes is -1"):
        GradientRelease(optimizer, batch_bytes=-1)
    with pytest.raises(TypeError, match="not SGD"):
        GradientRelease(torch.optim.SGD(model.parameters()))


def test_several_processes_without_fsdp2(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="DDP averages gradients only after that.*fully_shard"):
        GradientRelease(CoatAdamW(nn.Linear(3, 3).parameters()))

"""The amax of a weight, handed by the optimizer that wrote it to the linear that quantizes it: used only where it is
right, and then the codes are those of a weight that was read for it."""

import copy
import io
import pickle

import pytest
import torch
from coat_kernels import Granularity
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import hf_coat
from hf_coat.config import PRESETS, CoatConfig
from hf_coat.functional import amax, operands
from hf_coat.modules import CoatLinear
from hf_coat.optim import CoatAdamW, CoatLion, CoatMuon, GradientRelease, muon_groups

PAPER = PRESETS["paper"].model
LR = 1e-2


@pytest.fixture
def weights(monkeypatch):
    """What linears quantized so far: each weight's values, and whether its amax was handed over."""
    seen, quantize = [], operands.quantize

    def spy(x, dtype, granularity, *, amax=None, **options):
        result = quantize(x, dtype, granularity, amax=amax, **options)
        if isinstance(x, nn.Parameter) and options.get("scale") is None:
            seen.append((x, amax is not None))
            if amax is not None:
                truth = x.detach().float().abs().amax()
                assert torch.equal(amax.view(()), truth) or truth.isnan() and amax.isnan()
        return result

    monkeypatch.setattr(operands, "quantize", spy)
    return seen


def handed(weights):
    """Whether the weights that were quantized since the last call came with their amax."""
    result = [given for _, given in weights]
    weights.clear()
    return result


def llama(config=PAPER, dtype=torch.bfloat16, device="cpu"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True,
            attn_implementation="eager",  # others are not deterministic on a GPU
        )
    ).to(device, dtype)  # fmt: skip
    if config is not None:
        hf_coat.apply_coat(model, config)
    return model


def batch(seed, device="cpu"):
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(seed)).to(device)


def train(model, optimizer, steps, micro=1):
    losses = []
    for t in steps:
        for i in range(micro):
            x = batch(10 * t + i, model.device)
            losses.append(model(input_ids=x, labels=x).loss)
            losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach()


def linear(n_in=40, n_out=24, device="cpu", config=PAPER):
    torch.manual_seed(0)
    return CoatLinear.convert(nn.Linear(n_in, n_out, dtype=torch.bfloat16, device=device), config)


def step(layer, optimizer, value=1.0):
    x = torch.full((3, layer.in_features), value, dtype=layer.weight.dtype, device=layer.weight.device)
    layer(x).float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS = {
    "paper": lambda model: CoatAdamW(model.parameters(), lr=LR, format="paper", weights="nearest"),
    "stochastic": lambda model: CoatAdamW(model.parameters(), lr=LR),
    "master": lambda model: CoatAdamW(model.parameters(), lr=LR, weights="master"),
    "lion": lambda model: CoatLion(model.parameters(), lr=LR / 10),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_to_the_bit(weights, name, dtype, device, monkeypatch):
    """Two microbatches a step. From the second step on no linear reads its weight for the amax.

    Compiled for a GPU the optimizer's kernel may contract products and sums in other places where it finds the amax:
    FP32 weights may then differ in last bits, and by a step of lr / 16 where such a bit has moved a code of m.
    """
    model = llama(dtype=dtype, device=device)
    plain = copy.deepcopy(model)
    count = sum(isinstance(m, CoatLinear) for m in model.modules())
    optimizer = OPTIMIZERS[name](model)
    losses = [train(model, optimizer, [0], micro=2)]
    assert handed(weights) == [False] * 2 * count
    losses += [train(model, optimizer, [1, 2], micro=2)]
    assert handed(weights) == [True] * 4 * count
    monkeypatch.setattr(operands, "ask_amax", lambda weight: None)
    others = train(plain, OPTIMIZERS[name](plain), range(3), micro=2)
    assert not any(handed(weights))
    apart = LR / 16 if device == "cuda" and dtype == torch.float32 else 0
    assert torch.cat(losses).tolist() == pytest.approx(others.tolist(), rel=1e-3 if apart else 0, abs=0)
    assert all((p - q).abs().max() <= apart for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_linears_that_do_not_ask_cost_nothing(monkeypatch):
    """A scale per row, and models without FP8: the optimizer's kernel is called as ever."""
    for config in (PRESETS["lean"].model, None, CoatConfig(granularity=Granularity.TENSOR, cache_weights=False)):
        model = llama(config)
        optimizer, wanted = CoatAdamW(model.parameters(), lr=LR), []
        monkeypatch.setattr(optimizer, "_step_device", lambda *arguments: wanted.append(arguments[-1]["amax"]))  # noqa: B023
        train(model, optimizer, range(2))
        assert wanted == [None, None]


def test_an_asked_amax_is_handed_over_once():
    """Two steps in a row: between them nobody asked, so the second hands over none, and what the first left is old."""
    layer = linear()
    optimizer = CoatAdamW(layer.parameters(), lr=LR)
    step(layer, optimizer)
    layer.weight.grad = torch.ones_like(layer.weight)
    assert amax._handovers[layer.weight].amax is not None
    assert not amax.amax_asked(layer.weight)
    optimizer.step()
    assert amax.ask_amax(layer.weight) is None


CHANGES = {
    "in place": lambda layer: layer.weight.detach().mul_(8),
    "loaded": lambda layer: layer.load_state_dict({k: v * 8 for k, v in layer.state_dict().items()}),
    "other memory": lambda layer: setattr(layer.weight, "data", layer.weight.data * 8),
    "other parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 8)),
    "dtype": lambda layer: layer.float(),
    "copied": lambda layer: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_changed_are_read(weights, change, device):
    layer = linear(device=device)
    optimizer = CoatAdamW(layer.parameters(), lr=LR)
    step(layer, optimizer)
    step(layer, optimizer)
    assert handed(weights) == [False, True]
    if change == "copied":
        layer = copy.deepcopy(layer)
    CHANGES[change](layer)
    x = torch.randn(3, 40, dtype=layer.weight.dtype, device=device)
    y = layer(x)
    assert handed(weights) == [False]
    with torch.no_grad():  # which reads in any case
        assert torch.equal(layer(x), y)


def test_another_optimizers_step_ends_it(weights):
    """One that averages or restores weights may write through ``.data``, which counts no version."""
    layer = linear()
    optimizer, other = CoatAdamW(layer.parameters(), lr=LR), torch.optim.SGD([nn.Parameter(torch.ones(1))])
    step(layer, optimizer)
    other.step()
    step(layer, optimizer)
    step(layer, optimizer)
    assert handed(weights) == [False, False, True]


def test_evaluation_reads_the_weight(weights):
    """Averaged weights are often swapped in through ``.data`` for an evaluation, and out again after it."""
    layer = linear()
    optimizer = CoatAdamW(layer.parameters(), lr=LR)
    step(layer, optimizer)
    own = layer.weight.detach().clone()
    layer.weight.data.mul_(8)
    with torch.no_grad():
        layer(torch.ones(3, 40, dtype=torch.bfloat16))
    layer.weight.data.copy_(own)
    step(layer, optimizer)
    assert handed(weights) == [False, False, True]


def test_skipped_groups_count(weights):
    """A weight whose group got a gradient that is not finite stays the largest; one that is not finite stays NaN."""
    layer = linear()
    layer.weight.data[3, 5] = 30.0
    optimizer = CoatAdamW(layer.parameters(), lr=LR)
    layer(torch.ones(3, 40, dtype=torch.bfloat16)).float().sum().backward()
    layer.weight.grad[3, 7] = float("nan")
    optimizer.step()
    assert optimizer.skipped_groups() == 1
    assert amax.ask_amax(layer.weight).item() == 30
    step(layer, optimizer)
    assert handed(weights) == [False, True]
    layer.weight.detach()[0, 0] = float("nan")
    optimizer.zero_grad()
    step(layer, optimizer)
    x = torch.ones(3, 40, dtype=torch.bfloat16)
    assert amax.ask_amax(layer.weight).isnan() and layer(x).isnan().all()


def test_gradient_release_hands_over(weights, device):
    """Weights that are stepped inside the backward; until ``optimizer.step()`` ends the step they are read."""
    model = llama(device=device)
    count = sum(isinstance(m, CoatLinear) for m in model.modules())
    optimizer = CoatAdamW(model.parameters(), lr=LR)
    GradientRelease(optimizer, batch_bytes=0)
    train(model, optimizer, range(2))
    assert handed(weights) == [False] * count + [True] * count
    x = batch(7, device)
    model(input_ids=x, labels=x).loss.backward()
    handed(weights)
    model(input_ids=x)
    assert not any(handed(weights))


def test_gradient_checkpointing_uses_it(weights):
    model, plain = llama(), llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = [train(m.train(), CoatAdamW(m.parameters(), lr=LR), range(2)) for m in (model, plain)]
    assert torch.equal(*runs) and any(handed(weights))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_muon_hands_over_what_its_adamw_steps(weights):
    """A matrix that Muon steps is read by its linear: no kernel of Muon's has it at hand."""
    model = llama()
    optimizer = CoatMuon(muon_groups(model), lr=LR)
    train(model, optimizer, range(2))
    assert not any(handed(weights))
    groups = [{"params": list(model.parameters()), "use_muon": False}]
    train(model, CoatMuon(groups, lr=LR), range(2))
    assert sum(handed(weights)) == sum(isinstance(m, CoatLinear) for m in model.modules())


def test_a_graph_that_steps_hands_over_none(weights):
    layer = linear()
    optimizer = CoatAdamW(layer.parameters(), lr=LR, capturable=True)
    step(layer, optimizer)
    step(layer, optimizer)
    assert handed(weights) == [False, False]


def test_pieces_of_a_weight_are_not_the_weight(weights, tmp_path):
    """FSDP2's linears see a gathered weight, its optimizer a piece, of which it hands over none even when asked."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = linear()
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        optimizer = CoatAdamW(layer.parameters(), lr=LR)
        step(layer, optimizer)
        amax.ask_amax(layer.weight)
        step(layer, optimizer)
        assert handed(weights) == [False] * 2 and amax.ask_amax(layer.weight) is None
    finally:
        torch.distributed.destroy_process_group()


def test_copies_and_checkpoints_know_nothing(weights, device):
    """Neither a parameter's pickle nor a checkpoint changes, and a run that goes on from one is the straight run."""
    layer = linear(device=device)
    before = pickle.dumps(layer.weight.cpu()), vars(layer.weight).copy()
    optimizer = CoatAdamW(layer.parameters(), lr=LR)
    step(layer, optimizer)
    assert vars(layer.weight) == before[1] == {}
    file = io.BytesIO()
    torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = linear(device=device)
    other.load_state_dict(saved["model"])
    resumed = CoatAdamW(other.parameters(), lr=LR)
    resumed.load_state_dict(saved["optimizer"])
    handed(weights)
    for one, its in ((layer, optimizer), (other, resumed)):
        step(one, its, 0.5)
        step(one, its, 0.25)
    assert handed(weights) == [True, True, False, True], "the first step after a resume reads the weight"
    assert torch.equal(layer.weight, other.weight)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again.weight, layer.weight) and again.weight not in amax._handovers


def test_an_estimate_asks_with_weights_that_hold_nothing():
    """Also of a GPU where there is none."""
    with FakeTensorMode():
        assert amax.ask_amax(nn.Parameter(torch.empty(4, 4, device="cuda"))) is None


def test_forgotten_with_the_weight():
    before = len(amax._handovers)
    layer = linear()
    step(layer, CoatAdamW(layer.parameters(), lr=LR))
    assert len(amax._handovers) == before + 1
    del layer
    assert len(amax._handovers) == before


@pytest.mark.gpu
def test_a_captured_forward_reads_the_weight(weights):
    """A CUDA graph would go on reading the number of the step before it was captured."""
    layer, x = linear(64, 64, "cuda"), torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    optimizer = CoatAdamW(layer.parameters(), lr=LR)
    for _ in range(2):
        step(layer, optimizer)
    layer(x)  # compiles and chooses kernels
    handed(weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    assert handed(weights) == [False]
    layer.weight.data.mul_(8)
    graph.replay()
    with torch.no_grad():
        assert torch.equal(y, layer(x))

"""Predicted bytes equal measured bytes, and both equal what can be counted by hand."""

import copy
import itertools

import pytest
import torch
from coat_kernels.states import StateFormat, Weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from hf_coat import CoatAdamW, CoatOptimizerConfig, HfCoatConfig, apply_coat
from hf_coat.config import OptimizerName
from hf_coat.memory import MemoryBreakdown, measure, predict
from hf_coat.modules import CoatLinear, loss
from hf_coat.optim import OPTIMIZERS, muon_groups

RECIPES = {None: None, "lean": HfCoatConfig.resolve("lean").model, "paper": HfCoatConfig.resolve("paper").model}


def llama(dtype=torch.bfloat16, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**{**shape, "vocab_size": 96, "num_key_value_heads": 2, "use_cache": False, **options})
    return LlamaForCausalLM(config).to(dtype)


def batch(**extra) -> dict:
    ids = torch.arange(2 * 24).view(2, 24) % 96
    return {"input_ids": ids, "labels": ids, **extra}


def stepped(model, optimizer=CoatAdamW, **kwargs):
    """An optimizer of ``model`` that took a step."""
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], **kwargs)
    model(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


class Net(nn.Module):
    """Anything with a loss; ``layers`` is called on ``x``."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return CausalLMOutput(loss=self.layers(x).sum())


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES)
def test_prediction_equals_measurement(recipe, dtype, checkpointing):
    if recipe == "lean" and loss.library("cpu") is None:
        pytest.skip("the loss of CPU tensors needs torch 2.13 or newer")
    model = llama(dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()  # what reentrant checkpointing needs
    if RECIPES[recipe]:
        apply_coat(model, RECIPES[recipe])
    assert predict(model, batch(), optimizer=CoatOptimizerConfig(group_size=32)) == measure(
        model, batch(), stepped(model, group_size=32)
    )


def test_padding_counts_as_the_model_treats_it():
    """A mask that hides something is materialized for the attention, one that hides nothing is not."""
    model = llama()
    optimizer = stepped(model)
    mask = torch.ones(2, 24, dtype=torch.long)
    padded = mask.clone()
    padded[0, -3:] = 0
    activations = []
    for given in ({}, {"attention_mask": mask}, {"attention_mask": padded}):
        predicted = predict(model, batch(**given))
        assert predicted == measure(model, batch(**given), optimizer)
        activations.append(predicted.activations)
    assert activations[0] == activations[1] < activations[2]


def test_autocast_is_the_callers():
    model = llama(torch.float32)
    optimizer = stepped(model)
    without = predict(model, batch())
    assert without == measure(model, batch(), optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        within = predict(model, batch())
        assert within == measure(model, batch(), optimizer)
    assert within.activations < without.activations


def test_twin_without_coat():
    """``coat=False`` tells of the model that the user came with, and does not touch the one that there is."""
    plain = llama()
    expected = measure(plain, batch(), stepped(plain, torch.optim.AdamW))
    model = llama()
    apply_coat(model)
    assert predict(model, batch(), coat=False, optimizer=None) == expected
    assert sum(isinstance(module, CoatLinear) for module in model.modules()) == 3 * 7


def test_shape_and_meta_device_suffice():
    model = llama()
    apply_coat(model)
    with torch.device("meta"):
        ghost = llama()
    apply_coat(ghost)
    assert predict(ghost, (2, 24)) == predict(model, batch()) == predict(model, (2, 24))


def test_activations_by_hand():
    """Of x [4, 8] -> Linear -> ReLU -> [4, 16] -> Linear, only the ReLU's result is kept, once for two readers."""
    model = Net(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32))
    measured = measure(model, {"x": torch.randn(4, 8)}, torch.optim.SGD(model.parameters()))
    weights = 4 * (8 * 16 + 16 + 16 * 32 + 32)
    assert measured == MemoryBreakdown(weights, gradients=weights, optimizer_states=0, activations=4 * 16 * 4)


def test_fp8_activations_by_hand():
    """A converted linear keeps a byte a value, a scale per token, and its weight's scale per output feature."""
    model = Net(nn.Linear(32, 64), nn.Dropout(0.0), nn.Linear(64, 48))
    apply_coat(model)
    inputs = 4 * 32 + 4 * 64 + 2 * 4 * 4
    assert predict(model, {"x": torch.randn(4, 32)}).activations == inputs + (64 + 48) * 4


def test_tied_weights_count_once():
    untied, tied = (predict(llama(tie_word_embeddings=tie), batch()) for tie in (False, True))
    head = 96 * 48 * 2
    assert untied.weights - tied.weights == head == untied.gradients - tied.gradients


def test_frozen_weights_have_no_gradients_and_no_states():
    model = llama()
    model.requires_grad_(False)
    adapter = model.model.layers[1].mlp.up_proj.weight
    adapter.requires_grad_(True)
    predicted = predict(model, batch(), optimizer=None)
    assert predicted == measure(model, batch(), stepped(model, torch.optim.AdamW))
    assert predicted.weights > predicted.gradients == adapter.nbytes
    assert predicted.optimizer_states == 2 * adapter.nbytes + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (3, 0), (2, 128), (2, 129), (2, 3, 7), (1000, 300)])
def test_optimizer_states_of_any_shape(shape, dtype):
    model = Net()
    model.p = nn.Parameter(torch.ones(shape, dtype=dtype))
    model.forward = lambda x: CausalLMOutput(loss=(model.p * x).sum())
    configs = [
        CoatOptimizerConfig(name=name, format=format, weights=weights)
        for name, format, weights in itertools.product(OptimizerName, StateFormat, Weights)
    ]
    for config in [*configs, None]:
        kind, parameters = torch.optim.AdamW if config is None else OPTIMIZERS[config.name], model.parameters()
        if config is not None and config.name is OptimizerName.MUON:
            parameters = muon_groups(model)
        optimizer = kind(parameters, **({} if config is None else config.settings))
        model.p.grad = torch.ones_like(model.p)
        optimizer.step()
        held = sum(value.nbytes for value in optimizer.state[model.p].values())
        assert predict(model, {"x": torch.ones(1)}, optimizer=config).optimizer_states == held, config


def test_prediction_leaves_the_model_alone():
    model = Net(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)).eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    predict(model, {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(1))})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_measurement_leaves_gradients_flags_and_random_state():
    model = llama(attention_dropout=0.5)
    optimizer = stepped(model)
    model(**batch()).loss.backward()
    model.eval()
    model.model.layers[0].train()
    gradients = [p.grad.clone() for p in model.parameters()]
    flags, random_state = [m.training for m in model.modules()], torch.get_rng_state()
    measure(model, batch(), optimizer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_no_loss_is_an_error():
    model = llama()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM gave no loss for a batch of \['input_ids'\].*labels"):
        predict(model, {"input_ids": batch()["input_ids"]})


def test_a_course_that_depends_on_values_is_an_error():
    class Fickle(nn.Linear):
        def forward(self, x):
            return super().forward(x) if super().forward(x).sum() > 0 else x

    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        predict(Net(Fickle(4, 4)), {"x": torch.randn(2, 4)})


def test_breakdown_as_a_record():
    record = MemoryBreakdown(1, 2, 3, 4, peak=20).to_dict()
    assert record == {"weights": 1, "gradients": 2, "optimizer_states": 3, "activations": 4, "peak": 20}
    assert MemoryBreakdown(**record).total == 10
    assert predict(llama(), batch()).peak is None


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_on_a_gpu(recipe):
    """Prediction equals measurement there too, and the allocator's peak is at least what the classes add up to."""
    model = llama(hidden_size=256, intermediate_size=512, vocab_size=96).cuda()
    if RECIPES[recipe]:
        apply_coat(model, RECIPES[recipe])
    on_device = {name: value.cuda() for name, value in batch().items()}
    optimizer = CoatAdamW(model.parameters())
    for _ in range(2):
        model(**on_device).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = measure(model, on_device, optimizer)
    steps = 4 * len(list(model.parameters()))  # counted in host memory
    assert measured.peak >= measured.total - steps
    assert MemoryBreakdown(**{**measured.to_dict(), "peak": None}) == predict(model, on_device)

"""apply_coat and remove_coat: what is converted, what is kept and why, and that undoing is exact."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    MixtralConfig,
    SwinConfig,
)

import hf_coat
from hf_coat import CoatConfig
from hf_coat.modules import CoatLinear, Converted

TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=128, num_attention_heads=4)


def llama(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, "num_key_value_heads": 2, **changes}))


def count(report, kind="CoatLinear"):
    return sum(what.startswith(kind) for what in report.converted.values())


def loss_and_grads(model):
    model.zero_grad()
    ids = torch.arange(60).view(2, 30) % 128
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_llama_report():
    model = llama()
    report = hf_coat.apply_coat(model)
    assert [count(report, kind) for kind in ("CoatLinear", "CoatNorm", "CoatMLP", "CoatAttention")] == [14, 5, 2, 2]
    assert report.converted["lm_head"].startswith("CoatHead, fused linear cross-entropy")
    assert len(report.converted) == 14 + 5 + 2 + 2 + 1
    assert report.converted["model.layers.0.self_attn.k_proj"].endswith("as one of q_proj, k_proj, v_proj")
    assert report.kept == {}
    unfused = hf_coat.apply_coat(llama(), CoatConfig(fuse_loss=False))
    assert unfused.kept == {"lm_head": "head"}
    assert report.uncovered.keys() == {"Embedding"}
    assert "14 CoatLinear" in report.summary() and "5 CoatNorm" in report.summary() and "1 x head" in unfused.summary()
    assert "model.layers.*.mlp.up_proj" in str(report) and "Embedding" in str(report)
    assert unfused.to_dict()["kept"] == unfused.kept


def test_parameters_stay_the_same_objects_and_undoing_is_exact():
    model = llama()
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    expected = loss_and_grads(model)
    hf_coat.apply_coat(model)
    converted = loss_and_grads(model)
    assert converted[0] != expected[0] and abs(converted[0] - expected[0]) < 0.02 * expected[0]
    assert all(model.get_parameter(name) is p and p.data_ptr() == ptr for name, (p, ptr) in before.items())
    report = hf_coat.remove_coat(model)
    assert len(report.converted) == 24 and not any(isinstance(m, (CoatLinear, Converted)) for m in model.modules())
    again = loss_and_grads(model)
    assert again[0] == expected[0] and all(torch.equal(again[1][n], g) for n, g in expected[1].items())


def test_applying_again_changes_nothing_and_another_config_takes_over():
    model = llama()
    first, second = hf_coat.apply_coat(model), hf_coat.apply_coat(model)
    assert first == second
    per_tensor = CoatConfig(granularity="tensor", modules_to_not_convert=["k_proj"])
    report = hf_coat.apply_coat(model, per_tensor)
    assert model.model.layers[0].self_attn.q_proj.coat is per_tensor
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear and count(report) == 12


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("model.layers.0", 7 + 4),
        ("q_proj", 2),
        ("layers.1.mlp", 3 + 1),
        ("*.layers.0.*_proj", 7),
        ("input_layernorm", 2),
    ],
)
def test_modules_to_not_convert(pattern, kept):
    report = hf_coat.apply_coat(llama(), CoatConfig(modules_to_not_convert=[pattern, "vision_tower"]))
    assert len(report.converted) == 24 - kept
    assert sum(pattern in reason for reason in report.kept.values()) == kept
    assert report.unmatched == ["vision_tower"] and "vision_tower" in report.summary()


@pytest.mark.parametrize("kind", ["attention", "norm", "mlp"])
def test_kinds_in_activations_are_no_patterns(kind):
    """A norm in a module called attention is a norm; nor does any kind stand for what is in such a module."""
    config = BertConfig(**TINY)
    model = AutoModel.from_config(config)
    now = hf_coat.apply_coat(model, CoatConfig(activations={kind: "paper"})).to_dict()
    left, rest = now["kept"], now["converted"]
    assert ("encoder.layer.0.attention.self" in left) == (kind == "attention")
    norm = model.encoder.layer[0].attention.output.LayerNorm
    assert norm.coat_state.keep == ("paper" if kind == "norm" else "lean") and "LayerNorm" not in str(list(left))
    assert "encoder.layer.0.intermediate.dense" in rest


def test_tied_head_classifier_and_router_are_kept():
    tied = hf_coat.apply_coat(llama(tie_word_embeddings=True))
    assert tied.converted["lm_head"].startswith("CoatHead")
    classifier = AutoModelForSequenceClassification.from_config(LlamaConfig(**TINY, num_labels=32))
    assert hf_coat.apply_coat(classifier).kept["score"] == "head"

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(32, 32)
            self.gate, self.up, self.out = nn.Linear(32, 16), nn.Linear(32, 32), nn.Linear(32, 32)
            self.narrow = nn.Linear(32, 3)
            self.out.weight = self.embed.weight

    report = hf_coat.apply_coat(Routed())
    assert list(report.converted) == ["up"]
    assert report.kept == {
        "gate": "router",
        "out": "shares its weight with an embedding",
        "narrow": "narrower than 16",
    }
    mixtral = MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=2)
    experts = hf_coat.apply_coat(AutoModelForCausalLM.from_config(mixtral))
    assert count(experts) == 8 and "MixtralExperts" in experts.uncovered


def test_subclasses_and_replaced_forwards_are_kept():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 32), Special(32, 32), nn.Linear(32, 32))
    model[2].forward = lambda x: x
    report = hf_coat.apply_coat(model)
    assert list(report.converted) == ["0"]
    assert report.kept == {
        "1": "a Special, not a plain nn.Linear",
        "2": "its forward was replaced (an offloading hook?)",
    }


def test_adapters_of_peft_are_kept():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(llama(), config)
    report = hf_coat.apply_coat(model)
    assert count(report) == 14
    assert set(report.kept.values()) == {"adapter weights of PEFT"}
    loss, grads = loss_and_grads(model)
    assert grads and all("lora" in name for name in grads)


def test_hooks_deepcopy_and_meta_device():
    model = llama()
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    hf_coat.apply_coat(model)
    twin = copy.deepcopy(model)
    assert loss_and_grads(twin)[0] == loss_and_grads(model)[0] and len(seen) == 2
    with torch.device("meta"):
        empty = llama()
    assert count(hf_coat.apply_coat(empty)) == 14


def test_saved_weights_are_plain(tmp_path):
    model = llama()
    plain = {name: p.clone() for name, p in model.state_dict().items()}
    hf_coat.apply_coat(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(m, CoatLinear) for m in loaded.modules())
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in plain.items())
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_generate():
    model = llama()
    hf_coat.apply_coat(model)
    tokens = model.generate(torch.arange(8).view(1, 8), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 13)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: llama().half(), "torch.float16.*dtype=torch.bfloat16"),
        (lambda: nn.Sequential(nn.ReLU()), "nothing to convert in Sequential"),
    ],
)
def test_bad_models_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        hf_coat.apply_coat(model())


def test_old_gpus_are_refused(monkeypatch):
    class OnOldGpu(nn.Module):
        def parameters(self, recurse=True):
            yield type("P", (), {"device": torch.device("cuda", 0)})()

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match="A100 has compute capability 8.0.*8.9"):
        hf_coat.apply_coat(OnOldGpu())


class Stage(nn.Module):
    """A convolution with the norms that vision and audio models put around it."""

    def __init__(self, *norms):
        super().__init__()
        self.norms, self.out = nn.ModuleList(norms), nn.Linear(32, 32)

    def forward(self, x):
        for norm in self.norms:
            x = norm(x)
        return self.out(x)


def test_norms_over_other_dimensions_are_kept():
    model = Stage(nn.BatchNorm1d(32), nn.GroupNorm(1, 32), nn.LayerNorm(32))
    x = torch.randn(2, 32, 32)  # a channel more or less would fail; here only numbers would be wrong
    expected = model(x)
    report = hf_coat.apply_coat(model)
    assert report.kept["norms.1"] == "a norm of another form" and "norms.0" not in report.converted
    assert report.converted.keys() == {"norms.2", "out"} and "BatchNorm1d" in report.uncovered
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.1)


class OwnNorm(nn.Module):
    def __init__(self, mode="rms", weight=True):
        super().__init__()
        self.mode, self.eps = mode, 1e-5
        if weight:
            self.weight = nn.Parameter(torch.randn(32))

    def forward(self, x):
        if self.mode == "rms":
            x = x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * self.weight if hasattr(self, "weight") else x


def test_norms_of_one_class_are_told_apart_by_what_they_hold():
    model = nn.Sequential(OwnNorm(), OwnNorm("none"), OwnNorm(weight=False), nn.Linear(32, 32))
    report = hf_coat.apply_coat(model)
    assert report.converted["0"].startswith("CoatNorm, RMSNorm") and report.converted["2"].startswith("CoatNorm")
    assert report.kept["1"] == "a norm of another form"
    model.bfloat16()(torch.randn(2, 3, 32, dtype=torch.bfloat16)).sum().backward()


def test_attentions_with_a_bias_of_positions_are_kept():
    model = AutoModel.from_config(SwinConfig(image_size=32, embed_dim=32, depths=[1], num_heads=[2], window_size=4))
    report = hf_coat.apply_coat(model, CoatConfig(activations="lean"))
    assert "an attention with a bias on its scores" in report.kept.values()
    model.train()(torch.randn(1, 3, 32, 32)).last_hidden_state.square().sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "relative_position_bias_table" in name)


def test_a_head_that_was_made_anew_is_fused_again():
    model = llama()
    hf_coat.apply_coat(model)
    hooks = len(model._forward_pre_hooks)
    model.resize_token_embeddings(136)
    assert hf_coat.apply_coat(model).converted["lm_head"].startswith("CoatHead, fused")
    assert len(model._forward_pre_hooks) == hooks
    model.resize_token_embeddings(144)
    hf_coat.remove_coat(model)
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    assert "_loss_function" not in vars(model)


@pytest.mark.parametrize("again", [hf_coat.apply_coat, hf_coat.remove_coat])
def test_parametrized_since(again):
    model = llama()
    hf_coat.apply_coat(model)
    linear = model.model.layers[0].self_attn.q_proj
    nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(RuntimeError, match="remove_parametrizations"):
        again(model)
    nn.utils.parametrize.remove_parametrizations(linear, "weight")
    hf_coat.remove_coat(model)
    assert type(linear) is nn.Linear


def test_eager_attentions_are_reported_as_they_are():
    model = llama(attn_implementation="eager")
    report = hf_coat.apply_coat(model, CoatConfig(activations="lean"))
    assert report.converted["model.layers.0.self_attn"].startswith("CoatAttention: q, k and v as they are, for it is")

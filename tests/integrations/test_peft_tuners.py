"""Which tuners of PEFT train on a base that is stored as FP8, and which are refused: all of PEFT 0.21, each tried."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora_config
from transformers import AutoModelForCausalLM

import hf_coat
from hf_coat import CoatConfig
from hf_coat.modules import CoatFrozenLinear

FP8, BF16 = CoatConfig(frozen_weights="fp8"), CoatConfig(frozen_weights="bf16")
IDS = torch.arange(48).view(3, 16) * 5
WAVES = {"n_frequency": 16}
VIRTUAL = {"num_virtual_tokens": 3}

# What get_peft_model must refuse to put on a stored base, with settings beside the targets.
REFUSED = {
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "ADAMSS": {"r": 4},
    "BEFT": {},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": WAVES,
    "FROD": {},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LILY": {"r": 4},
    "LOHA": {"r": 4, "init_weights": False},
    "LOKR": {"r": 4, "init_weights": False},
    "MISS": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 8},
    "OSF": {},
    "PEANUT": {"r": 4},
    "POLY": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHADOW": {},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {"r": 2},
    "UNILORA": {"r": 4},
    "VBLORA": {"r": 4, "num_vectors": 8, "vector_length": 16},
    "VERA": {"r": 4},
    "WAVEFT": WAVES,
}
# What wraps no linear, and trains.
TRAINS = {
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
    "CARTRIDGE": VIRTUAL,
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": VIRTUAL | {"num_tasks": 1},
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL | {"encoder_hidden_size": 16},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
}
ELSEWHERE = {"LORA", "GLORA", "XLORA"}  # below; X-LoRA is not there: PEFT 0.21 fails on it without hf_coat too
# LoRA in all its variants, and what a layer is initialised from, where that is not the weight.
LORA = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [1, 2]},
    "monteclora": {"monteclora_config": getattr(lora_config, "MontecloraConfig", object)()},
    "qalora": {"use_qalora": True, "qalora_group_size": 16},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
}


TASKS = dict.fromkeys(["POLY", "MULTITASK_PROMPT_TUNING"], {"task_ids": torch.zeros(3, dtype=torch.long)})


def known(table):
    """The parametrisation by this table, without what the installed PEFT does not have."""
    return pytest.mark.parametrize("kind", [name for name in table if name in PEFT_TYPE_TO_CONFIG_MAPPING])


def config(kind):
    settings = copy.deepcopy((REFUSED | TRAINS)[kind])
    if kind in REFUSED:
        settings = {"target_modules": ["q_proj"]} | settings
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **settings)


def base(tools, coat):
    """A frozen tiny Llama, converted; one of BF16 weights has the values of one that is stored."""
    model = tools.tiny_llama(torch.bfloat16).requires_grad_(False)
    hf_coat.apply_coat(model, FP8)
    if coat is BF16:
        hf_coat.apply_coat(model, BF16)  # thaws
    return model


def adapted(model, config):
    """With adapters that do something, the same ones each time."""
    torch.manual_seed(2)
    model, generator = get_peft_model(model, config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((torch.randn(p.shape, generator=generator) * 0.05).to(p.dtype))
    return model


def run(model, **inputs):
    """Logits, and the gradients of what trains."""
    torch.manual_seed(1)
    model.train().zero_grad()
    output = model(input_ids=IDS, labels=IDS, **inputs)
    output.loss.backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    return output.logits.detach().float(), grads


def same(a, b):
    (logits, grads), (expected, expected_grads) = a, b
    assert torch.equal(logits, expected) and grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert torch.equal(grads[name], grad), name


@pytest.mark.skipif(not peft.__version__.startswith("0.21"), reason="the tables are those of PEFT 0.21")
def test_all_tuners_were_tried():
    assert {str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == {
        *REFUSED, *TRAINS, *ELSEWHERE,
    }  # fmt: skip


@known(REFUSED)
def test_tuners_that_may_need_the_weight_are_refused(tools, kind):
    model = base(tools, FP8)
    kinds, bits = [type(m) for m in model.modules()], {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(
        ValueError,
        match=r"^model\.layers\.0\.\w+\.\w+_proj is stored as FP8, but peft\.tuners\.\w+\.\w+ may need its "
        r"weight: .*CoatConfig\(frozen_weights='bf16'\)",
    ):
        get_peft_model(model, config(kind))
    assert kinds == [type(m) for m in model.modules()] and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters()), "nothing was changed"

    hf_coat.apply_coat(model, BF16)  # what the message says
    model = adapted(model, config(kind))
    if kind != "SHADOW":  # which follows whole decoder layers, and cannot run on one linear
        assert run(model, **TASKS.get(kind, {}))


@known(REFUSED)
def test_they_keep_the_weights_that_they_wrap(tools, kind):
    """Converted afterwards, as a Trainer does it, only the weights that no adapter stands on are stored."""
    model = get_peft_model(tools.tiny_llama(torch.bfloat16), config(kind))
    report = hf_coat.apply_coat(model)
    wrapped = [what for name, what in report.converted.items() if "q_proj.base_layer" in name]
    assert len(wrapped) == 2 and all("not stored as FP8: peft.tuners." in what for what in wrapped)
    stored = sum(isinstance(m, CoatFrozenLinear) for m in model.modules())
    assert stored == 14 - sum("not stored" in what for what in report.converted.values()) > 0


def test_refused_on_a_model_that_was_loaded(tools, tmp_path):
    tools.tiny_llama(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FP8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is stored as FP8, but .*HRALinear"):
        get_peft_model(model, config("HRA"))
    with pytest.raises(ValueError, match=r"q_proj is stored as FP8, but .*HRALinear"):
        get_peft_model(copy.deepcopy(model), config("HRA"))


@pytest.mark.parametrize(
    "settings",
    [{"kasa_config": {}}, {"velora_config": {}}, {"target_parameters": ["q_proj.weight"], "target_modules": []}],
    ids=["kasa", "velora", "target_parameters"],
)
def test_lora_that_reads_the_weight_is_refused(tools, settings):
    """KaSA truncates it; VeLoRA makes its projections in its dtype, and its gradients are none."""
    with pytest.raises(ValueError, match=r"q_proj is stored as FP8, but .*frozen_weights='bf16'"):
        get_peft_model(base(tools, FP8), LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | settings))


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("variant", ["kasa_config", "velora_config"])
def test_lora_that_reads_the_weight_is_refused_on_a_layer_that_is_there(tools, variant, converted):
    plain = LoraConfig(r=4, target_modules=["q_proj"])
    model = adapted(base(tools, FP8), plain)
    if converted:
        hf_coat.apply_coat(model, FP8)
    if variant == "kasa_config":
        model.delete_adapter("default")  # PEFT itself lets KaSA stand beside no other adapter
    bits = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    with pytest.raises(ValueError, match=r"q_proj is stored as FP8, but .*frozen_weights='bf16'"):
        model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], **{variant: {}}))
    assert bits and all(torch.equal(p, bits[name]) for name, p in model.named_parameters() if name in bits)
    model.add_adapter("third", plain)
    model.set_adapter("third")
    assert run(model)


@known(TRAINS)
def test_tuners_that_wrap_no_linear_train(tools, kind):
    stored, plain = (run(adapted(base(tools, coat), config(kind)), **TASKS.get(kind, {})) for coat in (FP8, BF16))
    if kind == "ADAPTION_PROMPT":  # in FP32 where the weight is not in floating point: BF16 rounds the other
        (stored, _), (plain, _) = stored, plain
        assert (stored - plain).norm() <= 2 * 2.0**-7 * plain.norm()
    else:
        same(stored, plain)


@pytest.mark.parametrize("name", LORA)
def test_lora_computes_the_same_on_stored_weights(tools, name):
    stored, plain = (
        adapted(base(tools, coat), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **LORA[name]))
        for coat in (FP8, BF16)
    )
    assert sum(isinstance(m, CoatFrozenLinear) for m in stored.modules()) == 14
    same(run(stored), run(plain))


@known(["GLORA"])
def test_what_peft_refuses_on_any_converted_linear(tools, kind):
    glora = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    with pytest.raises(ValueError, match="not a plain torch.nn.Linear"):
        get_peft_model(base(tools, FP8), glora(target_modules=["q_proj"]))
    model = get_peft_model(tools.tiny_llama(torch.bfloat16), glora(target_modules=["q_proj"]))
    hf_coat.apply_coat(model)
    assert run(model)

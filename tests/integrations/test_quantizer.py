"""from_pretrained(quantization_config=CoatConfig()): loading, training, saving, undoing, and what it refuses."""

import importlib
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from transformers import TrainingArguments as PlainArguments
from transformers.quantizers import auto

import hf_coat
from hf_coat import CoatAdamW, CoatConfig, HfCoatConfig
from hf_coat.integrations import quantizer
from hf_coat.integrations.checks import check_model
from hf_coat.modules import CoatFrozenLinear, CoatLinear, CoatLora


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def plain_folder(request, tmp_path, tools):
    """A checkpoint of a model that never met COAT."""
    tools.tiny_llama(request.param).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def converted(model):
    return {name for name, module in model.named_modules() if isinstance(module, CoatLinear)}


def load(folder, config=None, **kwargs):
    if config is not None:
        kwargs["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def train(model, tools, steps=2):
    """Any loop: here a hand-written one."""
    optimizer = CoatAdamW(model.parameters(), lr=1e-2)
    batch = {key: torch.stack([row[key] for row in tools.random_tokens(2)]) for key in ("input_ids", "labels")}
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_registered_once():
    assert auto.AUTO_QUANTIZER_MAPPING["coat"] is quantizer.CoatHfQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["coat"] is CoatConfig
    try:
        importlib.reload(quantizer)  # would raise at a second registration
    finally:
        auto.AUTO_QUANTIZER_MAPPING["coat"] = quantizer.CoatHfQuantizer


def test_loaded_converted_with_the_same_parameters(plain_folder):
    plain, model = load(plain_folder), load(plain_folder, CoatConfig())
    assert len(converted(model)) == 14 and "lm_head" not in converted(model)
    assert list(model.state_dict()) == list(plain.state_dict()) and model.dtype == plain.dtype
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in plain.state_dict().items())
    report = model.hf_quantizer.report
    linears = {name for name, what in report.converted.items() if what.startswith("CoatLinear")}
    assert linears == converted(model) and report.kept == {} and report.converted["lm_head"].startswith("CoatHead")


def test_train_save_reload(plain_folder, tmp_path, tools):
    config = CoatConfig(granularity="tensor", modules_to_not_convert=["k_proj"])
    model = load(plain_folder, config)
    train(model, tools)
    model.save_pretrained(tmp_path / "trained")

    saved = load_file(tmp_path / "trained" / "model.safetensors")
    plain = load_file(plain_folder / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in saved.items()} == {n: (t.dtype, t.shape) for n, t in plain.items()}
    assert not torch.equal(saved["model.layers.0.mlp.up_proj.weight"], plain["model.layers.0.mlp.up_proj.weight"])
    block = json.loads((tmp_path / "trained" / "config.json").read_text())["quantization_config"]
    assert (
        block
        == config.to_dict()
        == {
            "hf_coat_version": hf_coat.__version__,
            "quant_method": "coat",
            "granularity": "tensor",
            "power_of_two": True,
            "grad_format": "e4m3",
            "modules_to_not_convert": ["k_proj"],
            "activations": "auto",
            "regions": {},
            "probe_steps": 2,
            "promoted": {},
            "group_size": 128,
            "scale_format": "e8m0",
            "cache_weights": True,
            "fsdp_all_gather": "fp8",
            "frozen_weights": "auto",
            "fuse_loss": True,
        }
    )

    again = load(tmp_path / "trained")  # the stored block is enough
    assert again.config.quantization_config == config and len(converted(again)) == 12
    assert tools.same_bits(dict(again.state_dict()), dict(model.state_dict()))
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert load(tmp_path / "trained", CoatConfig()).config.quantization_config == config


def test_saved_models_load_without_hf_coat_and_need_no_more_than_its_import(tmp_path, tools):
    model = tools.tiny_llama(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", CoatConfig())
    train(model, tools)
    model.save_pretrained(tmp_path / "trained")
    code = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
torch.save(model.state_dict(), sys.argv[2])
del sys.modules["hf_coat"], sys.modules["coat_kernels"]
import hf_coat
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(type(module).__name__ == "CoatLinear" for module in model.modules()))
"""
    out = tools.run_python(code, tmp_path / "trained", tmp_path / "state.pt", blocked=["hf_coat", "coat_kernels"])
    assert tools.same_bits(dict(torch.load(tmp_path / "state.pt")), dict(model.state_dict()))
    assert out.split()[-1] == "14"


def test_full_training_through_trainer(plain_folder, tmp_path, tools):
    model = load(plain_folder, CoatConfig())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = PlainArguments(**tools.short_run(tmp_path / "run"))
    Trainer(model, args, train_dataset=tools.random_tokens()).train()
    assert not any(torch.equal(p, before[name].to(p.device)) for name, p in model.named_parameters() if p.ndim > 1)
    model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").quantization_config["quant_method"] == "coat"


def test_lora_through_trainer(plain_folder, tmp_path, tools):
    model = load(plain_folder, CoatConfig())
    model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "up_proj"]))
    trained = Trainer(model, PlainArguments(**tools.short_run(tmp_path)), train_dataset=tools.random_tokens())
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained.train()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all(p.abs().sum() > 0 for name, p in adapters.items() if "lora_B" in name)
    assert all(torch.equal(base[name].to(p.device), p) for name, p in model.named_parameters() if name in base)
    q_proj = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert isinstance(q_proj, CoatLora) and type(q_proj.base_layer) is CoatFrozenLinear


def test_dequantize_undoes_it(plain_folder, tmp_path):
    model, plain = load(plain_folder, CoatConfig()), load(plain_folder)
    model = model.dequantize()
    assert not converted(model) and not model.is_quantized and not hasattr(model.config, "quantization_config")
    ids = torch.arange(32).view(2, 16)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert load(plain_folder, CoatConfig()).dequantize(torch.float64).dtype == torch.float64


def test_offloaded_modules_are_converted(tmp_path, tools):
    """Hooks that load a module's weights from disk keep the forward that it had when they came: it must be ours."""
    tools.tiny_llama().save_pretrained(tmp_path / "plain")
    on_cpu = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(on_cpu, "cpu"), "model.layers.1": "disk"}
    offloaded = load(tmp_path / "plain", CoatConfig(), device_map=device_map, offload_folder=str(tmp_path / "disk"))
    ids = torch.arange(32).view(2, 16)
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(offloaded(ids).logits, load(tmp_path / "plain", CoatConfig())(ids).logits)


def test_modules_that_are_not_there_are_warned_about(tmp_path, tools, heard):
    tools.tiny_llama().save_pretrained(tmp_path)
    load(tmp_path, CoatConfig(modules_to_not_convert=["vision_tower"]))
    assert any(line.startswith("REPORT") and "vision_tower" in line for line in heard.lines)


def test_refused_when_loading(tmp_path, tools):
    tools.tiny_llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"torch\.float16.*BF16 or FP32.*dtype=torch\.bfloat16"):
        load(tmp_path / "plain", CoatConfig(), dtype=torch.float16)

    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized with FineGrainedFP8Config but you are passing a CoatConfig"):
        load(tmp_path / "plain", CoatConfig())

    config["quantization_config"] = {"quant_method": "coat", "hf_coat_version": "99.1", "loss": "fused"}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="written by hf_coat 99.1.*loss='fused'.*pip install"):
        load(tmp_path / "plain")


def test_an_old_gpu_is_refused(tools, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100")
    model, quantizing = tools.tiny_llama(), quantizer.CoatHfQuantizer(CoatConfig())
    with FakeTensorMode():
        model.model.norm.weight = nn.Parameter(torch.empty(64, device="cuda"))
    for hook in (quantizing._process_model_before_weight_loading, quantizing._process_model_after_weight_loading):
        with pytest.raises(ValueError, match=r"NVIDIA A100.* 8\.0.*8\.9"):
            hook(model)


def test_models_quantized_by_something_else_are_refused(tools):
    model = tools.tiny_llama()
    model.is_quantized, model.quantization_method = True, "bitsandbytes"
    with pytest.raises(ValueError, match=r"already quantized by 'bitsandbytes'.*unquantized.*model=None"):
        check_model(model, CoatConfig())
    adapted = get_peft_model(tools.tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    adapted.base_model.model.is_quantized, adapted.base_model.model.quantization_method = True, "hqq"
    with pytest.raises(ValueError, match="already quantized by 'hqq'"):
        check_model(adapted, CoatConfig())

    model = tools.tiny_llama()
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        up_proj = model.model.layers[0].mlp.up_proj
        up_proj.weight = nn.Parameter(torch.zeros(96, 64).to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.up_proj\.weight is {dtype}.*unquantized"):
            check_model(model, CoatConfig())


def test_two_configs_for_one_model_are_refused(plain_folder, tmp_path, tools):
    model = load(plain_folder, CoatConfig())
    for coat, reason in (("lean", None), (HfCoatConfig(model=None), None), ("paper", "loaded with CoatConfig()")):
        args = hf_coat.TrainingArguments(**tools.short_run(tmp_path), coat=coat)
        if reason is None:
            Trainer(model, args, train_dataset=tools.random_tokens())
            continue
        with pytest.raises(ValueError) as caught:
            Trainer(model, args, train_dataset=tools.random_tokens())
        assert reason in str(caught.value) and "granularity='tensor'" in str(caught.value)

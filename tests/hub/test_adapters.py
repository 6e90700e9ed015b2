"""An adapter that was trained on a base in FP8: pushed, and pulled onto a BF16 base and onto a converted one."""

import json

PRELUDE = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

ids = torch.arange(32).view(2, 16) * 5

def loss(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids).loss.item()
"""

PUSH = (
    PRELUDE
    + """
import hf_coat
from hf_coat import CoatConfig

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
                     max_position_embeddings=16)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).push_to_hub("user/base")
model = AutoModelForCausalLM.from_pretrained(
    "user/base", quantization_config=CoatConfig(frozen_weights="fp8"), dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
hf_coat.apply_coat(model, CoatConfig(frozen_weights="fp8"))
said["before"] = loss(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
for _ in range(16):
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
said["after"] = loss(model)
model.push_to_hub("user/adapter")
"""
)

PULL = (
    PRELUDE
    + """
plain = sys.argv[1] == "plain"
if plain:
    sys.modules["hf_coat"] = None
    base = AutoModelForCausalLM.from_pretrained("user/base", dtype=torch.bfloat16)
else:
    from hf_coat import CoatConfig, apply_coat
    config = CoatConfig(frozen_weights="fp8")
    base = AutoModelForCausalLM.from_pretrained("user/base", quantization_config=config, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, "user/adapter")
if not plain:
    apply_coat(model, config)
    said["fused"] = sum(type(m).__name__ == "CoatLinear" and hasattr(m, "lora_A") for m in model.modules())
said["loss"] = loss(model)
with model.disable_adapter():
    said["without"] = loss(model)
"""
)


def test_pushed_and_pulled(hub):
    said = hub.run(PUSH)
    assert said["after"] < 0.9 * said["before"]
    files = hub.repos["user/adapter"].at("main")[1]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(files)
    assert not any("coat" in name for name in files) and "model.safetensors" not in files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/base"

    coat = hub.run(PULL, "coat", home="coat")
    assert coat["fused"] == 14 and coat["loss"] == said["after"] and coat["without"] == said["before"]
    plain = hub.run(PULL, "plain", home="plain")  # without hf_coat on the machine
    # weights and inputs in E4M3, each 2**-4 off at most
    for name in ("loss", "without"):
        assert abs(plain[name] - coat[name]) < 2 * 2.0**-4 * plain[name], name
    assert plain["loss"] < 0.9 * plain["without"]

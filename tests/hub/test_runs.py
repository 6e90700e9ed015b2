"""A Trainer's run on the Hub: pushed while it trains, interrupted, resumed, and loaded by its name."""

import json

import yaml

RUN = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, set_seed
import hf_coat

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2

def trainer(*callbacks):
    set_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         vocab_size=256, max_position_embeddings=16)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(256, (32, 16))]
    args = hf_coat.TrainingArguments(
        output_dir="run", coat="lean", max_steps=4, save_steps=1, logging_steps=1, learning_rate=1e-3, use_cpu=True,
        report_to="none", disable_tqdm=True, push_to_hub=True, hub_model_id="user/model", hub_strategy="every_save",
        hub_always_push=True, dataloader_pin_memory=False)
    return Trainer(AutoModelForCausalLM.from_config(config), args, train_dataset=rows, eval_dataset=rows[:4],
                   callbacks=list(callbacks))

trainer(Stop()).train()
resumed = trainer()
resumed.train(resume_from_checkpoint=True)
said["loss"] = resumed.evaluate()["eval_loss"]
resumed.push_to_hub()
resumed.push_to_hub(commit_message="again")
"""

LOAD = """
import torch
if sys.argv[1] == "plain":
    sys.modules["hf_coat"] = None
else:
    import hf_coat
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("user/model")
if sys.argv[1] != "plain":
    from hf_coat import HfCoatConfig
    hf_coat.apply_coat(model, HfCoatConfig.from_pretrained("user/model").model)
    said["linears"] = sum(type(m).__name__ == "CoatLinear" for m in model.modules())
ids = torch.arange(16)[None]
said["loss"] = model(input_ids=ids, labels=ids).loss.item()
"""


def test_interrupted_resumed_and_loaded(hub):
    said = hub.run(RUN)
    repo = hub.repos["user/model"]
    files = repo.at("main")[1]
    assert {"model.safetensors", "config.json", "coat_config.json", "coat_run.json", "README.md"} <= set(files)
    assert hub.lfs, "the weights went the way of large files"
    assert len(repo.commits) >= 4, "pushed at every save"
    assert not any(name.startswith(("checkpoint", "_")) for name in files)

    record = json.loads(files["coat_run.json"])
    assert record["schema_version"] == 1 and record["steps"] == 4 and record["resumed_at"] == [2]
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == [1, 2, 3, 4]
    assert record["model"]["class"] == "LlamaForCausalLM" and record["hardware"]["device"] == "cpu"
    assert len(record["conversion"]["converted"]) > 14 and record["memory"]["optimizer_states"] > 0
    assert "train_steps_per_second" in record["throughput"] and record["versions"]["torch"]

    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert {"coat", "fp8", "generated_from_trainer"} <= set(metadata["tags"])
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == said["loss"]
    assert card.count("## Trained in FP8 with COAT") == 1 and "Training procedure" in card
    assert "| resumed at steps | 2 |" in card and f"{said['loss']:.4f}" in card
    assert "quantization_config" not in json.loads(files["config.json"])

    plain, coat = (hub.run(LOAD, how, home=how) for how in ("plain", "coat"))
    assert coat["linears"] == 14
    assert abs(coat["loss"] - plain["loss"]) < 0.05 * plain["loss"]  # three operands in E4M3, 1/16 off at most

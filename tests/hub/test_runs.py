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


ESTIMATE = """
import contextlib, io, os
from hf_coat import cli
for name, *arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["estimate", *arguments])
    said[name] = [code, out.getvalue(), err.getvalue()]
said["files"] = sorted(os.listdir("."))
"""


def test_estimate_of_a_model_on_the_hub(hub):
    """Its config alone is fetched; what does not exist is an error without a traceback."""
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 256}
    repo = hub.new_repo("user/plain")
    first = repo.commit({"config.json": json.dumps(config).encode(), "model.safetensors": b"weights"})
    repo.commit({"config.json": b"[" * 10_000})
    hub.new_repo("user/recipe").commit({"coat_config.json": b'{"optimizer": {"group_size": 64}}'})
    small = ["--batch", "1", "--seq", "16"]
    cases = [
        ["fine", "user/plain", "--revision", first, *small, "--coat", "user/recipe", "--gpus", "4", "--lora", "4"],
        ["hostile", "user/plain", *small],
        ["no repository", "user/nowhere", *small],
        ["no revision", "user/plain", "--revision", "v7", *small],
        ["no recipe", "user/plain", "--revision", first, *small, "--coat", "user/nowhere"],
    ]
    said = hub.run(ESTIMATE, json.dumps(cases))
    assert said.pop("files") == ["home"]
    code, table, _ = said.pop("fine")
    table = " ".join(table.split())  # the title is wrapped
    assert code == 0 and "LoRA of rank 4" in table and "FSDP2 over 4 GPUs" in table and "recipe" in table
    for name, (code, out, error) in said.items():
        assert code == 1 and not out and error.startswith("hf-coat estimate: "), (name, out, error)
    assert "user/nowhere" in said["no repository"][2] and "v7" in said["no revision"][2]
    assert "no repository on the Hub" in said["no recipe"][2]
    assert not any("safetensors" in request for request in hub.requests)

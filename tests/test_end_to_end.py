"""Real trainings on real text by the stock Trainer: COAT ends where BF16 ends, and the example does what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from datasets import Dataset, disable_progress_bars

import hf_coat

EXAMPLES = Path(__file__).parents[1] / "examples"
SFT = [sys.executable, str(EXAMPLES / "sft.py"), "--held_out", "16", "--max_steps", "3", "--logging_steps", "1"]
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def sft():
    """The example as a module."""
    disable_progress_bars()
    sys.path.insert(0, str(EXAMPLES))
    try:
        import sft

        yield sft
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def train(sft, tmp_path_factory):
    """Train the example's small Llama for 60 steps; returns its loss on held-out text."""
    text = sft.python_documentation()

    def run(seed: int, coat: str | None) -> float:
        transformers.set_seed(seed)
        model, tokenizer = sft.small_llama(text, hidden_size=128, intermediate_size=344)
        data = sft.tokenize(text.shuffle(0), tokenizer, 64)  # the held-out text is the same for all seeds
        args = hf_coat.TrainingArguments(
            output_dir=str(tmp_path_factory.mktemp("run")),
            coat=coat,
            seed=seed,
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, args, train_dataset=data.skip(256), data_collator=transformers.default_data_collator
        )
        trainer.train()
        return trainer.evaluate(data.take(256))["eval_loss"]

    return run


def test_loss_stays_within_the_spread_of_seeds(train):
    """FP8 moves the loss by less than the choice of the seed does, for both presets."""
    bf16 = {seed: train(seed, None) for seed in SEEDS}
    spread = max(bf16.values()) - min(bf16.values())
    assert max(bf16.values()) < 6.0, "below log(1024) = 6.93 and the entropy of single tokens: something was learned"
    for preset in ("lean", "paper"):
        assert abs(train(SEEDS[0], preset) - bf16[SEEDS[0]]) < spread


def test_example(tmp_path):
    """The demo, cut short: tables with figures, a checkpoint that is an ordinary one, and the recipe beside it."""
    command = [*SFT, "--coat", "lean", "--output_dir", str(tmp_path), "--compare_bf16"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for line in ("model.layers.*.mlp.up_proj", "lm_head", "perplexity on held-out text, after", "saved activations"):
        assert line in run.stdout
    written = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "coat_config.json"} <= written
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert hf_coat.HfCoatConfig.from_pretrained(tmp_path) == hf_coat.HfCoatConfig.from_pretrained("lean")
    (plain,) = [line.split()[-1] for line in run.stdout.splitlines() if "transformers alone" in line]
    (coat,) = [line.split()[-1] for line in run.stdout.splitlines() if "after it, COAT" in line]
    # Weights are the same; FP8 in the forward moves the loss by far less than E4M3 moves a single value, 2**-4.
    assert float(plain) == pytest.approx(float(coat), rel=2**-4)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "for statements iterate"},
        {"prompt": "for?", "completion": "It iterates."},
        {"messages": [{"role": "user", "content": "for?"}, {"role": "assistant", "content": "It iterates."}]},
    ],
    ids=lambda row: "+".join(row),
)
def test_example_with_your_own_model_and_data(row, sft, tmp_path, monkeypatch, capsys):
    """A model in a folder and rows in a file, of each kind that the example reads, without COAT and with it."""
    text = Dataset.from_list([row] * 200)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, text)))
    model, tokenizer = sft.small_llama(text, hidden_size=32, intermediate_size=64)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    options += ["--output_dir", str(tmp_path / "out"), "--block_size", "16", "--disable_tqdm", "true"]
    for coat in ([], ["--coat", "lean"]):
        monkeypatch.setattr(sys, "argv", [*SFT[1:], *options, *coat])
        sft.main()
        printed = capsys.readouterr().out
        assert "perplexity on held-out text, after" in printed
        assert ("saved activations" in printed) == bool(coat)


def test_only_answers_are_learned(sft):
    """Labels are the completion's tokens and its end; blocks are full, and only the rest of the last is lost."""
    rows = Dataset.from_list([{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(40)])
    _, tokenizer = sft.small_llama(rows, hidden_size=32, intermediate_size=64)
    data = sft.tokenize(rows, tokenizer, 16)
    ids, labels = sum(data["input_ids"], []), sum(data["labels"], [])
    assert {len(block) for block in data["input_ids"]} == {16}
    whole = "".join(f"<|user|>What is {i}?<|end|><|assistant|>It is {i}.<|end|>" for i in range(40))
    learned = "".join(f"It is {i}.<|end|>" for i in range(40))
    assert whole.startswith(tokenizer.decode(ids))
    assert learned.startswith(tokenizer.decode([label for label in labels if label != -100]))
    assert len(tokenizer(whole)["input_ids"]) - len(ids) < 16

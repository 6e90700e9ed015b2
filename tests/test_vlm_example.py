"""examples/vlm.py: a small LLaVA learns to read real digits, and your own model and data take the same way."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

import hf_coat

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def vlm(monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "vlm", raising=False)  # a benchmark has the same name
    return importlib.import_module("vlm")


def run(vlm, monkeypatch, capsys, folder, *options) -> str:
    """What the script prints."""
    fixed = ["--output_dir", str(folder), "--disable_tqdm", "true", "--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", ["vlm.py", *fixed, *options])
    vlm.main()
    return capsys.readouterr().out


def test_digits_are_learned(vlm, tmp_path, monkeypatch, capsys):
    """The demo cut short, to two thirds of an epoch: more than twice as many right as by guessing one of ten."""
    printed = run(
        vlm, monkeypatch, capsys, tmp_path, "--coat", "lean", "--compare_bf16", "--max_steps", "32", "--learning_rate",
        "3e-3", "--held_out", "150",
    )  # fmt: skip
    assert all(line in printed for line in ("model.vision_tower", "projector, in BF16", "saved activations"))
    shares = dict(re.findall(r"^ (BF16|COAT) +([0-9.]+)%", printed, re.MULTILINE))
    assert shares.keys() == {"BF16", "COAT"} and all(float(share) > 20 for share in shares.values()), shares
    assert {"model.safetensors", "coat_config.json", "processor_config.json"} <= {f.name for f in tmp_path.iterdir()}


def test_with_your_own_model_and_data(vlm, tmp_path, monkeypatch, capsys):
    """A model in a folder and a dataset with its images, a frozen tower, with COAT and without."""
    model, processor = vlm.small_llava()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    vlm.digits().take(40).to_parquet(tmp_path / "data" / "train.parquet")
    before = model.state_dict()
    for coat in ([], ["--coat", "lean"]):
        printed = run(
            vlm, monkeypatch, capsys, tmp_path / "out", "--model_name_or_path", str(tmp_path / "model"),
            "--dataset_name", str(tmp_path / "data"), "--held_out", "8", "--max_steps", "2", "--freeze", "vision",
            "--per_device_train_batch_size", "4", *coat,
        )  # fmt: skip
        assert "of the held-out answers are right" in printed and ("frozen" in printed) == bool(coat)
        after = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
        assert after.keys() == before.keys()
        changed = {name.split(".")[1] for name, value in after.items() if not torch.equal(value, before[name])}
        assert "vision_tower" not in changed and {"multi_modal_projector", "language_model"} <= changed


def test_trls_collator(vlm, tmp_path):
    """SFTTrainer makes the inputs by itself, of the same rows; the model is measured and converted as elsewhere."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    model, processor = vlm.small_llava()
    args = hf_coat.trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True,
        max_length=None, gradient_checkpointing=False, coat="lean", save_strategy="no",
    )  # fmt: skip
    rows = vlm.digits().take(8)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)
    assert type(trainer.data_collator).__name__ == "DataCollatorForVisionLanguageModeling"
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses), losses
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, hf_coat.CoatCallback))
    assert callback.report.regions.keys() == {"vision", "projector", "language", "head"}
    assert {"image", "text"} == callback.record["probe"]["1"]["language"].keys()


def test_only_answers_have_labels(vlm):
    _, processor = vlm.small_llava()
    rows = vlm.digits()
    batch = vlm.Collator(processor)([rows[0], rows[1]])
    texts = processor.tokenizer.batch_decode([[i for i in row if i != -100] for row in batch["labels"].tolist()])
    assert [text.split() for text in texts] == [["zero", "<end>"], ["one", "<end>"]]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 16]

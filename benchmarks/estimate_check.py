"""What ``hf-coat estimate`` says beside what the allocator says: the stock Trainer, three steps, a process a setting.

    python benchmarks/estimate_check.py [--only NAME ...] [--json FILE] [--tiny]

All parameters are BF16, ``bf16=True``, gradients are clipped, BF16 runs use fused AdamW. The measured figure is
``torch.cuda.max_memory_allocated`` over the three steps. Needs a GPU; ``--tiny`` runs tiny models on a CPU too, where
there is no measured figure.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from environment import environment, fresh_process
from peer_models import in_bf16
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    Trainer,
)

LLAMA_1B = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
LLAMA_7B = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
TINY = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
CLIP = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14,
)  # fmt: skip
TINY_CLIP = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)


@dataclass(frozen=True)
class Setting:
    """A training: shape of the text model, batch, recipe (None for BF16), rank of adapters, with images or not."""

    text: dict
    batch: int
    coat: str | None
    lora: int | None = None
    images: bool = False
    checkpointing: bool = False


SETTINGS = {
    "1b-bf16": Setting(LLAMA_1B, 4, None),
    "1b-lean": Setting(LLAMA_1B, 4, "lean"),
    "1b-lean-8": Setting(LLAMA_1B, 8, "lean"),
    "1b-paper": Setting(LLAMA_1B, 4, "paper"),
    "7b-bf16": Setting(LLAMA_7B, 4, None),
    "7b-bf16-checkpointing": Setting(LLAMA_7B, 4, None, checkpointing=True),
    "7b-lean": Setting(LLAMA_7B, 4, "lean"),
    "7b-lean-1": Setting(LLAMA_7B, 1, "lean"),
    "7b-paper": Setting(LLAMA_7B, 4, "paper"),
    "7b-lora-bf16": Setting(LLAMA_7B, 4, None, lora=16),
    "7b-lora-lean": Setting(LLAMA_7B, 4, "lean", lora=16),
    "llava-1b-bf16": Setting(LLAMA_1B, 4, None, images=True),
    "llava-1b-lean": Setting(LLAMA_1B, 4, "lean", images=True),
}


def config_of(setting: Setting, tiny: bool) -> PreTrainedConfig:
    text = LlamaConfig(**(TINY if tiny else setting.text), max_position_embeddings=2048)
    if not setting.images:
        return text
    vision = CLIPVisionConfig(**(TINY_CLIP if tiny else CLIP))
    return LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=500)


def measure(name: str, tiny: bool) -> dict:
    """One setting's estimate, and its peak in this process."""
    from hf_coat import TrainingArguments
    from hf_coat.integrations.estimate import Training, batch_of, estimate

    setting, device = SETTINGS[name], "cuda" if torch.cuda.is_available() else "cpu"
    batch, length = (2, 64) if tiny else (setting.batch, 2048)
    config = config_of(setting, tiny)
    training = Training(config, batch, length, setting.coat, lora=setting.lora, checkpointing=setting.checkpointing)
    step = estimate(training)
    kind = AutoModelForImageTextToText if setting.images else AutoModelForCausalLM
    model = in_bf16(lambda: kind.from_config(config), device)
    if device == "cpu":
        model.float()  # its layer norms take no FP32 images into BF16 weights
    if setting.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=setting.lora, target_modules="all-linear", task_type="CAUSAL_LM"))
    like = batch_of(model, training)
    row = {key: torch.zeros(t.shape[1:]) if t.is_meta else t[0].clone() for key, t in like.items()}
    rows = [row] * (3 * batch)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=3, per_device_train_batch_size=batch, bf16=True, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=device == "cpu", gradient_checkpointing=setting.checkpointing,
        **({"optim": "adamw_torch_fused"} if setting.coat is None else {"coat": setting.coat}),
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    measured = torch.cuda.max_memory_allocated() if device == "cuda" else None
    reserved = torch.cuda.max_memory_reserved() if device == "cuda" else None
    return {
        "setting": name,
        "estimated": step.peak,
        "measured": measured,
        "reserved": reserved,
        "error": None if measured is None else step.peak / measured - 1,
        "phase": step.phase,
        "at_peak": step.at_peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", choices=SETTINGS, help="run this one in this process and write only its figures")
    options = parser.parse_args()
    if options.one:
        options.json.write_text(json.dumps(measure(options.one, options.tiny)))
        return
    if not options.tiny and not torch.cuda.is_available():
        parser.error("these sizes need a GPU; --tiny runs on a CPU too")
    rows = []
    for name in options.only:
        row = fresh_process(__file__, "--one", name, *["--tiny"] * options.tiny)
        rows.append(row if "estimated" in row else {"setting": name, "failed": row["error"]})
        if "failed" in rows[-1]:
            print(f"{name:24s} failed: {rows[-1]['failed'].splitlines()[-1]}", flush=True)
        else:
            figures = [f"{row[key] / 2**30:7.2f}" if row[key] else "      -" for key in ("estimated", "measured")]
            error = "" if row["error"] is None else f"{row['error']:+7.1%}"
            print(f"{name:24s} estimated {figures[0]} GiB, measured {figures[1]} GiB {error}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

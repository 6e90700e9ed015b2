"""What ``hf-coat estimate`` says beside what the allocator says: the stock Trainer, three steps, a process a setting.

    python benchmarks/estimate_check.py [--only NAME ...] [--gpus N | all] [--json FILE] [--tiny]
    python benchmarks/estimate_check.py --show FILE         the table of what was recorded

All parameters are BF16, ``bf16=True``, gradients are clipped, BF16 runs use fused AdamW. The measured figure is
``torch.cuda.max_memory_allocated`` over the three steps. ``--gpus`` takes so many GPUs, each with one setting at a
time. Needs a GPU; ``--tiny`` runs tiny models on a CPU too, where there is no measured figure.
"""

import argparse
import json
import queue
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
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


def in_words(name: str) -> str:
    """What is trained, and how."""
    setting = SETTINGS[name]
    shape = {2048: "1 B Llama", 4096: "7 B Llama"}[setting.text["hidden_size"]]
    words = [f"CLIP tower, projector and {shape}" if setting.images else shape]
    words += [f"LoRA {setting.lora}"] if setting.lora else ["full"]
    return ", ".join([*words, *["gradient checkpointing"] * setting.checkpointing])


def measure(name: str, tiny: bool) -> dict:
    """One setting's estimate, and its peak in this process."""
    from hf_coat import HfCoatConfig, TrainingArguments
    from hf_coat.integrations.estimate import Training, batch_of, estimate

    began, setting, device = time.perf_counter(), SETTINGS[name], "cuda" if torch.cuda.is_available() else "cpu"
    batch, length = (2, 64) if tiny else (setting.batch, 2048)
    config = config_of(setting, tiny)
    # Without the live figures, whose table at the end predicts the same step twice more.
    coat = None if setting.coat is None else replace(HfCoatConfig.resolve(setting.coat), live=False)
    training = Training(config, batch, length, coat, lora=setting.lora, checkpointing=setting.checkpointing)
    step = estimate(training)
    estimated = time.perf_counter()
    kind = AutoModelForImageTextToText if setting.images else AutoModelForCausalLM
    model = in_bf16(lambda: kind.from_config(config), device)
    if device == "cpu":
        model.float()  # its layer norms take no FP32 images into BF16 weights
    if setting.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=setting.lora, target_modules="all-linear", task_type="CAUSAL_LM"))
    like = batch_of(model, training)
    row = {key: torch.zeros(t.shape[1:]) if t.is_meta else t[0].clone() for key, t in like.items()}
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=3, per_device_train_batch_size=batch, bf16=True, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=device == "cpu", gradient_checkpointing=setting.checkpointing,
        **({"optim": "adamw_torch_fused"} if coat is None else {"coat": coat}),
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=[row] * (3 * batch))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    measured = torch.cuda.max_memory_allocated() if device == "cuda" else None
    reserved = torch.cuda.max_memory_reserved() if device == "cuda" else None
    return {
        "setting": name,
        "coat": setting.coat or "bf16",
        "batch": batch,
        "length": length,
        "estimated": step.peak,
        "measured": measured,
        "reserved": reserved,
        "error": None if measured is None else step.peak / measured - 1,
        "phase": step.phase,
        "at_peak": step.at_peak,
        "seconds": {"estimate": estimated - began, "all": time.perf_counter() - began},
    }


def measure_all(names: list[str], gpus: int, tiny: bool) -> Iterator[dict]:
    """Rows as they come, each from a process of its own on the next GPU that is free."""
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for gpu in range(gpus):
        free.put(gpu)

    def one(name: str) -> dict:
        gpu = free.get()
        # a process sees its own GPU alone, or it would take them all for data parallelism
        environ = {"CUDA_VISIBLE_DEVICES": str(gpu)} if torch.cuda.is_available() else {}
        row = fresh_process(__file__, "--one", name, *["--tiny"] * tiny, timeout=180, environ=environ)
        free.put(gpu)
        return row if "estimated" in row else {"setting": name, "failed": row["error"]}

    with ThreadPoolExecutor(gpus) as pool:
        for done in as_completed([pool.submit(one, name) for name in names]):
            yield done.result()


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| trained | recipe | tokens | estimated | measured | error |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {in_words(row['setting'])} | | | failed | | |")
            continue
        figures = [f"{row[key] / 2**30:.2f} GiB" if row[key] else "" for key in ("estimated", "measured")]
        error = "" if row["error"] is None else f"{row['error']:+.1%}"
        what = [in_words(row["setting"]), row["coat"], f"{row['batch']} x {row['length']}", *figures, error]
        lines.append(f"| {' | '.join(what)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--gpus", default="1", help="how many to use at once, or 'all'")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here, after each setting")
    parser.add_argument("--show", type=Path, help="run nothing, write the table of this file")
    parser.add_argument("--one", choices=SETTINGS, help="run this one in this process and write only its figures")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())["rows"]))
        return
    if options.one:
        options.json.write_text(json.dumps(measure(options.one, options.tiny)))
        return
    if not options.tiny and not torch.cuda.is_available():
        parser.error("these sizes need a GPU; --tiny runs on a CPU too")
    gpus = max(1, torch.cuda.device_count()) if options.gpus == "all" else int(options.gpus)
    if torch.cuda.is_available() and gpus > torch.cuda.device_count():
        parser.error(f"--gpus {gpus}: there are {torch.cuda.device_count()}")
    about, rows = environment("peft", "liger-kernel"), []
    for row in measure_all(options.only, gpus, options.tiny):
        rows = sorted([*rows, row], key=lambda row: options.only.index(row["setting"]))
        print(row["setting"], row.get("failed") or f"{row['seconds']['all']:.0f} s", flush=True)
        if options.json:
            options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

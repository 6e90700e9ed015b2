"""Train a Llama of about 1 B parameters with the stock Trainer on the Python sources of this machine: BF16 against
COAT.

    python benchmarks/trainer_run.py [--steps 200] [--batch 4] [--length 2048] [--json FILE]

Every run is a process of its own. Three BF16 runs differ in their seed (initial weights and order of the data) and
show how far apart equally good runs end; the runs with COAT have the first seed. All use BF16 weights; the BF16 runs
use torch's fused AdamW with BF16 states. The loss is that of held-out files after the last step. Needs a GPU and
``datasets``.
"""

import argparse
import json
import sysconfig
import tempfile
from pathlib import Path

import torch
from environment import environment, fresh_process
from peer_models import StepClock, in_bf16

RUNS = [("bf16", 0), ("bf16", 1), ("bf16", 2), ("lean", 0), ("paper", 0)]
VOCABULARY = 16384
MODEL = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8
)


def source_tokens(cache: Path, millions: int) -> torch.Tensor:
    """Tokens of the Python files of the standard library and the installed packages, shuffled; BPE trained on them."""
    if cache.exists():
        return torch.load(cache)
    from tokenizers import ByteLevelBPETokenizer

    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    files = sorted({f for root in roots for f in Path(root).rglob("*.py") if f.stat().st_size > 500})
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    texts, size = [], 0
    for i in order:
        texts.append(files[i].read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size > millions * 5_000_000:  # about 4 characters a token
            break
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[:2000], vocab_size=VOCABULARY, special_tokens=["<end>"])
    encoded = tokenizer.encode_batch([text + "<end>" for text in texts])
    tokens = torch.tensor([i for e in encoded for i in e.ids], dtype=torch.int32)
    torch.save(tokens, cache)
    return tokens


def train(variant: str, seed: int, cache: Path, options: argparse.Namespace) -> dict:
    """One run in this process."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed

    import hf_coat

    batch, length, steps = options.batch, options.length, options.steps
    tokens = torch.load(cache)
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    held_out, rows = rows[:64], rows[64 : 64 + batch * steps]
    if len(rows) < batch * steps:
        raise SystemExit(f"{len(rows)} sequences of {length} tokens are too few for {steps} steps of {batch}")
    train_set, eval_set = ([{"input_ids": row, "labels": row} for row in r.long()] for r in (rows, held_out))
    set_seed(seed)
    config = LlamaConfig(**MODEL, vocab_size=VOCABULARY, max_position_embeddings=length)
    model, clock = in_bf16(lambda: LlamaForCausalLM(config), "cuda"), StepClock()
    coat = {} if variant == "bf16" else {"coat": variant}
    args = hf_coat.TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch, learning_rate=3e-4, lr_scheduler_type="cosine", warmup_steps=20,
        weight_decay=0.1, max_grad_norm=1.0, bf16=True, seed=seed, logging_steps=20, save_strategy="no", report_to=[],
        disable_tqdm=True, prediction_loss_only=True,
        **({"optim": "adamw_torch_fused"} if variant == "bf16" else coat),
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=train_set, eval_dataset=eval_set, callbacks=[clock])
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated()
    times = clock.milliseconds()[19:]  # of the 21st step and all after it
    state = trainer.optimizer.state
    return {
        "variant": variant,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": len(times) * batch * length / sum(times) * 1e3,
        "peak_gib": peak / 2**30,
        "state_bytes_per_parameter": sum(
            t.numel() * t.element_size() for s in state.values() for t in s.values() if torch.is_tensor(t)
        )
        / sum(p.numel() for p in model.parameters()),
        "loss": trainer.evaluate()["eval_loss"],
        "train_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "python_sources.pt")
    parser.add_argument(
        "--one", nargs=2, metavar=("VARIANT", "SEED"), help="run this one in this process and write only its figures"
    )
    options = parser.parse_args()
    if options.one:
        options.json.write_text(json.dumps(train(options.one[0], int(options.one[1]), options.cache, options)))
        return
    source_tokens(options.cache, options.steps * options.batch * options.length // 1_000_000 + 1)
    rows = []
    for variant, seed in RUNS:
        passed = [f"--{name}={getattr(options, name)}" for name in ("steps", "batch", "length", "cache")]
        row = fresh_process(__file__, "--one", variant, str(seed), *passed)
        if "error" in row:
            raise SystemExit(f"the run {variant} with seed {seed} failed: {row['error']}")
        rows.append(row)
        print(
            f"{variant:6s} seed {seed}: {row['tokens_per_second']:7.0f} tokens/s, peak {row['peak_gib']:5.1f} GiB, "
            f"{row['state_bytes_per_parameter']:.2f} bytes of state a parameter, held-out loss {row['loss']:.4f}",
            flush=True,
        )
        if options.json:
            settings = {"steps": options.steps, "batch": options.batch, "length": options.length, "model": MODEL}
            options.json.write_text(json.dumps({**environment(), **settings, "rows": rows}, indent=1) + "\n")
    losses = [row["loss"] for row in rows if row["variant"] == "bf16"]
    print(f"spread of the BF16 seeds: {max(losses) - min(losses):.4f}")
    for row in rows[len(losses) :]:
        print(f"{row['variant']}: {row['loss'] - losses[0]:+.4f} from BF16 with the same seed")


if __name__ == "__main__":
    main()

"""What the live figures of a run cost: the stock Trainer with ``live=True`` and ``live=False`` in turns.

    python benchmarks/live.py [--steps 60] [--repeat 3] [--json FILE] [--tiny]

Layers of a Llama-2-7B, eight of them, in BF16, random tokens, the preset "lean", a log every ten steps; every fiftieth
step is one whose rounding is measured. Times are means over all steps but the first ten, so take a multiple of 50 and
ten; of the repetitions the fastest counts, and ``spread`` is the slowest minus it. Before that, 20 steps of two layers
with and without the live figures must give equal losses, bit for bit: with transformers' eager attention, as the
gradients of faster ones are sums in no fixed order on GPUs. ``--tiny`` takes a tiny model, on the CPU too.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from environment import environment
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_coat import HfCoatConfig, TrainingArguments

WARMUP = 10
SIZES = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
TINY = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4)


class Clock(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARMUP, state.max_steps):
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.began, self.ended = getattr(self, "ended", 0.0), time.perf_counter()


def train(live: bool, tiny: bool, steps: int, layers: int, attention: str = "sdpa") -> tuple[float, list[float]]:
    """Milliseconds a step, and the losses."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**(TINY if tiny else SIZES), num_hidden_layers=layers, vocab_size=16384)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    length, rows = (32, 2) if tiny else (2048, 4)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(16384, (rows * steps, length))]
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=rows, logging_steps=10,
        save_strategy="no", report_to=[], disable_tqdm=True, coat=HfCoatConfig(live=live),
    )  # fmt: skip
    clock = Clock()
    trainer = Trainer(model, args, train_dataset=data, callbacks=[clock])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return 1000 * (clock.ended - clock.began) / (steps - WARMUP), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with_live, without = (train(live, options.tiny, 20, 2, "eager")[1] for live in (True, False))
    if with_live != without:
        raise SystemExit(f"the losses differ: {with_live} with the live figures, {without} without them")
    print("equal losses with and without the live figures, bit for bit")
    layers = 2 if options.tiny else 8
    train(False, options.tiny, 20, layers)  # compiles
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(options.repeat):
        for live, done in times.items():
            done.append(train(live, options.tiny, options.steps, layers)[0])
    rows = {}
    for live, done in times.items():
        rows["live" if live else "without"] = {"ms": min(done), "spread": max(done) - min(done)}
    cost = rows["live"]["ms"] / rows["without"]["ms"] - 1
    for name, row in rows.items():
        print(f"{name:8} {row['ms']:9.3f} ms a step, spread {row['spread']:.3f}")
    print(f"the live figures cost {cost:+.2%}")
    if options.json:
        options.json.write_text(
            json.dumps({"environment": environment(), "rows": rows, "cost": cost}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

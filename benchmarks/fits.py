"""What fits on cards of 80 GB by the estimate: the largest batch of 2,048 tokens on each of 1 to 8 GPUs, as in table 7
of the COAT paper (arXiv 2410.19313, section 6.3).

    python benchmarks/fits.py [--only 7b 13b 30b] [--gpus 1 2 4 8] [--card 80] [--json FILE]
    python benchmarks/fits.py --show FILE         the table of what was recorded

Nothing is run and no GPU is needed: a row is what ``hf-coat estimate MODEL --gpus N --card 80`` says, FSDP2 sharding
weights, gradients and states. With FP32 weights, computing in BF16, as the paper has them and accelerate makes them
where it shards; and with BF16 weights (several GPUs: without ``bf16=True``). AdamW has two moments in the weights'
dtype; what FSDP2 gathers is counted in BF16, the weights that "lean" converted as FP8 codes. The peaks are for the
largest batch; a batch of 0 says that not one sequence fits, and its peak is what that would need. Takes half an hour
of one core.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from environment import environment
from transformers import LlamaConfig

LENGTH = 2048
SHAPES = {
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "30b": dict(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52),
}
RECIPES = {  # dtype of the weights and recipe, None for BF16
    "FP32 weights, BF16": ("float32", None),
    "FP32 weights, paper": ("float32", "paper"),
    "FP32 weights, lean": ("float32", "lean"),
    "BF16 weights, BF16": ("bfloat16", None),
    "BF16 weights, lean": ("bfloat16", "lean"),
}


def largest(name: str, recipe: str, counts: list[int], card: int) -> list[dict]:
    """A row for each number of GPUs; each batch is estimated once for all that shard."""
    from hf_coat.integrations.estimate import Training, estimates, largest_batch

    config = LlamaConfig(**SHAPES[name], vocab_size=32000, max_position_embeddings=LENGTH)
    dtype, coat = RECIPES[recipe]
    rows = []
    for together in ([n for n in counts if n == 1], [n for n in counts if n > 1]):
        known: dict[int, dict] = {}
        for gpus in together:
            first = 1 if gpus == 1 else 4  # where little is expected to fit, the smallest tells at once
            training = Training(config, first, LENGTH, coat, gpus, dtype=dtype)
            most = largest_batch(training, card, known, together)
            shown = max(most, 1)
            if shown not in known:
                known[shown] = estimates(replace(training, batch=shown), together)
            step = asdict(known[shown][gpus])
            rows.append({"model": name, "recipe": recipe, "gpus": gpus, "largest_batch": most, "step": step})
    return rows


def table(rows: list[dict]) -> str:
    """A line for each model and number of GPUs, a column for each recipe, as Markdown."""
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    lines = [f"| | {' | '.join(recipes)} |", "|---" * (len(recipes) + 1) + "|"]
    for model, gpus in dict.fromkeys((row["model"], row["gpus"]) for row in rows):
        found = {row["recipe"]: row for row in rows if (row["model"], row["gpus"]) == (model, gpus)}
        cells = [
            f"{row['largest_batch']} ({row['step']['peak'] / 2**30:.1f} GiB)" if row["largest_batch"] else "-"
            for row in (found[recipe] for recipe in recipes if recipe in found)
        ]
        lines.append(f"| {model.upper()} on {gpus} GPU{'s' * (gpus > 1)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    from hf_coat.peak import CARDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--card", type=int, choices=CARDS, default=80)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once, of one thread each")
    parser.add_argument(
        "--json",
        type=Path,
        help="write the figures here, after each model and recipe; go on from those that are there",
    )
    parser.add_argument("--show", type=Path, help="estimate nothing, write the table of this file")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())["rows"]))
        return
    about = {name: value for name, value in environment().items() if name not in ("gpu", "cuda", "triton")}
    about |= {"card": options.card, "length": LENGTH, "shapes": SHAPES}
    before = json.loads(options.json.read_text()) if options.json and options.json.exists() else about | {"rows": []}
    if before["card"] != options.card:
        parser.error(f"{options.json} is of cards of {before['card']} GB: write those of {options.card} GB elsewhere")
    rows = before["rows"]
    there = {(row["model"], row["recipe"]) for row in rows}
    names = [(name, recipe) for name in options.only for recipe in RECIPES if (name, recipe) not in there]
    shared = [[value] * len(names) for value in (options.gpus, options.card)]
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(largest, *zip(*names, strict=True), *shared) if names else ():
            rows += found
            if options.json:
                options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

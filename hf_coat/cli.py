"""``hf-coat``: memory before a run, the story of a run after it, this machine's figures beside those of the peers, and
our marks removed from a checkpoint.

What a command needs is imported when it runs, so that ``hf-coat --help`` costs nothing.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

BF16 = "bf16"  # no preset: torch.optim.AdamW and the model as it is

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"  # there in a checkout, not in an installed package
# What can be benchmarked, and by which script with which arguments.
CASES = {
    **{case: ("peers.py", case) for case in ("layer", "stack", "step", "small", "shapes")},
    **{case: ("vlm.py", case) for case in ("llava", "qwen")},
    **{case: (f"{case}.py",) for case in ("linear", "lora", "optimizer", "live")},
}


def _estimate(options: argparse.Namespace) -> str:
    from .integrations.estimate import Training, estimate, largest_batch, speedup
    from .pays import in_words
    from .peak import CARDS
    from .report import estimate_table

    names = [options.coat, *(name for name in options.vs if name != options.coat)]
    rows, records = {}, {}
    for name in names:
        training = Training(
            options.model, options.batch, options.seq, None if name == BF16 else name, options.gpus, options.lora,
            options.images, options.dtype, options.checkpointing, options.accumulate, options.revision,
        )  # fmt: skip
        step = estimate(training)
        row = asdict(step) | {"needed": step.needed(), "fits": [card for card in CARDS if step.fits(card)]}
        row["speedup"] = speedup(training)
        if options.card:
            row["largest_batch"] = {
                options.card: largest_batch(training, options.card, {options.batch: {options.gpus: step}})
            }
        rows[os.path.basename(name) if name != BF16 else "BF16, AdamW"] = row
        records[name] = row
    if options.json:
        return json.dumps(records, indent=1)
    dtype = options.dtype or ("bfloat16" if options.gpus == 1 else "trained parameters in float32")
    how = [f"batch {options.batch} x {options.seq}", dtype]
    how += [f"FSDP2 over {options.gpus} GPUs"] if options.gpus > 1 else []
    how += [f"LoRA of rank {options.lora}"] if options.lora else []
    how += ["gradient checkpointing"] * options.checkpointing + ["gradient accumulation"] * options.accumulate
    title = f"A training step of {options.model}: {', '.join(how)} (predicted, nothing was run)"
    speed = next((f"\n\nFP8: {in_words(row['speedup'])}" for row in rows.values() if row["speedup"]), "")
    return estimate_table(title, rows, CARDS) + speed


def _report(options: argparse.Namespace) -> str:
    from .plots import write_page
    from .record import read_run

    if len(options.runs) > 4:
        raise ValueError(f"{len(options.runs)} runs do not fit side by side; name at most four")
    names = [os.path.basename(os.path.abspath(run)) for run in options.runs]
    if len(set(names)) < len(names):
        names = list(options.runs)
    records = {name: read_run(run) for name, run in zip(names, options.runs, strict=True)}
    files = write_page(records, options.output or options.runs[0])
    return "\n".join(map(str, files))


def _bench(options: argparse.Namespace) -> str:
    script, *arguments = CASES[options.case]
    if not (BENCHMARKS / script).is_file():
        raise FileNotFoundError(
            f"the benchmarks come with hf_coat's sources, not with the installed package, and there is no {script} in "
            f"{str(BENCHMARKS)!r}: unpack or clone the sources, run pip install -e . in their folder, and then this"
        )
    code = subprocess.run([sys.executable, str(BENCHMARKS / script), *arguments, *options.rest]).returncode
    if code:
        raise RuntimeError(f"benchmarks/{script} {' '.join(arguments)} ended with exit status {code}")
    return f"what is measured, and how, is told at the top of benchmarks/{script}"


def _strip(options: argparse.Namespace) -> str:
    file = os.path.join(options.checkpoint, "config.json") if os.path.isdir(options.checkpoint) else options.checkpoint
    with open(file, encoding="utf-8") as stream:
        config = json.load(stream)
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no model's config: it holds {type(config).__name__}, not an object")
    removed = [key for key in _marks(config)]
    if not removed:
        return f"{file} has no mark of hf_coat: nothing to remove"
    part = f"{file}.part"
    with open(part, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(config, indent=2) + "\n")
    os.replace(part, file)
    return f"{file}: removed {', '.join(removed)}. The weights are plain and stay as they are"


def _marks(config: dict, where: str = "") -> Iterator[str]:
    """Take out each ``quantization_config`` of COAT's, also in the parts of a model; yield its place."""
    for key, value in list(config.items()):
        if key == "quantization_config" and isinstance(value, dict) and value.get("quant_method") == "coat":
            del config[key]
            yield where + key
        elif isinstance(value, dict):
            yield from _marks(value, f"{where}{key}.")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="hf-coat", description="FP8 training for Hugging Face models.")
    commands = top.add_subparsers(dest="command", required=True)

    new = commands.add_parser(
        "estimate",
        help="memory of a training step, told beforehand",
        description="Predict the memory of a training step of the stock Trainer with bf16=True, from the model's "
        "config alone: no weights are loaded and nothing is run.",
    )
    new.set_defaults(run=_estimate)
    new.add_argument("model", help="folder or Hub id of a model with a config.json")
    new.add_argument("--batch", type=_positive, default=4, help="sequences on a GPU in one forward (4)")
    new.add_argument("--seq", type=_positive, default=2048, help="tokens of a sequence (2048)")
    new.add_argument("--coat", default="lean", help="recipe: a preset, a path, a Hub id, or 'bf16' for none (lean)")
    new.add_argument("--vs", nargs="+", default=[BF16], metavar="RECIPE", help="recipes to put beside it (bf16)")
    new.add_argument("--gpus", type=_positive, default=1, help="GPUs over which FSDP2 shards it (1)")
    new.add_argument(
        "--lora", type=_positive, metavar="RANK", help="train LoRA adapters of this rank, not all weights"
    )
    new.add_argument("--images", type=_count, default=1, help="images in a sequence of a vision-language model (1)")
    new.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the parameters (bfloat16; those that train are float32 under FSDP2, as accelerate makes them)",
    )
    new.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    new.add_argument("--accumulate", action="store_true", help="gradients are accumulated over several forwards")
    new.add_argument("--card", type=int, choices=(24, 40, 48, 80, 141), help="find the largest batch for this card")
    new.add_argument("--revision", help="of the model on the Hub")
    new.add_argument("--json", action="store_true", help="write figures in bytes as JSON")

    new = commands.add_parser(
        "report",
        help="plots of a run, or of several side by side",
        description="Draw the records that runs with coat= leave (coat_run.json): a PNG for each plot, and "
        "report.html with all of them.",
    )
    new.set_defaults(run=_report)
    new.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run; up to four side by side")
    new.add_argument("--output", help="folder for the files (that of the first run)")

    new = commands.add_parser(
        "bench",
        help="the project's benchmarks on this machine, with the peers that are installed",
        description="Run a benchmark of the project's, from a checkout of its sources: COAT beside the peers that are "
        "installed; the others are named and skipped. Other options are the script's own, such as --peers, --tiny and "
        "--json FILE; CASE comes before them.",
    )
    new.set_defaults(run=_bench)
    new.add_argument("case", nargs="?", default="layer", choices=CASES, metavar="CASE", help=f"{', '.join(CASES)}")

    new = commands.add_parser(
        "strip",
        help="remove our marks from a checkpoint's config.json",
        description="Remove the quantization_config of COAT's from a config.json, for tools that reject a method "
        "that they do not know. The weights of such a checkpoint are plain; nothing else is changed.",
    )
    new.set_defaults(run=_strip)
    new.add_argument("checkpoint", help="folder of a checkpoint, or its config.json")
    return top


def _count(text: str, least: int = 0) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is not {least} or more")
    return value


def _positive(text: str) -> int:
    return _count(text, least=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 1 with the reason on the standard error."""
    top = parser()
    options, options.rest = top.parse_known_args(arguments)
    if options.rest and options.run is not _bench:
        top.error(f"unrecognized arguments: {' '.join(options.rest)}")
    try:
        sys.stdout.write(options.run(options) + "\n")
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.stderr.write("\n".join([f"hf-coat {options.command}: {error}", *getattr(error, "__notes__", ())]) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

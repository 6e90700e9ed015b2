"""Pretrain a Llama of 107 M parameters on 105 M tokens of real text several times, on the same data in the same order:
BF16 against COAT.

    python benchmarks/pretrain_runs.py [RUN ...] [--steps N] [--branch_at N] [--per_gpu 3] [--max_seconds 570]
                                       [--json FILE] [...]

A run is a process of ``examples/pretrain.py``, which is given every option that is not known here. ``per_gpu`` runs at
a time share a GPU, the others wait. A RUN is VARIANT or VARIANT:SEED, where the seed chooses the initial weights and
the order of the data. A run is compared with the first one of its seed, and a first one with the first of all.
Variants:

    bf16                      torch's fused AdamW; FP32 weights (as in all but the last four) and BF16 autocast
    bf16-compiled             the same with torch.compile
    lean, paper               the presets
    lean-model, paper-model   only what they do to the model, with torch's AdamW
    optimizer                 only COAT's optimizer
    bf16-weights              BF16 weights, and torch's fused AdamW with BF16 states
    bf16-weights-nearest, bf16-weights-stochastic, bf16-weights-master
                              BF16 weights and only COAT's optimizer, by how it keeps them
    NAME={...}                any recipe as JSON, under a name of its own; NAME:SEED={...} with a seed

When ``--max_seconds`` are nearly over, runs stop where they are and are evaluated, and the table says so. A second
call with the same FILE and settings adds its runs to those in FILE. Runs that share a GPU slow each other down:
compare their losses, not their speeds.

Trainings from scratch end some 0.005 nats apart by chance: a difference in the last bit moves the step, one of the
first few hundred, at which the loss falls fastest. ``--branch_at N`` takes that out: the first run of a seed, which
must have torch's AdamW, leaves a checkpoint after N steps, and the others of that seed go on from there, each with its
own arithmetic, its moments converted where COAT keeps them.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import combinations
from pathlib import Path
from queue import SimpleQueue
from statistics import mean, stdev

import torch
from coat_kernels.states import Weights
from environment import environment

import hf_coat
from hf_coat.config import PRESETS
from hf_coat.optim import from_adamw_state_dict

EXAMPLE = Path(__file__).parents[1] / "examples" / "pretrain.py"
RUNS = ["bf16", "lean", "paper", "bf16:1", "optimizer"]
RECORD = "run.json"
EVALUATION_SECONDS = 75  # what a run may take before its first step and after its last
COMPARED = 5  # logged training losses at the end of two runs, over which their gap is averaged


def model_half(preset: str) -> str:
    return json.dumps(hf_coat.HfCoatConfig(model=PRESETS[preset].model, optimizer=None).to_dict())


def optimizer_half(**settings) -> str:
    return json.dumps({"model": None, "optimizer": settings})


BF16_WEIGHTS = ["--weights_dtype", "bfloat16"]
VARIANTS = {
    "bf16": [],
    "bf16-compiled": ["--torch_compile", "true"],
    **{name: ["--coat", name] for name in PRESETS},
    **{f"{name}-model": ["--coat", model_half(name)] for name in PRESETS},
    "optimizer": ["--coat", optimizer_half()],
    "bf16-weights": BF16_WEIGHTS,
    **{
        f"bf16-weights-{kept.value}": [*BF16_WEIGHTS, "--coat", optimizer_half(weights=kept.value)] for kept in Weights
    },
}


def parse_run(run: str) -> tuple[str, int, list[str]]:
    """``"lean:1"`` -> its name, its seed, and its part of the command line."""
    variant, _, recipe = run.partition("=")
    name, _, seed = variant.partition(":")
    if not recipe and name not in VARIANTS:
        raise SystemExit(f"{run!r} is no run: the variants are {', '.join(VARIANTS)}, or NAME={{...}}")
    return name, int(seed or 0), ["--coat", recipe] if recipe else VARIANTS[name]


def recipe_of(run: str) -> hf_coat.HfCoatConfig | None:
    """What COAT does in this run, if anything."""
    arguments = parse_run(run)[2]
    return hf_coat.HfCoatConfig.resolve(arguments[arguments.index("--coat") + 1]) if "--coat" in arguments else None


def folder_of(run: str, options: argparse.Namespace) -> Path:
    """Where a run keeps what it writes."""
    name, seed, _ = parse_run(run)
    return options.folder / f"{name}-{seed}"


def checkpoint_of(run: str, options: argparse.Namespace) -> Path:
    """Where a run that others branch off leaves its weights and states."""
    return folder_of(run, options) / f"checkpoint-{options.branch_at}"


def branch(base: str, run: str, options: argparse.Namespace) -> list[str]:
    """The arguments with which ``run`` goes on from the checkpoint of ``base``, as its own optimizer reads it."""
    recipe, start, states = recipe_of(run), checkpoint_of(base, options), "optimizer.pt"
    converted = recipe is not None and recipe.optimizer is not None
    checkpoint = folder_of(run, options) / "start" / start.name
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(start, checkpoint, ignore=shutil.ignore_patterns(states) if converted else None)
    if converted:
        moments = torch.load(start / states, map_location="cpu", weights_only=True)
        torch.save(from_adamw_state_dict(moments, **recipe.optimizer.settings), checkpoint / states)
    return ["--resume_from_checkpoint", str(checkpoint)]


def train(
    run: str, base: str | None, gpu: str | None, stop_at: float, options: argparse.Namespace, extra: list[str]
) -> dict:
    """Carry out one run in a process of its own, from scratch or from where ``base`` was; returns its record, or what
    went wrong."""
    name, seed, arguments = parse_run(run)
    folder = folder_of(run, options)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(checkpoint_of(run, options), ignore_errors=True)  # of an earlier call: nobody is to branch off that
    row = {"name": name, "seed": seed}
    left = stop_at - time.monotonic()
    if left < EVALUATION_SECONDS:
        return row | {"failed": "not started: too little time was left"}
    arguments = ["--seed", str(seed), "--output_dir", folder, "--disable_tqdm", "true", *arguments, *extra]
    arguments += ["--corpus", options.folder / "corpus", "--max_seconds", str(left)]
    if options.branch_at is not None:
        arguments += ["--save_strategy", "steps", "--save_steps", str(options.branch_at)]
    if base is not None:
        row["branched_at"] = options.branch_at
        if not checkpoint_of(base, options).exists():
            return row | {"failed": f"not started: {base} left no checkpoint after {options.branch_at} steps"}
        arguments += branch(base, run, options)
    environ = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen([sys.executable, EXAMPLE, *arguments], env=environ, stdout=log, stderr=log)
        try:
            process.wait(None if math.isinf(left) else left + EVALUATION_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if (folder / RECORD).exists():
        return row | json.loads((folder / RECORD).read_text())
    log = (folder / "log.txt").read_text(errors="replace")
    return row | {"failed": f"exit status {process.returncode}; the end of its output:\n{log[-3000:]}"}


def gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def shared(row: dict) -> dict:
    """The settings that a run shares with those it is compared with, taken out of its record."""
    arguments, script = row.pop("arguments"), row.pop("script")
    row |= {name: arguments.pop(name) for name in ("coat", "data_seed", "optim")}
    row["weights_dtype"] = script.pop("weights_dtype")
    for settings, own in ((arguments, ("seed", "output_dir")), (script, ("corpus",))):
        for name in own:
            del settings[name]
    return {
        "script": script,
        "arguments": arguments,
        **{name: row.pop(name) for name in ("corpus", "parameters", "planned_steps", "held_out_tokens")},
    }


def label(row: dict) -> str:
    return f"{row['name']}:{row['seed']}" if row["seed"] else row["name"]


def train_loss_gap(row: dict, base: dict) -> str:
    """Mean difference of the training losses at the last steps that both runs logged, if any: of the same data."""
    steps = [step for step in row["train_loss"] if step in base["train_loss"]][-COMPARED:]
    return f"{mean(row['train_loss'][step] - base['train_loss'][step] for step in steps):+.4f}" if steps else ""


def compared_with(row: dict, rows: list[dict]) -> dict:
    """The first run of the same seed, or of all where it is that one itself."""
    first = next(other for other in rows if other["seed"] == row["seed"])
    return rows[0] if first is row else first


def table(rows: list[dict], planned_steps: int) -> str:
    """Held-out losses, the gaps in nats where both runs took as many steps, and what several seeds say together."""
    heads = ["run", "steps", "as trained", "gap", "plain BF16", "gap", "training gap", "tokens/s", "peak GiB"]
    lines = [f"{heads[0]:<24}" + "".join(f"{head:>13}" for head in heads[1:])]
    for row in rows:
        base = compared_with(row, rows)
        other, unequal = row is not base, row["steps"] != base["steps"]
        cells = [str(row["steps"])]
        for key in ("held_out_loss", "held_out_loss_bf16"):
            cells += [f"{row[key]:.4f}", f"{row[key] - base[key]:+.4f}" if other and not unequal else ""]
        cells.append(train_loss_gap(row, base) if other and row["seed"] == base["seed"] else "")
        cells.append(f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "-")
        cells.append(f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "-")
        notes = []
        if row["steps"] < planned_steps:
            notes.append(f"stopped before step {planned_steps}")
        alike = [r for r in rows if all(r.get(key) == row.get(key) for key in ("seed", "steps", "branched_at"))]
        if row["data_sha256"] != alike[0]["data_sha256"]:
            notes.append("NOT THE SAME DATA")
        lines.append(f"{label(row):<24}" + "".join(f"{cell:>13}" for cell in cells) + "  ".join(["", *notes]))
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["steps"] == planned_steps:
            losses.setdefault(row["name"], {})[row["seed"]] = row["held_out_loss"]
    for name, by_seed in losses.items():
        if len(by_seed) > 1:
            spread = max(by_seed.values()) - min(by_seed.values())
            lines.append(f"spread of the {len(by_seed)} seeds of {name}: {spread:.4f}")
    for (other, before), (name, after) in combinations(losses.items(), 2):
        gaps = [after[seed] - before[seed] for seed in before.keys() & after.keys()]
        if len(gaps) > 1:
            error = stdev(gaps) / math.sqrt(len(gaps))
            lines.append(
                f"{name} less {other}, {len(gaps)} seeds: {mean(gaps):+.4f} in the mean, standard error {error:.4f}"
            )
    return "\n".join(lines)


def ranking(order: list[tuple[str, int]]):
    """A sort key: runs as they were asked for, then those of earlier calls."""
    return lambda run: order.index(run) if run in order else len(order)


def earlier_rows(file: Path | None, settings: dict) -> dict[tuple[str, int], dict]:
    """The rows of a result file by name and seed, if it was made with these settings, at whatever commit."""
    if file is None or not file.exists():
        return {}
    result = json.loads(file.read_text())
    commit = result.pop("commit", None)  # of rows that do not say their own
    rows = {(row["name"], row["seed"]): {"commit": commit, **row} for row in result.pop("rows")}
    if result != settings:
        print(f"{file} was made with other settings or elsewhere: its runs are not kept", flush=True)
        return {}
    return rows


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", default=RUNS)
    parser.add_argument("--steps", type=int, help="optimizer steps; by default those of the example")
    parser.add_argument("--branch_at", type=int, help="steps after which the runs of a seed part")
    parser.add_argument("--per_gpu", type=int, default=3, help="runs that share a GPU")
    parser.add_argument("--max_seconds", type=float, default=math.inf, help="for everything together")
    parser.add_argument("--json", type=Path, help="write the figures here, and keep those that are there")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "pretrain_runs"))
    options, extra = parser.parse_known_args()
    order = [parse_run(run)[:2] for run in options.runs]
    if options.steps is not None:
        extra += ["--max_steps", str(options.steps)]
    where = environment("accelerate", "tokenizers")
    commit = where.pop("commit")
    bases: dict[int, str] = {}  # of each seed
    if options.branch_at is not None:
        where["branch_at"] = options.branch_at
        for run, (_, seed) in zip(options.runs, order, strict=True):
            bases.setdefault(seed, run)
        for run in bases.values():
            if (recipe := recipe_of(run)) is not None and recipe.optimizer is not None:
                raise SystemExit(
                    f"{run!r} comes first of its seed and has COAT's optimizer: others branch off torch's"
                )

    corpus = ["--corpus", options.folder / "corpus", "--corpus_only", "true", "--output_dir", options.folder]
    subprocess.run([sys.executable, EXAMPLE, *corpus, *extra], check=True)
    print(f"the text is encoded after {time.monotonic() - started:.0f} s", flush=True)

    free = SimpleQueue()
    for gpu in gpus() * options.per_gpu or [None]:
        free.put(gpu)

    def on_a_gpu(run: str, base: str | None = None) -> dict:
        if base is not None:
            futures[base].result()
        gpu = free.get()
        try:
            return train(run, base, gpu, started + options.max_seconds - EVALUATION_SECONDS, options, extra)
        finally:
            free.put(gpu)

    settings, rows, failed, futures = None, {}, [], {}
    with ThreadPoolExecutor(free.qsize()) as pool:
        for run in dict.fromkeys([*bases.values(), *options.runs]):  # bases before those that wait for them
            base = bases.get(parse_run(run)[1])
            futures[run] = pool.submit(on_a_gpu, run, None if base == run else base)
        for done in as_completed(futures.values()):
            row = done.result()
            after = f"after {time.monotonic() - started:.0f} s"
            if "failed" in row:
                failed.append(label(row))
                print(f"{label(row)} failed {after}: {row['failed']}", flush=True)
                continue
            mine = {**where, **shared(row)}
            if settings is None:
                settings, rows = mine, earlier_rows(options.json, mine)
            if mine != settings:
                raise ValueError(f"{label(row)} had other settings than a run before it: {mine}, not {settings}")
            rows[row["name"], row["seed"]] = {"commit": commit, **row}
            print(f"{label(row)} done {after}, held-out loss {row['held_out_loss']:.4f}", flush=True)
            if options.json:
                result = {**settings, "rows": [rows[run] for run in sorted(rows, key=ranking(order))]}
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    if rows:
        print(table([rows[run] for run in sorted(rows, key=ranking(order))], settings["planned_steps"]))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

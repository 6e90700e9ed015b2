"""Errors of the state formats on moments of a real training run.

    python benchmarks/state_formats.py capture FOLDER [--at 200 800 1590] [options of examples/pretrain.py]
    python benchmarks/state_formats.py study FILE... [--json FILE]

``capture`` trains as examples/pretrain.py does, with torch's AdamW and FP32 states, and writes some rows of each
parameter's moments and gradient after the optimizer steps named: ``{"step", "states": {name: {"exp_avg",
"exp_avg_sq", "grad"}}}``. ``--tiny`` is as there.

``study`` encodes and decodes them once in each format, and compares m / sqrt(v), what the step uses (the paper's
measure, Table 1). Errors are means over all values, divided by the mean of |m / sqrt(v)|; ``rms`` divides roots of
mean squares. ``m`` and ``v`` are the errors of the moments themselves: of m over the mean |m| in units of sqrt(v), of
v relative to each value. Beside the formats that the library has stand others, which it was chosen from:

    companded G   q |q| for m, the fourth root for v: m by itself, not over sqrt(v)
    log G         q |q| for m, v in equal steps of its logarithm between the group's extremes
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from coat_kernels.states import (
    StateFormat,
    decode_companded,
    decode_moments,
    encode_companded,
    encode_moments,
    group_shape,
)
from environment import environment

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = 16  # of each parameter
SMALLEST = 2.0**-126


def library(format: StateFormat, group_size: int) -> Callable:
    return lambda m, v: decode_moments(encode_moments([m, v], group_size, format), group_size, format)


def grouped(x: torch.Tensor, group_size: int) -> torch.Tensor:
    width = min(group_size, x.shape[-1])
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % width)).reshape(-1, width)


def restored(groups: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return groups.reshape(*like.shape[:-1], -1)[..., : like.shape[-1]]


def apart(code_v: Callable, group_size: int) -> Callable:
    """m in ``q |q|`` by itself, v by ``code_v``, in groups."""

    def code(m, v):
        companded = decode_companded(*encode_companded(grouped(m, group_size)))
        return restored(companded, m), restored(code_v(grouped(v, group_size)), v)

    return code


def fourth_root(v: torch.Tensor) -> torch.Tensor:
    scale = v.amax(dim=1, keepdim=True).clamp(min=SMALLEST)
    codes = (v / scale).pow(0.25).mul(255).round().clamp(min=1)
    return torch.where(v > 0, (codes / 255) ** 4 * scale, 0.0)


def logarithm(v: torch.Tensor) -> torch.Tensor:
    top = v.amax(dim=1, keepdim=True).clamp(min=SMALLEST).log2()
    low = torch.where(v > 0, v, torch.inf).amin(dim=1, keepdim=True).clamp(min=SMALLEST, max=1e30).log2()
    step = ((top - low) / 254).clamp(min=1e-6)
    codes = ((v.clamp(min=SMALLEST).log2() - top) / step).round().clamp(min=-254)
    return torch.where(v > 0, torch.exp2(top + codes * step), 0.0)


# By name: what encodes and decodes both moments, bytes of side data per group, the group size.
FORMATS = {f"{f.value} {size}": (library(f, size), 2 * f.group_bytes, size) for f in StateFormat for size in (64, 128)}
FORMATS |= {f"companded {size}": (apart(fourth_root, size), 8, size) for size in (64, 128)}
FORMATS |= {f"log {size}": (apart(logarithm, size), 12, size) for size in (64, 128)}


def study(files: list[str]) -> list[dict]:
    rows = []
    for file in files:
        captured = torch.load(file, weights_only=True)
        for name, (code, side, group_size) in FORMATS.items():
            sums, values, size = torch.zeros(7, dtype=torch.float64), 0, 0
            for state in captured["states"].values():
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m_again, v_again = code(m, v)
                some = v >= SMALLEST
                root = torch.where(some, v, 1.0).sqrt()
                u = torch.where(some, m / root, 0.0)
                u_again = torch.where(v_again > 0, m_again / v_again.clamp(min=SMALLEST).sqrt(), 0.0)
                error, m_error = (u_again - u).double(), torch.where(some, (m_again - m) / root, 0.0)
                v_error = torch.where(some, v_again / torch.where(some, v, 1.0) - 1, 0.0)
                parts = error.abs(), u.abs(), error**2, u.double() ** 2, m_error.abs(), v_error.abs(), some
                sums += torch.stack([part.double().sum() for part in parts])
                values += m.numel()
                size += 2 * m.numel() + side * math.prod(group_shape(m.shape, group_size))
            error, total, square, squares, m_error, v_error, count = sums.tolist()
            rows.append(
                {
                    "step": captured["step"],
                    "format": name,
                    "bytes_per_parameter": size / values,
                    "error": error / total,
                    "rms": (square / squares) ** 0.5,
                    "m": m_error / total,
                    "v": v_error / count,
                }
            )
    return rows


def show(rows: list[dict]) -> str:
    lines = ["| step | format | bytes per parameter | error of m/sqrt(v) | of paper's | rms | m | v |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        paper = next(r["error"] for r in rows if (r["step"], r["format"]) == (row["step"], "paper 128"))
        lines.append(
            f"| {row['step']} | {row['format']} | {row['bytes_per_parameter']:.3f} | {row['error']:.3%} | "
            f"{row['error'] / paper:.2f} | {row['rms']:.3%} | {row['m']:.3%} | {row['v']:.3%} |"
        )
    return "\n".join(lines)


def capture(folder: Path, steps: list[int], rest: list[str]) -> None:
    """Run examples/pretrain.py with a callback that writes the states."""
    sys.path.insert(0, str(EXAMPLES))
    import pretrain
    from transformers import Trainer, TrainerCallback

    def rows_of(t: torch.Tensor) -> torch.Tensor:
        t = t.detach().float().reshape(-1, t.shape[-1])
        return t[:: max(1, len(t) // ROWS)][:ROWS].cpu().clone()

    class Capture(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            step = state.global_step + 1
            if step not in steps:
                return
            held = getattr(optimizer, "optimizer", optimizer).state
            states = {
                name: {key: rows_of(t) for key, t in (*held[p].items(), ("grad", p.grad)) if key != "step"}
                for name, p in model.named_parameters()
                if p in held
            }
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"step": step, "states": states}, folder / f"states-{step}.pt")

    class CapturingTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Capture)

    pretrain.Trainer = CapturingTrainer
    sys.argv[1:] = rest
    pretrain.main()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    capturing = commands.add_parser("capture", help="train and write states")
    capturing.add_argument("folder", type=Path)
    capturing.add_argument("--at", type=int, nargs="+", default=[200, 800, 1590], help="optimizer steps")
    studying = commands.add_parser("study", help="compare formats")
    studying.add_argument("files", nargs="+")
    studying.add_argument("--json", type=Path)
    options, rest = parser.parse_known_args()
    if options.command == "capture":
        capture(options.folder, options.at, rest)
        return
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    rows = study(options.files)
    print(show(rows))
    if options.json:
        options.json.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

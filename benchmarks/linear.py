"""One linear layer, forward and backward: ``CoatLinear`` with each preset against a BF16 ``nn.Linear``, in one run.

    python benchmarks/linear.py [--json FILE]

All of COAT's quantization is inside the measured time. The floor counts three matrix products at the FP8 rate that
``torch._scaled_mm`` reaches here, and nothing else. Needs a GPU.
"""

import argparse
import json
from pathlib import Path

import torch
from environment import environment
from timing import fp8_rate, time_ms
from torch import nn

import hf_coat
from hf_coat.config import PRESETS

SHAPES = [(16384, 4096, 11008), (16384, 4096, 4096), (16384, 11008, 4096), (2048, 4096, 11008)]  # tokens, in, out


def measure(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict:
    def new_step():
        x.grad = layer.weight.grad = None
        torch.autograd.graph.increment_version(layer.weight)  # as an optimizer's step: it is quantized again

    ms, spread = time_ms(lambda: layer(x).backward(dy), before=new_step)
    kept = 0

    def count(tensor):
        nonlocal kept
        if tensor.data_ptr() != layer.weight.data_ptr():
            kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        layer(x)
    return {"ms": ms, "spread_ms": spread, "kept_mib": kept / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rows = []
    for tokens, n_in, n_out in SHAPES:
        x = torch.randn(tokens, n_in, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(tokens, n_out, device="cuda", dtype=torch.bfloat16)
        layer = nn.Linear(n_in, n_out, bias=False, device="cuda", dtype=torch.bfloat16)
        floor = 3 * 2 * tokens * n_in * n_out / fp8_rate(tokens, n_out, n_in) * 1e3
        row = {"tokens": tokens, "in": n_in, "out": n_out, "floor_ms": floor, "bf16": measure(layer, x, dy)}
        for preset in ("lean", "paper"):
            model = nn.Sequential(layer)
            hf_coat.apply_coat(model, PRESETS[preset].model)
            row[preset] = measure(layer, x, dy)
            hf_coat.remove_coat(model)
        rows.append(row)
        text = ", ".join(
            f"{k} {row[k]['ms']:.2f} ms ({row['bf16']['ms'] / row[k]['ms']:.2f}x, keeps {row[k]['kept_mib']:.0f} MiB)"
            for k in ("bf16", "lean", "paper")
        )
        print(f"{tokens} x {n_in} -> {n_out}: {text}; floor {floor:.2f} ms", flush=True)
    if options.json:
        options.json.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

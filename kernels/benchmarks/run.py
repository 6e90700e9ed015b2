"""Time the kernels against what the machine can do; a figure is printed only for a kernel that agrees with its
reference.

    python kernels/benchmarks/run.py [--only quantize] [--json FILE] [--record]

Memory-bound kernels are compared with the bandwidth of a device copy measured in the same run, matrix products with
``torch._scaled_mm`` and with BF16. ``--record`` writes the comparison of Triton and cuBLASLt into
scaled_mm_choice.json, from which ``coat_kernels.scaled_mm`` chooses. Needs a GPU.
"""

import argparse
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import coat_kernels as ck
import torch
import triton
from coat_kernels import scaled_mm_triton
from coat_kernels.quantize import dequantize_ref, quantize_ref, transpose_ref
from triton.testing import do_bench

E4M3 = torch.float8_e4m3fn
TOKENS, HIDDEN, WIDE = 16384, 4096, 11008


@dataclass
class Case:
    """One memory-bound call: what it computes, the fewest bytes it must move, and the reference it must agree with."""

    name: str
    call: Callable
    reference: Callable
    bytes: int


def memory_cases() -> Iterator[Case]:
    generator = torch.Generator("cuda").manual_seed(0)
    for width in (HIDDEN, WIDE):
        x = torch.randn(TOKENS, width, generator=generator, device="cuda", dtype=torch.bfloat16)
        n = x.numel()
        recipes = {"token": ("token", 0, True), "group 32": ("group", 32, True), "tensor": ("tensor", 0, False)}
        for name, (granularity, group, pow2) in recipes.items():
            for codes, transposed in ((True, False), (True, True)):
                options = dict(group_size=group, power_of_two=pow2, codes=codes, transposed=transposed)
                arguments = (E4M3, granularity, group, pow2, None, codes, transposed)
                reads = 2 if granularity == "tensor" else 1  # the amax of a tensor takes a pass of its own
                yield Case(
                    f"quantize {TOKENS} x {width} per {name}{' + transposed' if transposed else ''}",
                    lambda x=x, g=granularity, o=options: ck.quantize(x, E4M3, g, **o),
                    lambda x=x, a=arguments: quantize_ref(x, *a),
                    n * (2 * reads + codes + transposed),
                )
        scale = quantize_ref(x[:64], E4M3, "tensor", 0, True, None, True, False)[2] * 2
        yield Case(
            f"quantize {TOKENS} x {width} transposed, scale given",
            lambda x=x, s=scale: ck.quantize(x, E4M3, "tensor", scale=s, codes=False, transposed=True)[1],
            lambda x=x, s=scale: quantize_ref(x, E4M3, "tensor", 0, True, s, False, True)[1],
            n * 3,
        )
        x_q, _, x_s = ck.quantize(x)
        yield Case(
            f"transpose {TOKENS} x {width}",
            lambda a=(x_q, x_s): ck.transpose(*a),
            lambda a=(x_q, x_s): transpose_ref(*a),
            n * 2,
        )
        yield Case(
            f"dequantize {TOKENS} x {width}",
            lambda a=(x_q, x_s): ck.dequantize(*a),
            lambda a=(x_q, x_s): dequantize_ref(*a, 0, torch.bfloat16),
            n * 3,
        )


def agrees(actual, expected) -> bool:
    """Bitwise equal scales and values; codes may differ in one of a thousand places by one step."""
    pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    for a, b in pairs:
        if a is None or a.numel() == 0:
            continue
        if a.element_size() > 1:
            if not torch.equal(a, b):
                return False
        else:
            steps = (a.view(torch.uint8).int() - b.view(torch.uint8).int()).abs()
            steps[a.float() == b.float()] = 0
            if steps.max() > 1 or (steps > 0).float().mean() > 1e-3:
                return False
    return True


def milliseconds(call: Callable) -> float:
    return do_bench(call, warmup=20, rep=60, return_mode="median")


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a 2 GiB device copy."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def run_memory(bandwidth: float, only: str) -> Iterator[dict]:
    for case in memory_cases():
        if only not in case.name:
            continue
        if not agrees(case.call(), case.reference()):
            yield {"case": case.name, "parity": False}
            continue
        ms = milliseconds(case.call)
        rate = case.bytes / (ms * 1e-3)
        yield {"case": case.name, "parity": True, "us": ms * 1e3, "TB/s": rate / 1e12, "of copy": rate / bandwidth}


def product_shapes() -> list[tuple[int, int, int, bool]]:
    """M, N, K and fast_accum of the three products of the linears of 1 B and 7 B models."""
    shapes = set()
    for tokens in (2048, 8192, 16384):
        for n, k in [(4096, 4096), (11008, 4096), (4096, 11008), (2048, 2048), (8192, 2048), (2048, 8192)]:
            shapes |= {(tokens, n, k, True), (tokens, k, n, False), (n, k, tokens, False)}
    return sorted(shapes)


def run_products(only: str) -> Iterator[dict]:
    generator = torch.Generator("cuda").manual_seed(0)
    for m, n, k, fast in product_shapes():
        name = f"scaled_mm {m} x {n} x {k} {'fast' if fast else 'exact'}"
        if only not in name:
            continue
        a = torch.randn(m, k, generator=generator, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(n, k, generator=generator, device="cuda", dtype=torch.bfloat16)
        (a_q, _, a_s), (b_q, _, b_s) = ck.quantize(a), ck.quantize(b)
        arguments = (a_q, b_q, a_s, b_s, None, torch.bfloat16, fast)
        truth = (a_q.float() @ b_q.float().t()) * a_s * b_s.t()
        rounding = (truth.bfloat16().float() - truth).norm()
        row = {"case": name, "gpu": torch.cuda.get_device_name(), "m": m, "n": n, "k": k, "fast_accum": fast}
        for backend in scaled_mm_triton.BACKENDS:
            call = getattr(scaled_mm_triton, f"by_{backend}")
            row["parity"] = row.get("parity", True) and bool((call(*arguments).float() - truth).norm() <= 2 * rounding)
            if row["parity"]:
                row[f"{backend}_us"] = milliseconds(lambda call=call, arguments=arguments: call(*arguments)) * 1e3
        row["bf16_us"] = milliseconds(lambda a=a, b=b: a @ b.t()) * 1e3
        yield row


def environment() -> dict:
    git = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    return {"gpu": torch.cuda.get_device_name(), "commit": git.stdout.strip() or None, **versions}


def show(row: dict) -> str:
    if not row["parity"]:
        return f"{row['case']:58s} PARITY IS RED: no figure"
    if "us" in row:
        return f"{row['case']:58s} {row['us']:8.1f} us {row['TB/s']:6.2f} TB/s {row['of copy']:6.1%} of copy"
    tera = 2e-6 * row["m"] * row["n"] * row["k"]
    figures = [f"{name} {tera / row[name + '_us']:6.0f}" for name in ("triton", "cublaslt", "bf16")]
    return f"{row['case']:58s} TFLOP/s: {', '.join(figures)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--record", action="store_true", help="write scaled_mm_choice.json")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for row in itertools.chain(run_memory(bandwidth, options.only), run_products(options.only)):
        rows.append(row)
        print(show(row), flush=True)
    if options.json:
        result = {**environment(), "copy_bandwidth": bandwidth, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.record:
        wanted = ("gpu", "m", "n", "k", "fast_accum", "triton_us", "cublaslt_us")
        records = [
            {k: round(row[k], 1) if k.endswith("_us") else row[k] for k in wanted}
            for row in rows
            if "triton_us" in row and row["parity"]
        ]
        lines = ",\n ".join(json.dumps(record) for record in records)
        scaled_mm_triton.CHOICES.write_text(f"[\n {lines}\n]\n")


if __name__ == "__main__":
    main()

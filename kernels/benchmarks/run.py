"""Time the kernels against what the machine can do; a figure is printed only for a kernel that agrees with its
reference.

    python kernels/benchmarks/run.py [--only norm ...] [--json FILE] [--record]

Memory-bound kernels are compared with device copies measured in the same run, one of 2 GiB and one that moves as many
bytes as they do; matrix products with ``torch._scaled_mm`` and with BF16. ``--record`` writes the comparison of Triton
and cuBLASLt into scaled_mm_choice.json, from which ``coat_kernels.scaled_mm`` chooses. Needs a GPU.
"""

import argparse
import itertools
import json
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import coat_kernels as ck
import torch
import triton
from coat_kernels import scaled_mm_triton
from coat_kernels.activation import (
    activation_backward_ref,
    activation_ref,
    activation_transposed_ref,
    activation_values_ref,
)
from coat_kernels.formats import FP8_DTYPES
from coat_kernels.norm import norm_backward_ref, norm_ref, norm_transposed_ref, norm_values_ref
from coat_kernels.quantize import dequantize_ref, quantize_each_ref, quantize_ref, transpose_ref
from coat_kernels.rotary import rotary_ref

E4M3 = torch.float8_e4m3fn
TOKENS, HIDDEN, WIDE = 16384, 4096, 11008
GROUP, EPS = 128, 1e-6  # of what is kept, as the default recipe has it; of norms


@dataclass
class Case:
    """One memory-bound call: what it computes, the reference it must agree with, and the bytes it cannot do without.

    Args:
        name: What it is called.
        call: Without arguments.
        reference: Likewise; its results in the same order, an empty tensor where ``call`` returns None.
        reads: What ``call`` has to read, once for each time that it is named. It writes what it returns.
        exact: Whether values must be equal to the bit; else they come from sums in another order, or from functions
            that differ in the last bit, see ``APART``.
    """

    name: str
    call: Callable
    reference: Callable
    reads: tuple[torch.Tensor, ...]
    exact: bool = True

    def bytes(self, results: tuple[torch.Tensor | None, ...]) -> int:
        return sum(t.nbytes for t in (*self.reads, *results) if t is not None)


# How far apart, by their norm, two results of the same float32 arithmetic may be: in BF16 each is rounded by up to
# 2^-9; in float32 sums of up to 16384 terms lose sqrt(16384) * 2^-24 each.
APART = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-16}


def _random(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype)


def quantize_cases(device: str, tokens: int, hidden: int, wide: int) -> Iterator[Case]:
    for width in (hidden, wide):
        x = _random(tokens, width, device=device)
        recipes = {"token": ("token", 0, True), "group 32": ("group", 32, True), "tensor": ("tensor", 0, False)}
        for name, (granularity, group, pow2) in recipes.items():
            for transposed in (False, True) if granularity == "tensor" else (False,):
                options = dict(group_size=group, power_of_two=pow2, transposed=transposed)
                yield Case(
                    f"quantize {tokens} x {width} per {name}{' + transposed' if transposed else ''}",
                    partial(ck.quantize, x, E4M3, granularity, **options),
                    partial(quantize_ref, x, E4M3, granularity, group, pow2, None, True, transposed),
                    (x, x) if granularity == "tensor" else (x,),  # the amax of a tensor takes a pass of its own
                )
        amax = x.abs().amax().float()  # as the optimizer hands over that of a weight
        for transposed in (False, True):
            yield Case(
                f"quantize {tokens} x {width} per tensor{' + transposed' if transposed else ''}, amax given",
                partial(ck.quantize, x, E4M3, "tensor", power_of_two=False, transposed=transposed, amax=amax),
                partial(quantize_ref, x, E4M3, "tensor", 0, False, None, True, transposed),
                (x, amax),
            )
        scale = quantize_ref(x[:64], E4M3, "tensor", 0, True, None, True, False)[2] * 2
        yield Case(
            f"quantize {tokens} x {width} transposed, scale given",
            lambda x=x, s=scale: ck.quantize(x, E4M3, "tensor", scale=s, codes=False, transposed=True)[1],
            lambda x=x, s=scale: quantize_ref(x, E4M3, "tensor", 0, True, s, False, True)[1],
            (x, scale),
        )
        x_q, _, x_s = ck.quantize(x)
        yield Case(
            f"transpose {tokens} x {width}", partial(ck.transpose, x_q, x_s), partial(transpose_ref, x_q, x_s),
            (x_q, x_s),
        )  # fmt: skip
        yield Case(
            f"dequantize {tokens} x {width}", partial(ck.dequantize, x_q, x_s),
            partial(dequantize_ref, x_q, x_s, 0, torch.bfloat16), (x_q, x_s),
        )  # fmt: skip
    parts = [ck.quantize(_random(wide, hidden, device=device))[::2] for _ in range(2)]  # stored weights of gate and up
    x_q, x_s = [q for q, _ in parts], torch.cat([s for _, s in parts])
    yield Case(
        f"transpose 2 of {wide} x {hidden}", partial(ck.transpose, x_q, x_s), partial(transpose_ref, x_q, x_s),
        (*x_q, x_s),
    )  # fmt: skip
    parts = tuple(_random(wide, hidden, device=device) for _ in range(2))
    scale = _random(1, 1, device=device, dtype=torch.float32).abs()
    yield Case(
        f"quantize 2 of {wide} x {hidden} transposed, scale given",
        lambda x=parts, s=scale: ck.quantize(x, E4M3, "tensor", scale=s, codes=False, transposed=True)[1],
        lambda x=parts, s=scale: quantize_ref(x, E4M3, "tensor", 0, True, s, False, True)[1],
        (*parts, scale),
    )
    # The gradients of q, k and v, whose tokens share a scale; weights of q, k and v, of gate and up.
    for shape, many, dim in (((tokens, hidden), 3, 1), ((hidden, hidden), 3, 0), ((wide, hidden), 2, 0)):
        parts = tuple(_random(*shape, device=device) for _ in range(many))
        yield Case(
            f"quantize {many} of {shape[0]} x {shape[1]} as {'columns' if dim else 'rows'}",
            partial(ck.quantize, parts, dim=dim),
            partial(quantize_ref, parts, E4M3, "token", 0, True, None, True, False, torch.float32, dim),
            parts,
        )  # fmt: skip

    # What one of two processes has of the weights of a layer.
    shapes = [(hidden // 2, hidden)] * 4 + [(wide // 2, hidden)] * 2 + [(hidden // 2, wide)]
    parts = [_random(*shape, device=device) for shape in shapes]
    yield Case(
        f"quantize a layer of {hidden} and {wide}, half of each weight",
        partial(torch.ops.coat_kernels.quantize_each, parts), partial(quantize_each_ref, parts), parts,
    )  # fmt: skip


def norm_cases(device: str, tokens: int, width: int) -> Iterator[Case]:
    x, dy = _random(tokens, width, device=device), _random(tokens, width, device=device).flip(0)
    weight, bias = 1 + _random(width, device=device) / 8, _random(width, device=device)
    for name, center, b in (("norm", False, None), ("layer norm", True, bias)):
        affine = tuple(t for t in (weight, b) if t is not None)
        options = {"eps": EPS, "center": center, "round_first": not center}
        for codes in (False, True):
            yield Case(
                f"{name} {tokens} x {width}, input kept{' + codes' if codes else ''}",
                partial(ck.norm, x, weight, b, group_size=GROUP, codes=codes, **options),
                partial(
                    norm_ref, x, weight, b, EPS, center, 0.0, not center, x.dtype, GROUP, torch.uint8, codes
                ),
                (x, *affine), exact=False,
            )  # fmt: skip
        made = ck.norm(x, weight, b, group_size=GROUP, codes=True, **options)
        kept = (made.x_q, made.x_s, made.mean, made.rstd)

        def gradients(center=center, kept=kept):
            dx, sums = norm_backward_ref(dy, *kept, weight, 0.0, GROUP, x.dtype, True, center)
            return dx, sums[0], sums[1] if center else sums.new_empty(0)

        kept_tensors = tuple(t for t in kept if t is not None)
        yield Case(
            f"norm_backward of {name} {tokens} x {width}",
            partial(ck.norm_backward, dy, *kept, weight, group_size=GROUP, dx_dtype=x.dtype, bias=center),
            gradients, (dy, *kept_tensors, weight), exact=False,
        )  # fmt: skip
        scale = made.y_s.amax(dim=0, keepdim=True)
        yield Case(
            f"norm_transposed of {name} {tokens} x {width}",
            partial(ck.norm_transposed, *kept, weight, b, scale, group_size=GROUP),
            partial(norm_transposed_ref, *kept, weight, b, scale, 0.0, GROUP),
            (*kept_tensors, *affine, scale), exact=False,
        )  # fmt: skip
        yield Case(
            f"norm_values of {name} {tokens} x {width}",
            partial(ck.norm_values, *kept, weight, b, group_size=GROUP, dtype=x.dtype),
            partial(norm_values_ref, *kept, weight, b, 0.0, GROUP, x.dtype),
            (*kept_tensors, *affine), exact=False,
        )  # fmt: skip


def activation_cases(device: str, tokens: int, width: int) -> Iterator[Case]:
    gate, factor = _random(tokens, 2 * width, device=device).chunk(2, dim=1)  # as one product leaves them
    dh = _random(tokens, width, device=device)
    for name, act, up in (("silu, gated", "silu", factor), ("gelu_tanh", "gelu_tanh", None)):
        read = (gate,) if up is None else (gate, up)
        for codes in (False, True):
            yield Case(
                f"activation {tokens} x {width} {name}, {'codes' if codes else 'values'}",
                partial(ck.activation, gate, up, act=act, group_size=GROUP, values=not codes, codes=codes),
                partial(activation_ref, gate, up, act, GROUP, torch.uint8, not codes, codes),
                read, exact=False,
            )  # fmt: skip
        made = ck.activation(gate, up, act=act, group_size=GROUP, values=False, codes=True)
        kept, options = (made.kept_q, made.kept_s), {"act": act, "gated": up is not None, "group_size": GROUP}
        for codes in (False, True):
            yield Case(
                f"activation_backward {tokens} x {width} {name}, {'codes' if codes else 'values'}",
                partial(ck.activation_backward, dh, *kept, codes=codes, **options),
                partial(activation_backward_ref, dh, *kept, act, up is not None, GROUP, codes, E4M3, dh.dtype),
                (dh, *kept), exact=False,
            )  # fmt: skip
        scale = made.h_s.amax(dim=0, keepdim=True)
        yield Case(
            f"activation_transposed {tokens} x {width} {name}",
            partial(ck.activation_transposed, *kept, scale, **options),
            partial(activation_transposed_ref, *kept, scale, act, up is not None, GROUP),
            (*kept, scale), exact=False,
        )  # fmt: skip
        yield Case(
            f"activation_values {tokens} x {width} {name}",
            partial(ck.activation_values, *kept, dtype=dh.dtype, **options),
            partial(activation_values_ref, *kept, act, up is not None, GROUP, dh.dtype),
            kept, exact=False,
        )  # fmt: skip


def rotary_cases(device: str, tokens: int, hidden: int) -> Iterator[Case]:
    length, dim = min(tokens, 2048), min(hidden, 128)
    merged = _random(tokens // length, length, 3 * hidden, device=device)  # q, k and v of one product
    q, k, _ = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in merged.chunk(3, dim=2))
    angles = _random(1, length, dim // 2, device=device, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    for inverse in (False, True):
        yield Case(
            f"rotary {tokens} x 2 x {hidden}{', gradient' if inverse else ''}",
            partial(ck.rotary, q, k, cos, sin, inverse), partial(rotary_ref, q, k, cos, sin, inverse),
            (q, k, cos, sin), exact=False,
        )  # fmt: skip


def memory_cases(device: str = "cuda", tokens: int = TOKENS, hidden: int = HIDDEN, wide: int = WIDE) -> Iterator[Case]:
    yield from quantize_cases(device, tokens, hidden, wide)
    yield from norm_cases(device, tokens, hidden)
    yield from activation_cases(device, tokens, wide)
    yield from rotary_cases(device, tokens, hidden)


def agrees(actual: tuple[torch.Tensor | None, ...], expected: tuple[torch.Tensor, ...], exact: bool = True) -> bool:
    """Scales and values equal to the bit, or else values within ``APART``; codes may differ in one of a thousand
    places by one step."""
    for a, b in zip(actual, expected, strict=True):
        if a is None or a.numel() == 0 or b.numel() == 0:
            if (a is None or a.numel() == 0) != (b.numel() == 0):
                return False
        elif a.shape != b.shape or a.dtype != b.dtype:
            return False
        elif a.dtype in FP8_DTYPES:
            differ = a.float() != b.float()  # -0 equals 0
            steps = (a.view(torch.uint8).int() - b.view(torch.uint8).int()).abs()[differ]
            if differ.float().mean() > 1e-3 or (steps > 1).any():
                return False
        elif exact or not a.is_floating_point():  # E8M0 scales are bytes
            if not torch.equal(a, b):
                return False
        elif not (a.float() - b.float()).norm() <= APART[a.dtype] * b.float().norm():
            return False
    return True


def as_tuple(results: object) -> tuple:
    return results if isinstance(results, tuple) else (results,)


REPEATS = 40
ASLEEP = 30_000_000  # clock cycles, 15 to 20 ms: longer than the host needs to enqueue all repeats


def milliseconds(call: Callable) -> float:
    """Median time of a call on the GPU, each with an empty cache.

    The GPU sleeps until the host has enqueued all of them: what a small kernel takes must not be the time in which its
    host launches it.
    """
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(5):  # compile, load, tune, raise the clocks
        cache.zero_()
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    torch.cuda.synchronize()
    torch.cuda._sleep(ASLEEP)
    for start, end in events:
        cache.zero_()
        start.record()
        call()
        end.record()
    if events[0][0].query():
        raise RuntimeError(f"the GPU slept {ASLEEP} cycles, and the host had not enqueued {REPEATS} calls by then")
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_of(size: int) -> float:
    """Milliseconds of a device copy that reads and writes so many bytes together."""
    source = torch.randint(256, (size // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source))


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a 2 GiB device copy."""
    size = 2 * 2**31
    return size / (copy_of(size) * 1e-3)


def run_memory(bandwidth: float, only: list[str], cases: Iterable[Case]) -> Iterator[dict]:
    for case in cases:
        if not any(name in case.name for name in only):
            continue
        results = as_tuple(case.call())
        if not agrees(results, as_tuple(case.reference()), case.exact):
            yield {"case": case.name, "parity": False}
            continue
        ms = milliseconds(case.call)
        size = case.bytes(results)
        rate = size / (ms * 1e-3)
        yield {
            "case": case.name, "parity": True, "us": ms * 1e3, "TB/s": rate / 1e12, "of copy": rate / bandwidth,
            "of copy of this size": copy_of(size) / ms,
        }  # fmt: skip


def product_shapes() -> list[tuple[int, int, int, bool]]:
    """M, N, K and fast_accum of the three products of the linears of 1 B and 7 B models."""
    shapes = set()
    for tokens in (2048, 8192, 16384):
        for n, k in [(4096, 4096), (11008, 4096), (4096, 11008), (2048, 2048), (8192, 2048), (2048, 8192)]:
            shapes |= {(tokens, n, k, True), (tokens, k, n, False), (n, k, tokens, False)}
    return sorted(shapes)


def run_products(only: list[str]) -> Iterator[dict]:
    generator = torch.Generator("cuda").manual_seed(0)
    for m, n, k, fast in product_shapes():
        name = f"scaled_mm {m} x {n} x {k} {'fast' if fast else 'exact'}"
        if not any(part in name for part in only):
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
        return (
            f"{row['case']:58s} {row['us']:8.1f} us {row['TB/s']:6.2f} TB/s {row['of copy']:6.1%} of copy, "
            f"{row['of copy of this size']:6.1%} of one of this size"
        )
    tera = 2e-6 * row["m"] * row["n"] * row["k"]
    figures = [f"{name} {tera / row[name + '_us']:6.0f}" for name in ("triton", "cublaslt", "bf16")]
    return f"{row['case']:58s} TFLOP/s: {', '.join(figures)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="run the cases whose name contains one of these")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--record", action="store_true", help="write scaled_mm_choice.json")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for row in itertools.chain(run_memory(bandwidth, options.only, memory_cases()), run_products(options.only)):
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

"""COAT beside its peers, with a Llama-2-7B's sizes and random data, each peer in a process of its own.

    python benchmarks/peers.py layer [--trace]      one decoder layer, forward and backward
    python benchmarks/peers.py stack [--trace]      16 layers with embeddings, head and loss, forward and backward
    python benchmarks/peers.py step [--release]     the stock Trainer's full-parameter training of 32 layers
    python benchmarks/peers.py small                from which size on FP8 pays: BF16 and "lean" over tokens and widths
                                                    (with --json hf_coat/pays.json for what the library says of it)
    python benchmarks/peers.py shapes               lengths that change every step: how often Triton compiles

Every case takes ``--peers``, ``--attention cudnn``, ``--json FILE`` (written after each peer) and ``--tiny``: a model
that a CPU can run too. All parameters are BF16. Times are medians after a warm-up, spreads the largest minus the
smallest. Before each measured call the weights count as new, as after an optimizer's step. Activations are what the
allocator holds after a forward more than before it, without the layer's output. The floor is the time of the linears'
products at the rate that ``torch._scaled_mm`` reaches here, and of the attention by sdpa's fastest backend; in "stack"
and "step" with the head's products in BF16, in "step" with 10 bytes moved for each parameter's update. A peer that is
not installed is skipped, one that fails is recorded with what it said.
"""

import argparse
import gc
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from environment import environment, fresh_process
from peer_models import (
    LLAMA_2_7B,
    OURS,
    PEERS,
    TINY,
    Unavailable,
    attention,
    causal_lm,
    layers_of,
    llama_config,
    llama_size,
)
from timing import attention_ms, bf16_rate, copy_rate, fp8_rate, host_ms, synchronize, time_ms, trace
from torch import nn

PACKAGES = ("liger-kernel", "torchao", "transformer-engine", "fp8-coat")
VOCABULARY = 32000
SMALL_TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SMALL_HIDDEN = (1024, 2048, 4096)
UPDATE_BYTES = 10  # of a BF16 parameter: weight, gradient and two one-byte moments read, all but the gradient written
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clear(leaves: list[torch.Tensor]) -> None:
    """What a new step brings: no gradients, and weights that have changed."""
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.graph.increment_version(leaves)


def activation_bytes(forward: Callable, backward: Callable, leaves: list[torch.Tensor]) -> int | None:
    """Bytes alive after a forward more than before it, without the result; None without a GPU."""
    if DEVICE == "cpu":
        return None
    clear(leaves)
    gc.collect()
    before = torch.cuda.memory_allocated()
    result = forward()
    kept = torch.cuda.memory_allocated() - before - result.nbytes
    backward(result)
    return kept


def measure(forward: Callable, backward: Callable, leaves: list[torch.Tensor], options) -> dict:
    """Time, memory and, if asked for, the trace of a forward and backward."""

    def new_step():
        clear(leaves)

    def step():
        backward(forward())

    new_step()
    start = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - start
    for _ in range(2):  # autotuning and torch.compile may take more than one call
        new_step()
        step()
    activations = activation_bytes(forward, backward, leaves)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms, spread = time_ms(step, options.iterations, warmup=2, before=new_step)
    row = {
        "ms": ms,
        "spread_ms": spread,
        "host_ms": host_ms(step, before=new_step),
        "tokens_per_second": options.batch * options.length / (ms * 1e-3),
        "first_s": first,
        "activations_mib": None if activations is None else activations / 2**20,
        "peak_gib": peak_gib(),
    }
    if options.trace:
        row["trace"] = trace(step, options.layers, before=new_step)
    return row


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None


def random_ids(*shape: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, shape, device=DEVICE)


def through_layers(module: nn.Module, options, hidden: int) -> dict:
    """:func:`measure` of layers that map hidden states to hidden states."""
    x = torch.randn(options.batch, options.length, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    return measure(lambda: module(x), lambda y: y.backward(dy), [*module.parameters(), x], options)


def run_layer(name: str, options) -> dict:
    config = llama_config(options.size, 1, options.length, vocabulary=256)
    return through_layers(layers_of(name, config, options.length, DEVICE), options, config.hidden_size)


def run_stack(name: str, options) -> dict:
    config = llama_config(options.size, options.layers, options.length, options.vocabulary)
    model = causal_lm(name, config, DEVICE)
    ids = random_ids(options.batch, options.length, vocabulary=options.vocabulary)
    return measure(
        lambda: model(input_ids=ids, labels=ids).loss, lambda loss: loss.backward(), list(model.parameters()), options
    )


def run_step(name: str, options) -> dict:
    import transformers
    from peer_models import StepClock

    peer, kind, recipe = PEERS[name], transformers.TrainingArguments, {"optim": "adamw_torch_fused"}
    if peer.recipe:
        import hf_coat

        coat = hf_coat.HfCoatConfig.resolve(peer.recipe)
        coat = replace(coat, optimizer=replace(coat.optimizer, gradient_release=options.release))
        kind, recipe = hf_coat.TrainingArguments, {"coat": coat}
    config = llama_config(options.size, options.layers, options.length, options.vocabulary)
    model = causal_lm(name, config, DEVICE, compile=False)
    ids = random_ids(options.steps * options.batch, options.length, vocabulary=options.vocabulary).cpu()
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = kind(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch, learning_rate=1e-5,
            lr_scheduler_type="constant", max_grad_norm=1.0, bf16=True, logging_steps=options.steps,
            save_strategy="no", report_to=[], disable_tqdm=True, torch_compile=peer.compiled,
            use_cpu=DEVICE == "cpu", **recipe,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[clock])
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = trainer.train().training_loss
    steps, parameters = clock.figures(options.warmup), sum(p.numel() for p in model.parameters())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return {
        **steps,
        "tokens_per_second": options.batch * options.length / (steps["ms"] * 1e-3),
        "peak_gib": peak_gib(),
        "parameters": parameters,
        "state_bytes_per_parameter": sum(t.nbytes for t in states if torch.is_tensor(t)) / parameters,
        "train_loss": loss,
    }


def run_small(name: str, options) -> dict:
    """Milliseconds of one of the layers for each width and number of tokens, in sequences of at most 2048."""
    rows = []
    for hidden in options.hidden:
        longest = min(max(options.tokens), 2048)
        config = llama_config(llama_size(hidden), options.layers, longest, vocabulary=256)
        for tokens in options.tokens:
            options.length = min(tokens, longest)
            options.batch = tokens // options.length
            module = layers_of(name, config, options.length, DEVICE)
            row = through_layers(module, options, hidden)
            of_one = {key: row[key] / options.layers for key in ("ms", "spread_ms", "host_ms")}
            rows.append({"hidden": hidden, "tokens": tokens, **of_one})
    return {"rows": rows}


def run_shapes(name: str, options) -> dict:
    """A step at each of some random lengths, twice: what the first time costs, and what Triton compiles in it."""
    from triton import knobs

    compiled = []
    knobs.runtime.jit_post_compile_hook = lambda *, repr, **_: compiled.append(repr)
    config = llama_config(options.size, options.layers, options.length, options.vocabulary)
    model = causal_lm(name, config, DEVICE)
    generator = random.Random(0)
    lengths = generator.sample(range(options.length // 16, options.length + 1), options.steps)
    passes = []
    for _ in range(2):
        steps = []
        for length in lengths:
            ids = random_ids(options.batch, length, vocabulary=options.vocabulary)
            clear(list(model.parameters()))
            synchronize()
            start, known = time.perf_counter(), len(compiled)
            model(input_ids=ids, labels=ids).loss.backward()
            synchronize()
            ms = (time.perf_counter() - start) * 1e3
            steps.append({"length": length, "ms": ms, "compiled": len(compiled) - known})
        passes.append(steps)
    first, second = passes
    return {
        "ms": statistics.median(step["ms"] for step in second),
        "first_pass_s": sum(step["ms"] for step in first) / 1e3,
        "second_pass_s": sum(step["ms"] for step in second) / 1e3,
        "compiled_in_first_step": first[0]["compiled"],
        "compiled_in_later_steps": sum(step["compiled"] for step in first[1:]),
        "compiled_in_second_pass": sum(step["compiled"] for step in second),
        "compiled_later": sorted(compiled[first[0]["compiled"] :]),
        "steps": first,
    }


def floor(options) -> dict:
    """The least time that the case's arithmetic takes on this GPU, with all linears but the head in FP8."""
    hidden, wide, heads = (options.size[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    tokens = options.batch * options.length
    per_layer = 4 * hidden * hidden + 3 * hidden * wide
    fp8 = fp8_rate(tokens, wide, hidden)
    attentions = attention_ms(options.batch, heads, options.length, hidden // heads)
    row = {
        "linears_ms": options.layers * 6 * tokens * per_layer / fp8 * 1e3,
        "attention_ms": options.layers * min(attentions.values()),
    }
    rates = {"fp8_tflops": fp8 / 1e12, **{f"{name}_attention_ms": ms for name, ms in attentions.items()}}
    if options.case != "layer":
        rate = bf16_rate(tokens, options.vocabulary, hidden)
        row["head_ms"] = 6 * tokens * options.vocabulary * hidden / rate * 1e3
        rates["bf16_tflops"] = rate / 1e12
    if options.case == "step":
        parameters = options.layers * per_layer + 2 * options.vocabulary * hidden
        bandwidth = copy_rate()
        row["update_ms"] = UPDATE_BYTES * parameters / bandwidth * 1e3
        rates["copy_tb_per_s"] = bandwidth / 1e12
    ms = sum(row.values())
    return {"ms": ms, "tokens_per_second": tokens / (ms * 1e-3), **row, **rates}


@dataclass(frozen=True)
class Case:
    """A case's function and the defaults of its options; ``tiny`` replaces some of them."""

    run: Callable
    peers: tuple[str, ...]
    batch: int
    length: int
    layers: int
    tiny: dict
    iterations: int = 10
    steps: int = 0
    warmup: int = 0
    floor: bool = True


CASES = {
    "layer": Case(
        run_layer, ("bf16", "bf16-compile", "liger", "torchao", "te", "nvcoat", "lean", "lean-attention", "paper"),
        batch=8, length=2048, layers=1, iterations=20, tiny={"batch": 2, "length": 16, "iterations": 2},
    ),
    "stack": Case(
        run_stack, ("bf16", "bf16-compile", "liger", "torchao", "lean", "lean-attention-3", "lean-attention", "paper"),
        batch=4, length=2048, layers=16, tiny={"batch": 2, "length": 16, "layers": 2, "iterations": 2},
    ),
    "step": Case(
        run_step, ("bf16", "liger", "lean", "lean-attention", "paper"), batch=4, length=2048, layers=32, steps=12,
        warmup=4,
        tiny={"batch": 2, "length": 16, "layers": 2, "steps": 4, "warmup": 2},
    ),
    "small": Case(
        run_small, ("bf16", "lean"), batch=0, length=0, layers=4, floor=False,
        tiny={"layers": 1, "iterations": 1},
    ),
    "shapes": Case(
        run_shapes, ("bf16", "lean", "paper"), batch=2, length=2048, layers=4, steps=24, floor=False,
        tiny={"layers": 1, "length": 64, "steps": 3},
    ),
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="run these instead of the case's own list")
    parser.add_argument(
        "--attention", choices=("default", "cudnn"),
        help='sdpa\'s backend for all but COAT, which chooses its own, and TransformerEngine; by default torch\'s '
        'choice, and in "layer" bf16 with cuDNN\'s as well',
    )  # fmt: skip
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, help='steps of "step" (--warmup of them not counted) and "shapes"')
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--iterations", type=int, help="measured calls in the other cases")
    parser.add_argument("--trace", action="store_true", help='trace three calls in "layer" and "stack"')
    parser.add_argument("--release", action="store_true", help='COAT in "step" with gradient release')
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a peer may take")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--peer", help="run this peer in this process and write only its row: what the others are for")
    options = parser.parse_args(arguments)
    case = CASES[options.case]
    if options.trace and (DEVICE == "cpu" or options.case not in ("layer", "stack")):
        parser.error('--trace needs a GPU and is for "layer" and "stack"')
    if not options.tiny and DEVICE == "cpu":
        parser.error("these sizes need a GPU; --tiny runs on a CPU too")
    for key in ("batch", "length", "layers", "steps", "warmup", "iterations"):
        if getattr(options, key) is None:
            default = getattr(case, key)
            setattr(options, key, case.tiny.get(key, default) if options.tiny else default)
    options.size = TINY if options.tiny else LLAMA_2_7B
    if options.case == "shapes" and not options.tiny:
        options.size = llama_size(1024)
    elif options.case == "small":
        options.size = None
    options.vocabulary = 256 if options.tiny else VOCABULARY
    options.tokens, options.hidden = ((64,), (128,)) if options.tiny else (SMALL_TOKENS, SMALL_HIDDEN)
    return options


def plan(options) -> Iterator[tuple[str, str]]:
    """The peers to run, each with its attention backend, and the floor last."""
    case = CASES[options.case]
    for name in options.peers or case.peers:
        if DEVICE == "cpu" and not options.peers and name not in ("bf16", *OURS):
            continue
        own = name in OURS or name == "te"
        yield name, "own" if own else options.attention or "default"
        if name == "bf16" and options.attention is None and options.case == "layer" and DEVICE == "cuda":
            yield name, "cudnn"
    if case.floor and DEVICE == "cuda":
        yield "floor", "fastest"


def run_peer(options) -> dict:
    """One peer's row, in this process."""
    torch.manual_seed(0)
    if options.peer == "floor":
        return floor(options)
    try:
        with attention(options.attention or "default"):
            return CASES[options.case].run(options.peer, options)
    except Unavailable as reason:
        return {"skipped": str(reason)}


def pays(rows: list[dict]) -> dict:
    """The peers of "small" side by side, ``{hidden, tokens, bf16_ms, lean_ms, ...}``; apart, those without times."""
    table = {}
    for row in rows:
        for cell in row.get("rows", ()):
            entry = table.setdefault((cell["hidden"], cell["tokens"]), {k: cell[k] for k in ("hidden", "tokens")})
            entry |= {f"{row['peer']}_{key}": round(cell[key], 4) for key in ("ms", "host_ms")}
    return {"rows": [table[key] for key in sorted(table)], "missing": [row for row in rows if "rows" not in row]}


def show(row: dict, base: dict) -> str:
    """A row as a line of text, its time and memory beside those of ``base``."""
    name = f"{row['peer']:14s} {row['attention']:8s}"
    for problem in ("skipped", "error"):
        if problem in row:
            return f"{name} {problem}: {row[problem].strip().splitlines()[-1]}"
    if "ms" not in row:
        return f"{name} " + ", ".join(f"{c['hidden']} x {c['tokens']}: {c['ms']:.3f} ms" for c in row["rows"])
    parts = [f"{row['ms']:8.2f} ms"]
    if "spread_ms" in row:
        parts[0] += f" +-{row['spread_ms'] / 2:.2f}"
    if "ms" in base:
        parts.append(f"{base['ms'] / row['ms']:.2f}x")
    if row.get("tokens_per_second"):
        parts.append(f"{row['tokens_per_second']:.0f} tok/s")
    if row.get("activations_mib"):
        parts.append(f"keeps {row['activations_mib']:.0f} MiB")
    if row.get("peak_gib"):
        parts.append(f"peak {row['peak_gib']:.1f} GiB")
    if "host_ms" in row:
        parts.append(f"host {row['host_ms']:.1f} ms")
    if "compiled_in_first_step" in row:
        parts.append(
            f"compiled {row['compiled_in_first_step']} in the first step, {row['compiled_in_later_steps']} later, "
            f"{row['first_pass_s']:.1f} s and again {row['second_pass_s']:.1f} s"
        )
    if "trace" in row:
        t = row["trace"]
        parts.append(
            f"GPU busy {t['busy']:.1%}, waits {t['waiting_ms']:.2f} ms, {t['launches_per_layer']:.0f} launches a layer"
        )
    return f"{name} {', '.join(parts)}"


def main() -> None:
    options = parse()
    if options.peer:
        options.json.write_text(json.dumps(run_peer(options)))
        return
    about = {key: getattr(options, key) for key in ("case", "size", "batch", "length", "layers", "steps", "warmup")}
    command = shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    about = {"command": command} | {key: value for key, value in about.items() if value}
    result, rows = environment(*PACKAGES) | about, []
    for name, backend in plan(options):
        passed = [*sys.argv[1:], "--peer", name, "--attention", "cudnn" if backend == "cudnn" else "default"]
        row = fresh_process(__file__, *passed, timeout=options.timeout)
        rows.append({"peer": name, "attention": backend} | row)
        print(show(rows[-1], rows[0]), flush=True)
        result |= pays(rows) if options.case == "small" else {"rows": rows}
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

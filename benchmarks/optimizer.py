"""An optimizer step of 1.62 B BF16 parameters in 72 tensors (8 layers of a Llama-2-7B), COAT beside its peers.

    python benchmarks/optimizer.py [--peers NAME ...] [--json FILE] [--tiny]
    python benchmarks/optimizer.py --tune [--peers lean paper] [--json FILE]

Each peer runs in a process of its own. Times are medians of ``--iterations`` steps after a warm-up, spreads the
largest minus the smallest; ``host_ms`` is the time until step() returns. The floor is the time in which the device
copies the bytes that the peer must move: gradient in, parameter and states in and out. ``--tune`` times our kernel
under other sizes of tiles and programs. ``--tiny`` takes small tensors, on the CPU too. A peer that is not installed
is skipped, one that fails is recorded with what it said.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from environment import environment, fresh_process
from timing import copy_rate, host_ms, time_ms

from hf_coat.functional.amax import ask_amax
from hf_coat.optim import CoatAdamW, CoatLion

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("bitsandbytes", "torchao")
LR = 1e-5
TUNED = {
    "tile": (256, 512, 1024, 2048),
    "stages": (1, 2, 3),
    "halves": (False, True),
    "WARPS": (1, 2, 4),
    "TILES": (4, 16, 64),
}
VALUES_PER_THREAD = (8, 16)


def shapes(tiny: bool) -> list[tuple[int, ...]]:
    hidden, wide, layers = (64, 176, 2) if tiny else (4096, 11008, 8)
    layer = [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)] + [(hidden,)] * 2
    return layer * layers


def coat(**options) -> Callable:
    return lambda params: CoatAdamW(params, lr=LR, **options)


def with_amax(make: Callable) -> Callable:
    """Linears with a scale per tensor ask before each step for the amax of each matrix, as their forwards would."""

    def making(params):
        optimizer = make(params)

        def ask(*_):
            for p in params:
                if p.dim() == 2:
                    ask_amax(p)

        optimizer.register_step_pre_hook(ask)
        return optimizer

    return making


def bitsandbytes(params):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=LR)


def torchao(name: str, **options) -> Callable:
    def make(params):
        import torchao.optim

        return getattr(torchao.optim, name)(params, lr=LR, **options)

    return make


PEERS = {
    "torch-fused": lambda params: torch.optim.AdamW(params, lr=LR, fused=True),
    "torch-foreach": lambda params: torch.optim.AdamW(params, lr=LR, foreach=True),
    "bitsandbytes": bitsandbytes,
    "lean": coat(),
    "lean-nearest": coat(weights="nearest"),
    "lean-master": coat(weights="master"),
    "paper": coat(format="paper", weights="nearest"),
    "paper-stochastic": coat(format="paper"),
    "lean-amax": with_amax(coat()),
    "paper-amax": with_amax(coat(format="paper", weights="nearest")),
    "e4m3": coat(format="e4m3", weights="nearest"),
    "lion": lambda params: CoatLion(params, lr=LR),
    # They compile a step for each shape, for a minute or more: last, where a limit of time cuts nothing else off.
    "torchao-8bit": torchao("AdamW8bit"),
    "torchao-fp8": torchao("AdamWFp8"),
    "torchao-fp8-stochastic": torchao("AdamWFp8", bf16_stochastic_round=True),
}
OURS = [name for name in PEERS if name.split("-")[0] in ("lean", "paper", "e4m3", "lion")]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the states, those inside a tensor subclass or a shared table once."""
    seen = {}

    def add(t):
        if hasattr(t, "__tensor_flatten__"):
            for name in t.__tensor_flatten__()[0]:
                add(getattr(t, name))
        elif isinstance(t, torch.Tensor):
            seen[t.data_ptr(), t.shape] = t.nbytes

    for state in optimizer.state.values():
        for value in state.values():
            add(value)
    return sum(seen.values())


def parameters(tiny: bool) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE, dtype=torch.bfloat16) * 0.02) for s in shapes(tiny)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def run_peer(options) -> dict:
    params = parameters(options.tiny)
    count = sum(p.numel() for p in params)
    try:
        optimizer = PEERS[options.peer](params)
    except ModuleNotFoundError as error:
        return {"skipped": str(error)}
    ms, spread = time_ms(optimizer.step, options.iterations, warmup=options.warmup)
    states = state_bytes(optimizer)
    gradient_and_weights = 3 * params[0].element_size() * count
    row = {
        "ms": ms,
        "spread_ms": spread,
        "ms_per_billion": ms * 1e9 / count,
        "host_ms": host_ms(optimizer.step),
        "state_bytes_per_parameter": states / count,
    }
    if DEVICE == "cuda":
        row["floor_ms_per_billion"] = (gradient_and_weights + 2 * states) / copy_rate() * 1e3 * 1e9 / count
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def tune(options) -> list[dict]:
    """Milliseconds per billion parameters of our kernel under each setting, fastest first."""
    from coat_kernels import states_triton

    rows, params = [], parameters(options.tiny)
    count = sum(p.numel() for p in params)
    for name in options.peers or ("lean", "lean-nearest", "lean-master", "paper"):
        optimizer = PEERS[name](params)
        for values in itertools.product(*TUNED.values()):
            setting = dict(zip(TUNED, values, strict=True))
            if setting["tile"] // (32 * setting["WARPS"]) not in VALUES_PER_THREAD:
                continue
            if setting["TILES"] < setting["stages"]:
                continue
            states_triton.CUTS[optimizer.param_groups[0]["format"]] = states_triton.Cut(*values[:3])
            states_triton.WARPS, states_triton.TILES = values[3:]
            ms, spread = time_ms(optimizer.step, options.iterations, warmup=2)
            rows.append({"peer": name, **setting, "ms_per_billion": ms * 1e9 / count, "spread_ms": spread})
        of_peer = sorted((row for row in rows if row["peer"] == name), key=lambda row: row["ms_per_billion"])
        for row in of_peer[:8]:
            print(
                {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
        del optimizer
    return sorted(rows, key=lambda row: (row["peer"], row["ms_per_billion"]))


def show(row: dict) -> str:
    name = f"{row['peer']:24s}"
    for problem in ("skipped", "error"):
        if problem in row:
            return f"{name} {problem}: {row[problem].strip().splitlines()[-1]}"
    floor = f", floor {row['floor_ms_per_billion']:.2f}" if "floor_ms_per_billion" in row else ""
    return (
        f"{name} {row['ms_per_billion']:7.2f} ms per billion parameters{floor}, host {row['host_ms']:.2f} ms, "
        f"{row['state_bytes_per_parameter']:.3f} bytes of state per parameter"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a peer may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", help="run this peer in this process and write only its row: what the others are for")
    options = parser.parse_args()
    if not options.tiny and DEVICE == "cpu":
        parser.error("these sizes need a GPU; --tiny runs on a CPU too")
    if options.tune and DEVICE == "cpu":
        parser.error("--tune needs a GPU")
    if options.peer:
        options.json.write_text(json.dumps(run_peer(options)))
        return
    about = environment(*PACKAGES) | {"parameters": sum(torch.Size(s).numel() for s in shapes(options.tiny))}
    if options.tune:
        result = about | {"rows": tune(options)}
    else:
        result = about | {"rows": []}
        for name in options.peers or (PEERS if DEVICE == "cuda" else ["torch-foreach", *OURS]):
            row = fresh_process(__file__, *sys.argv[1:], "--peer", name, timeout=options.timeout)
            result["rows"].append({"peer": name} | row)
            print(show(result["rows"][-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

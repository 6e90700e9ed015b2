"""Full-parameter training of a Llama-2-7B's sizes on several GPUs of one host: the stock Trainer under DDP and FSDP2.

    python benchmarks/sharded.py [--gpus 2] [--layers 32] [--peers ...] [--json FILE] [--tiny]
        [--bucket-cap-mb N] [--environment NCCL_MAX_CTAS=8 ...]

One command starts everything; each peer is a fresh group of processes, and those on one GPU are what the others scale
from. Parameters are BF16 and there is no autocast, so that all peers reduce and gather BF16 (with ``bf16=True``
accelerate would turn the parameters into FP32 ones under FSDP2, and only there). torchao's parameters cannot pass
through accelerate, so it is trained by a plain loop that takes the same steps: forward, backward, clipping, fused
AdamW. Times are medians of steps after a warm-up, on the first GPU; memory is that of the fullest one. The bytes of
FSDP2's collectives are those of one more step, summed up from the shapes in its torch.profiler trace: what one GPU
puts into them. What is said of DDP's buckets and of the environment (NCCL's settings) is said to all peers. ``--tiny``
runs a tiny model in two gloo processes on a CPU.
"""

import argparse
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from environment import environment as about_here
from peer_models import LLAMA_2_7B, TINY, StepClock, Unavailable, in_bf16, llama_config
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# FSDP2's collectives by their operators, whose second input is what this process puts in.
COLLECTIVES = {"c10d::_allgather_base_": "all_gather", "c10d::_reduce_scatter_base_": "reduce_scatter"}
ITEM_SIZES = {"c10::BFloat16": 2, "float": 4, "unsigned char": 1, "c10::Float8_e4m3fn": 1, "signed char": 1}


@dataclass(frozen=True)
class Peer:
    """One way to train.

    Args:
        recipe: What ``TrainingArguments(coat=...)`` is; None for BF16 with torch's fused AdamW.
        parallel: None on one GPU, ``"ddp"`` or ``"fsdp2"``.
        base: The peer on one GPU that it scales from.
        run: What trains it, from the peer and the options; None for the stock Trainer.
    """

    recipe: str | dict | None = None
    parallel: str | None = None
    base: str | None = None
    run: Callable | None = None


def through_trainer(peer: Peer, options) -> dict:
    """The times, memory and bytes of the stock Trainer."""
    import transformers

    kind, recipe = transformers.TrainingArguments, {"optim": "adamw_torch_fused"}
    if peer.recipe is not None:
        import hf_coat

        kind, recipe = hf_coat.TrainingArguments, {"coat": peer.recipe}
    if peer.parallel == "ddp":
        recipe |= {"ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": options.bucket_cap_mb}
    if peer.parallel == "fsdp2":
        recipe |= {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
        if DEVICE == "cpu":
            shard_on_cpu()
            recipe["accelerator_config"] = {"use_configured_state": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = kind(
            output_dir=folder, max_steps=options.steps + 1, per_device_train_batch_size=options.batch,
            learning_rate=1e-5, lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=options.steps + 1,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=DEVICE == "cpu",
            dataloader_pin_memory=DEVICE == "cuda", **recipe,
        )  # fmt: skip
        model = llama(options)
        world = arguments.world_size
        if world != (options.gpus if peer.parallel else 1):
            raise RuntimeError(f"{world} processes take part, {options.gpus if peer.parallel else 1} were started")
        count = (options.steps + 1) * options.batch * world
        ids = torch.randint(options.vocabulary, (count, options.length), generator=torch.Generator().manual_seed(0))
        clock, traced = StepClock(), TracedStep(options.steps + 1)
        trainer = Trainer(
            model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[clock, traced],
        )  # fmt: skip
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = True  # for all peers, as for those with COAT
        reset_peak()
        loss = trainer.train().training_loss
    return figures(clock, traced.profiler, trainer.model, loss, options)


def torchao_fsdp2(peer: Peer, options) -> dict:
    """The same of torchao's float8 with scales per tensor, compiled by layers; FSDP2 gathers its weights in float8."""
    try:
        from torchao.float8 import (
            Float8LinearConfig,
            convert_to_float8_training,
            precompute_float8_dynamic_scale_for_fsdp,
        )
    except ImportError:
        raise Unavailable("torchao is not installed") from None
    from torch.distributed.fsdp import fully_shard

    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    model = llama(options)
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=DEVICE == "cpu")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "lm_head" not in name)
    for layer in model.model.layers:
        if DEVICE == "cuda":
            layer.compile()
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(dist.get_rank())
    clock, traced = StepClock(), TracedStep(options.steps + 1)
    reset_peak()
    losses = []
    for step in range(options.steps + 1):
        if step == options.steps:
            traced.start()
        ids = torch.randint(options.vocabulary, (options.batch, options.length), generator=generator).to(DEVICE)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        precompute_float8_dynamic_scale_for_fsdp(model)
        optimizer.zero_grad()
        losses.append(loss.detach())
        clock.on_step_end(None, None, None)
    traced.stop()
    return figures(clock, traced.profiler, model, torch.stack(losses).mean().item(), options)


PEERS = {
    "bf16": Peer(),
    "lean": Peer("lean"),
    "bf16-ddp": Peer(None, "ddp", "bf16"),
    "lean-ddp": Peer("lean", "ddp", "lean"),
    "bf16-fsdp2": Peer(None, "fsdp2", "bf16"),
    "lean-fsdp2": Peer("lean", "fsdp2", "lean"),
    "lean-fsdp2-values": Peer({"model": {"fsdp_all_gather": "bf16"}}, "fsdp2", "lean"),  # gathered as BF16 has them
    "torchao-fsdp2": Peer(None, "fsdp2", run=torchao_fsdp2),
}


class TracedStep(TrainerCallback):
    """The operators of one step of a training, with their shapes."""

    def __init__(self, step: int):
        self.step = step
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def start(self) -> None:
        self.profiler.start()

    def stop(self) -> None:
        self.profiler.stop()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.stop()


def collectives(profiler: profile) -> dict[str, int]:
    """The bytes that this process put into the collectives of a trace, by kind of collective."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    total = Counter()
    for event in events:
        if event.get("name") not in COLLECTIVES:
            continue
        shape, dtype = (event["args"][key][1] for key in ("Input Dims", "Input type"))
        total[COLLECTIVES[event["name"]]] += math.prod(shape) * ITEM_SIZES[dtype]
    return dict(total)


def figures(clock: StepClock, profiler: profile, model: nn.Module, loss: float, options) -> dict:
    """A peer's row."""
    steps = clock.figures(options.warmup, traced=1)
    return {
        **steps,
        "tokens_per_second_per_gpu": options.batch * options.length / (steps["ms"] * 1e-3),
        "peak_gib": fullest_gib(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_in_collectives": collectives(profiler),
        "train_loss": loss,
    }


def reset_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def fullest_gib() -> float | None:
    """The peak memory of the GPU that has the highest one; None without a GPU."""
    if DEVICE == "cpu":
        return None
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30, device=DEVICE)
    if dist.is_initialized():
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    return peak.item()


def llama(options) -> LlamaForCausalLM:
    """The same model on every process."""
    torch.manual_seed(0)
    config = llama_config(options.size, options.layers, options.length, options.vocabulary)
    return in_bf16(lambda: LlamaForCausalLM(config), DEVICE).train()


def shard_on_cpu() -> None:
    """Let accelerate shard on a CPU too, which it does on accelerators only: it takes the two processes for GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def run_peer(options) -> None:
    """One peer in this process; the first process writes its row."""
    peer = PEERS[options.peer]
    try:
        row = (peer.run or through_trainer)(peer, options)
    except Unavailable as reason:
        row = {"skipped": str(reason)}
    if int(os.environ.get("RANK", 0)) == 0:
        options.json.write_text(json.dumps(row))
    if dist.is_initialized():
        dist.destroy_process_group()


def start_peer(name: str, options) -> dict:
    """The row of a peer, from processes of its own."""
    start, count = time.perf_counter(), options.gpus if PEERS[name].parallel else 1
    if count == 1:
        # the only GPU that it sees, or Trainer would take the others as well
        here = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        places = [{"CUDA_VISIBLE_DEVICES": here}]
    else:
        group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
        if DEVICE == "cpu":
            group["GLOO_SOCKET_IFNAME"] = "lo"
        places = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return run_group(name, places, options.environment, options.timeout) | {"total_s": time.perf_counter() - start}


def run_group(name: str, places: list[dict[str, str]], settings: dict[str, str], timeout: float) -> dict:
    """What the first of the processes wrote, one in each place; once one has failed the others are ended."""
    with tempfile.TemporaryDirectory() as folder:
        result, runs, logs = Path(folder, "result.json"), [], []
        command = [sys.executable, __file__, *sys.argv[1:], "--peer", name, "--json", str(result)]
        try:
            for rank, place in enumerate(places):
                logs.append(Path(folder, f"log-{rank}"))
                with logs[-1].open("w") as log:
                    environment = os.environ | settings | place
                    runs.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            end = time.monotonic() + timeout
            while any(run.poll() is None for run in runs) and not any(run.poll() for run in runs):
                if time.monotonic() > end:
                    return {"error": f"not done after {timeout:g} s"}
                time.sleep(0.1)
            for run, log in zip(runs, logs, strict=True):
                if run.poll():
                    said = log.read_text().strip().splitlines()
                    return {"error": "\n".join([f"exit status {run.returncode}", *said[-25:]])}
            return json.loads(result.read_text())
        finally:
            for run in runs:
                run.kill()
                run.wait()


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def show(row: dict, bf16_gather: int | None) -> str:
    """A row as a line of text."""
    name = f"{row['peer']:18s}"
    for problem in ("skipped", "error"):
        if problem in row:
            return f"{name} {problem}: {row[problem].strip().splitlines()[-1]}"
    parts = [f"{row['ms']:8.2f} ms +-{row['spread_ms'] / 2:.2f}", f"{row['tokens_per_second_per_gpu']:.0f} tok/s/GPU"]
    if "efficiency" in row:
        parts.append(f"{row['efficiency']:.3f} of one GPU")
    if row["peak_gib"] is not None:
        parts.append(f"peak {row['peak_gib']:.1f} GiB")
    for kind, size in row["bytes_in_collectives"].items():
        beside = f" ({size / bf16_gather:.2f} of BF16's)" if kind == "all_gather" and bf16_gather else ""
        parts.append(f"{kind} {size / 2**30:.3g} GiB{beside}")
    return f"{name} {', '.join(parts)}"


def setting(text: str) -> tuple[str, str]:
    """``NAME=VALUE``."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--batch", type=int, help="sequences on each GPU; 4 by default")
    parser.add_argument("--length", type=int, help="tokens of a sequence; 2048 by default")
    parser.add_argument("--layers", type=int, help="32 by default")
    parser.add_argument("--steps", type=int, help="12 by default, and one more that is traced")
    parser.add_argument("--warmup", type=int, help="how many of them are not counted; 4 by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that a peer may take")
    parser.add_argument("--bucket-cap-mb", type=int, help="of DDP's buckets; torch's default is 25")
    parser.add_argument(
        "--environment", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="that all peers run in"
    )
    parser.add_argument("--json", type=Path, help="write the figures here, after each peer")
    parser.add_argument("--peer", choices=PEERS, help="run this peer in this process: what the others are for")
    options = parser.parse_args()
    options.environment = dict(options.environment)
    if not options.tiny and torch.cuda.device_count() < options.gpus and not options.peer:
        parser.error(f"{options.gpus} GPUs are needed, {torch.cuda.device_count()} are here; --tiny runs on a CPU")
    sizes = {"batch": (4, 2), "length": (2048, 16), "layers": (32, 2), "steps": (12, 3), "warmup": (4, 2)}
    for key, (full, tiny) in sizes.items():
        if getattr(options, key) is None:
            setattr(options, key, tiny if options.tiny else full)
    options.size, options.vocabulary = (TINY, 256) if options.tiny else (LLAMA_2_7B, 32000)
    return options


def main() -> None:
    options = parse()
    if options.peer:
        run_peer(options)
        return
    keys = ("gpus", "batch", "length", "layers", "steps", "warmup", "size", "bucket_cap_mb", "environment")
    about = {key: getattr(options, key) for key in keys}
    command = shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    result, rows = about_here("accelerate", "torchao") | {"command": command} | about, {}
    for name in options.peers:
        rows[name] = row = {"peer": name} | start_peer(name, options)
        base = rows.get(PEERS[name].base, {})
        if "ms" in row and "ms" in base:
            row["efficiency"] = row["tokens_per_second_per_gpu"] / base["tokens_per_second_per_gpu"]
        plain = rows.get("bf16-fsdp2", {}).get("bytes_in_collectives", {})
        print(show(row, plain.get("all_gather")), flush=True)
        if options.json:
            options.json.write_text(json.dumps(result | {"rows": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()

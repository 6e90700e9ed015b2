"""FSDP2 with the codes of converted linears' weights gathered, and with their values, in the same run.

    torchrun --nproc-per-node 2 benchmarks/fsdp_gather.py [--layers 4] [--steps 8] [--json FILE] [--tiny]

``gathered`` are the bytes that a process gives to the all-gathers of a step, ``all_gather_ms`` the time of NCCL's
kernels for them in one profiled step, ``ms`` the mean step and ``peak`` the most memory of the first GPU. Weights are
BF16, or FP32 under FSDP2's mixed precision, as accelerate has them. ``--tiny`` takes a tiny model and gloo, on the
CPU.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from timing import synchronize
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_coat import CoatAdamW, CoatConfig, apply_coat

SHAPE = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
TINY = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
BF16_COMPUTE = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES = [(gather, weights) for weights in ("bfloat16", "float32") for gather in ("bf16", "fp8")]


class Counted(DefaultAllGather):
    """FSDP2's all-gather, that counts the bytes which this process gives."""

    bytes = 0

    def __call__(self, output_tensor, input_tensor, *args, **kwargs):
        self.bytes += input_tensor.nbytes
        return super().__call__(output_tensor, input_tensor, *args, **kwargs)


def measure(gather: str, weights: str, options, device: torch.device) -> dict:
    """Train a model of a few layers; what it took."""
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if options.tiny else SHAPE), num_hidden_layers=options.layers)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, weights))
    report = apply_coat(model, CoatConfig(fsdp_all_gather=gather))
    policy = {"mp_policy": BF16_COMPUTE} if weights == "float32" else {}
    counted = Counted()
    for layer in model.model.layers:
        fully_shard(layer, **policy)
        layer.set_custom_all_gather(counted)
    fully_shard(model, **policy)
    optimizer = CoatAdamW(model.parameters(), lr=1e-4)
    cuda = device.type == "cuda"
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (2, 16) if options.tiny else (options.batch, 2048)
    ids = torch.randint(config.vocab_size, shape, generator=generator).to(device)  # the same in every step

    def step() -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses = [step() for _ in range(3)]
    synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    counted.bytes, begin = 0, time.perf_counter()
    losses += [step() for _ in range(options.steps)]
    synchronize()
    row = {
        "ms": (time.perf_counter() - begin) * 1e3 / options.steps,
        "gathered": counted.bytes / options.steps,
        "losses": [loss.item() for loss in losses],
        "report": report.gathered,
    }
    if cuda:
        row["peak"] = torch.cuda.max_memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
        kernels = [e for e in profile.key_averages() if "AllGather" in e.key]
        row["all_gather_ms"] = sum(e.self_device_time_total for e in kernels) / 1e3
        row["all_gathers"] = sum(e.count for e in kernels)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("these sizes need GPUs; --tiny runs on a CPU too")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rows = []
    for gather, weights in CASES:
        rows.append({"peer": f"{gather} gathered, {weights} weights", **measure(gather, weights, options, device)})
        if cuda:
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "report"}), flush=True)
    for values, codes in zip(rows[::2], rows[1::2], strict=True):
        worst = max(abs(a - b) / a for a, b in zip(values["losses"], codes["losses"], strict=True))
        if worst > 0.02:
            sys.exit(f"{codes['peer']}: losses {codes['losses']} are not those of gathered values, {values['losses']}")
    if dist.get_rank() == 0 and options.json:
        options.json.write_text(json.dumps({"world_size": dist.get_world_size(), "rows": rows}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""LoRA of rank 16 on all linears of a Llama-2-7B shape, each way to hold the frozen base in a process of its own.

    python benchmarks/lora.py [--json FILE]         forward and backward of 4 x 2048 tokens, and the optimizer's step

``bf16`` is PEFT on a BF16 base, ``liger`` the same with Liger's kernels; ``int8`` (LLM.int8) and ``nf4`` are PEFT on
bitsandbytes' linears, ``nf4-kbit`` is NF4 as PEFT's documentation prepares it, by ``prepare_model_for_kbit_training``
with its defaults, gradient checkpointing among them; ``lean`` is PEFT on a base that COAT stores as FP8. The adapters
are what PEFT makes by default, in FP32 under BF16 autocast, as in a Trainer with ``bf16=True``; AdamW is torch's fused
one for all of them. Weights are random. Times, spreads, activations and peaks
are those of peers.py; a peer that is not installed is skipped, one that fails or takes longer than ``--timeout`` is
recorded with what it said. ``losses`` are those of steps on the same random tokens; lora_losses.py has real ones.

    base bytes per weight   what the wrapped linears hold beside their adapters, over the number of their weights
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from environment import environment, fresh_process
from peer_models import LLAMA_2_7B, TINY, Unavailable, _need, causal_lm, llama_config
from peers import DEVICE, VOCABULARY, activation_bytes, peak_gib, random_ids, show
from timing import time_ms
from torch import nn
from transformers import PreTrainedModel

PEERS = ("bf16", "liger", "int8", "nf4", "nf4-kbit", "lean")
PACKAGES = ("peft", "bitsandbytes", "liger-kernel")


def quantized(model: nn.Module, kind: str) -> None:
    """Put bitsandbytes' linears in the place of all but the head, as its quantizer of transformers does."""
    _need("bitsandbytes", "bitsandbytes")
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        shape = {"input_features": module.in_features, "output_features": module.out_features, "bias": False}
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0, device="meta")
            made.weight = bnb.nn.Int8Params(module.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(
                **shape, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4", device="meta"
            )
            made.weight = bnb.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
            )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made.to(DEVICE))  # moving there is what quantizes
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)


def adapted(name: str, model: PreTrainedModel, rank: int) -> nn.Module:
    """A peer's base with adapters on all of its linears but the head."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if name in ("int8", "nf4", "nf4-kbit"):
        quantized(model, name.partition("-")[0])
    if name == "nf4-kbit":
        model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    if name == "lean":
        import hf_coat

        hf_coat.apply_coat(model)
    return model.train()


def build(name: str, options) -> nn.Module:
    config = llama_config(options.size, options.layers, options.length, options.vocabulary)
    return adapted(name, causal_lm("liger" if name == "liger" else "bf16", config, DEVICE), options.rank)


def base_bytes(model: nn.Module) -> float:
    """Bytes that the wrapped linears hold for each of their weights."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m.base_layer, "in_features")]
    held = 0
    for base in (layer.base_layer for layer in layers):
        held += sum(t.nbytes for t in (*base.parameters(), *base.buffers()))
        state = getattr(base.weight, "quant_state", None)  # of Linear4bit
        inner = [state, getattr(state, "state2", None), base.weight]  # Int8Params has its scales as attributes
        held += sum(t.nbytes for part in inner if part is not None for t in vars(part).values() if torch.is_tensor(t))
        held += state.offset.nbytes if torch.is_tensor(getattr(state, "offset", None)) else 0
    return held / sum(layer.in_features * layer.out_features for layer in layers)


def run_peer(options) -> dict:
    torch.manual_seed(0)
    try:
        model = build(options.peer, options)
    except Unavailable as reason:
        return {"skipped": str(reason)}
    leaves = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=1e-4, fused=DEVICE == "cuda")
    ids = random_ids(options.batch, options.length, vocabulary=options.vocabulary)

    def forward():
        with torch.autocast(DEVICE, torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    def step():
        optimizer.zero_grad()
        loss = forward()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = torch.stack([step() for _ in range(options.steps)]).tolist()
    activations = activation_bytes(forward, lambda loss: loss.backward(), leaves)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms, spread = time_ms(step, options.iterations, warmup=2)
    return {
        "ms": ms,
        "spread_ms": spread,
        "tokens_per_second": options.batch * options.length / (ms * 1e-3),
        "base_bytes_per_weight": base_bytes(model),
        "activations_mib": None if activations is None else activations / 2**20,
        "peak_gib": peak_gib(),
        "trainable": sum(p.numel() for p in leaves),
        "losses": losses,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="steps whose losses are recorded, before the timing")
    parser.add_argument("--iterations", type=int, default=10, help="steps that are timed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a peer may take")
    parser.add_argument("--json", type=Path, help="write the figures here, after each peer")
    parser.add_argument("--peer", help="run this peer in this process and write only its row: what the others are for")
    options = parser.parse_args()
    if not options.tiny and DEVICE == "cpu":
        parser.error("these sizes need a GPU; --tiny runs on a CPU too")
    if options.tiny:
        options.batch, options.length, options.layers, options.iterations = 2, 16, 2, 2
    options.size = TINY if options.tiny else LLAMA_2_7B
    options.vocabulary = 256 if options.tiny else VOCABULARY
    return options


def main() -> None:
    options = parse()
    if options.peer:
        options.json.write_text(json.dumps(run_peer(options)))
        return
    about = {key: getattr(options, key) for key in ("size", "batch", "length", "layers", "rank", "steps")}
    result, rows = environment(*PACKAGES) | about, []
    for name in options.peers:
        row = fresh_process(__file__, *sys.argv[1:], "--peer", name, timeout=options.timeout)
        rows.append({"peer": name, "attention": "own" if name == "lean" else "default"} | row)
        held = f", {row['base_bytes_per_weight']:.3f} bytes a weight" if "base_bytes_per_weight" in row else ""
        print(show(rows[-1], rows[0]) + held, flush=True)
        result["rows"] = rows
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

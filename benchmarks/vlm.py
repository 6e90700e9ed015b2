"""Vision-language models with COAT beside BF16 and Liger, random weights and data, each peer in a process of its own.

    python benchmarks/vlm.py llava [--train everything]     LLaVA-1.5-7B's shape: 576 image, 128 text tokens a sample
    python benchmarks/vlm.py qwen  [--train everything]     Qwen2.5-VL-7B's shape: images of four sizes in a batch

A forward and backward of a batch; 64 text tokens at the end of each sample have labels. By default the tower is frozen
and all else trains. All parameters are BF16. The peers:

    bf16        transformers as it is
    liger       with Liger's patch of the model, if it has one
    lean        COAT, whose policies follow from the regions
    uniform     what "lean" does to models of text, in all regions: no region is known
    text-only   "lean" with the tower left alone; skipped where "lean" itself does that, as nothing of it trains
    paper

``--attention varlen`` is for Qwen, whose tower attends within windows: one call of torch's varlen_attn for all, as
flash attention would do, in place of transformers' call of sdpa for each. What is measured, and how, is as in
peers.py: ``--iterations``, ``--json FILE``, ``--tiny``.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from environment import environment, fresh_process
from peer_models import Unavailable, attention, in_bf16
from peers import DEVICE, measure, show

import hf_coat
from hf_coat.config import PRESETS, CoatConfig
from hf_coat.policy import find_regions

PEERS = ("bf16", "liger", "lean", "uniform", "text-only", "paper")
TRAINS = ("all but the tower", "projector", "everything")
TEXT, ANSWER = 128, 64

CLIP_L = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14, projection_dim=768,
)  # fmt: skip
LLAMA_7B = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064
)
QWEN_7B = dict(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152064,
)  # fmt: skip
QWEN_TOWER = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
SIZES = ((336, 448), (448, 448), (672, 448), (448, 896))  # height and width of Qwen's images
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
SMALL_TEXT = SMALL | {"vocab_size": 256}
VARLEN = "flash_varlen"  # transformers hands all windows at once to what has "flash" in its name


def llava(options) -> tuple[transformers.PreTrainedModel, dict]:
    vision, text = CLIP_L, LLAMA_7B
    if options.tiny:
        vision, text = dict(**SMALL, image_size=28, patch_size=14), SMALL_TEXT
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), image_token_index=1,
        text_config=transformers.LlamaConfig(**text, max_position_embeddings=4096),
    )  # fmt: skip
    model = in_bf16(lambda: transformers.LlavaForConditionalGeneration(config), DEVICE)
    side = vision["image_size"]
    tokens = (side // vision["patch_size"]) ** 2
    pixels = torch.randn(options.batch, 3, side, side, device=DEVICE, dtype=torch.bfloat16)
    return model, batch_of([tokens] * options.batch, 1, text["vocab_size"]) | {"pixel_values": pixels}


def qwen(options) -> tuple[transformers.PreTrainedModel, dict]:
    vision, text, sizes, sections = QWEN_TOWER, QWEN_7B, SIZES, [16, 24, 24]
    if options.tiny:
        vision = dict(depth=2, hidden_size=64, intermediate_size=100, num_heads=4, out_hidden_size=64)
        text, sizes, sections = SMALL_TEXT | {"num_key_value_heads": 2}, ((28, 28), (56, 28)), [2, 3, 3]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=dict(**text, rope_parameters=rope), image_token_id=1, video_token_id=2,
        vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    model = in_bf16(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config), DEVICE)
    if options.attention == "varlen":  # behind the making, which would look for a package of this name
        transformers.AttentionInterface.register(VARLEN, windows_at_once)
        model.config.vision_config._attn_implementation = VARLEN
    tower = config.vision_config
    sides = [sizes[i % len(sizes)] for i in range(options.batch)]
    grids = torch.tensor([[1, *(side // tower.patch_size for side in image)] for image in sides], device=DEVICE)
    merged = tower.spatial_merge_size**2
    batch = batch_of([int(n) // merged for n in grids.prod(1)], 1, text["vocab_size"])
    values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    pixels = torch.randn(int(grids.prod(1).sum()), values, device=DEVICE, dtype=torch.bfloat16)
    return model, batch | {
        "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": (batch["input_ids"] == 1).int(),
    }  # fmt: skip


def windows_at_once(module, query, key, value, attention_mask, cu_seq_lens_q, cu_seq_lens_k, **how):
    """torch's attention of sequences of any lengths behind each other; query, key, value [1, heads, patches, D]."""
    from torch.nn.attention.varlen import varlen_attn

    states = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    bounds = cu_seq_lens_q.int(), cu_seq_lens_k.int()
    return varlen_attn(*states, *bounds, int(how["max_length_q"]), int(how["max_length_k"]))[None], None


def batch_of(images: list[int], image: int, vocabulary: int) -> dict:
    """Samples of an image and text behind it, padded to the longest; the text's end has labels."""
    longest = max(images) + TEXT
    ids = torch.randint(5, vocabulary, (len(images), longest), device=DEVICE)
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    for row, tokens in enumerate(images):
        end = tokens + TEXT
        ids[row, :tokens], mask[row, end:], ids[row, end:] = image, 0, 0
        labels[row, end - ANSWER : end] = ids[row, end - ANSWER : end]
    padded = {"attention_mask": mask} if mask.min() == 0 else {}
    return {"input_ids": ids, "labels": labels, **padded}


CASES: dict[str, tuple[Callable, str, int]] = {  # how it is made, Liger's function, samples in a batch
    "llava": (llava, "apply_liger_kernel_to_llava", 16),
    "qwen": (qwen, "apply_liger_kernel_to_qwen2_5_vl", 12),
}

SETTINGS = {
    "lean": CoatConfig(),
    "uniform": CoatConfig(activations={"*": "lean", "attention": "bf16"}),
    "text-only": CoatConfig(modules_to_not_convert=["vision"]),
    "paper": PRESETS["paper"].model,
}


def run(options) -> dict:
    """One peer's row, in this process."""
    torch.manual_seed(0)
    make, patch, _ = CASES[options.case]
    if options.peer == "liger":
        try:
            from liger_kernel import transformers as liger
        except ImportError as error:
            raise Unavailable("liger-kernel is not installed") from error
        if not hasattr(liger, patch):
            raise Unavailable(f"this liger-kernel has no {patch}")
        getattr(liger, patch)()
        if options.case == "llava":
            liger.apply_liger_kernel_to_llama()
    model, batch = make(options)
    freeze(model.train(), options.train)
    if options.peer not in ("bf16", "liger"):
        lean = hf_coat.apply_coat(model, SETTINGS["lean"])
        report = hf_coat.apply_coat(model, SETTINGS[options.peer])
        if options.peer == "text-only" and report.converted == lean.converted:
            raise Unavailable("the same as lean, which leaves this tower alone too")
    leaves = [p for p in model.parameters() if p.requires_grad]
    seen = int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
    options.length, options.layers = seen / options.batch, model.config.get_text_config().num_hidden_layers
    row = measure(
        lambda: model(**batch, use_cache=False).loss, lambda loss: loss.backward(), leaves, options
    )  # fmt: skip
    parameters, trainable = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in leaves)
    return row | {"tokens": seen, "parameters": parameters, "trainable": trainable}


def freeze(model: transformers.PreTrainedModel, trains: str) -> None:
    frozen = {"all but the tower": ("vision",), "projector": ("vision", "language", "head"), "everything": ()}[trains]
    roots = find_regions(model)
    for name, p in model.named_parameters():
        of = [root for root in roots if name.startswith(f"{root}.")]
        p.requires_grad_(not of or roots[max(of, key=len)].value not in frozen)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--train", choices=TRAINS, default=TRAINS[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--attention", choices=("default", "cudnn", "varlen"), default="default", help="of all peers")
    parser.add_argument("--batch", type=int, help="samples")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--trace", action="store_true", help="trace three calls; needs a GPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a peer may take")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--peer", help="run this peer in this process and write only its row: what the others are for")
    options = parser.parse_args()
    if not options.tiny and DEVICE == "cpu":
        parser.error("these sizes need a GPU; --tiny runs on a CPU too")
    if options.attention == "varlen" and (options.case != "qwen" or DEVICE == "cpu"):
        parser.error("--attention varlen is for qwen and needs a GPU")
    options.batch = options.batch or (2 if options.tiny else CASES[options.case][2])
    options.iterations = options.iterations or (1 if options.tiny else 10)
    return options


def main() -> None:
    options = parse()
    if options.peer:
        try:
            with attention("default" if options.attention == "varlen" else options.attention):
                row = run(options)
        except Unavailable as reason:
            row = {"skipped": str(reason)}
        options.json.write_text(json.dumps(row))
        return
    command = shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    about = {key: getattr(options, key) for key in ("case", "train", "batch")}
    result = environment("liger-kernel") | {"command": command} | about
    rows: list[dict] = []
    for name in options.peers:
        row = fresh_process(__file__, *sys.argv[1:], "--peer", name, timeout=options.timeout)
        rows.append({"peer": name, "attention": options.attention} | row)
        print(show(rows[-1], rows[0]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Losses of LoRA on real text, each way to hold the frozen base in a process of its own, side by side.

    python benchmarks/lora_losses.py --model FOLDER [--json FILE] [--plot FILE.png]   a pretrained model
    python benchmarks/lora_losses.py [--json FILE] [--plot FILE.png]                  a Llama-2-7B shape

The peers are those of lora.py, with the same adapters, optimizer and learning rate; each sees the same batches. The
text is program code of this machine in languages that examples/corpus.py leaves out (C, C++, Perl, JavaScript, shell):
to a model that ``examples/pretrain.py`` wrote it is a new domain, in an old alphabet. The last sequences are held out.
Without ``--model`` the weights are random, and the adapters learn little more than how often each token stands there:
the curves show that the arithmetic follows BF16 at that size, not how well a model is tuned.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from environment import environment, fresh_process
from lora import PACKAGES, PEERS, adapted
from peer_models import LLAMA_2_7B, TINY, Unavailable, causal_lm, llama_config
from peer_models import PEERS as MODELS
from peers import DEVICE, VOCABULARY
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # behind this folder, which has files of the same names
from corpus import END, Blocks, documents, passes, text_folders, train_tokenizer  # noqa: E402

SUFFIXES = {".c", ".cc", ".cpp", ".js", ".pl", ".pm", ".sh"}
TOKENS = "tokens.npy"


def encode(options, folder: str) -> dict:
    """Write the text as tokens into the folder; returns what there is to know about it."""
    folders = text_folders() if options.text is None else [options.text]
    texts = list(documents(folders, options.megabytes, SUFFIXES))
    if options.model is None:
        tokenizer = train_tokenizer(texts, min(4096, options.vocabulary))
        ids = [id for text in texts for id in (*tokenizer.encode(text).ids, tokenizer.token_to_id(END))]
    else:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(options.model)
        ids = [id for text in texts for id in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    tokens = np.array(ids, np.uint32)
    wanted = (options.held_out + options.batch) * options.length
    if len(tokens) < wanted:
        raise SystemExit(
            f"{len(tokens)} tokens of {', '.join(sorted(SUFFIXES))} files are fewer than the {wanted} of one batch "
            "and the held-out sequences: name a folder that has more with --text"
        )
    np.save(Path(folder, TOKENS), tokens)
    return {"files": len(texts), "tokens": len(tokens), "sha256": hashlib.sha256(tokens).hexdigest()}


def base(options) -> PreTrainedModel:
    if options.model is None:
        config = llama_config(options.size, options.layers, options.length, options.vocabulary)
        return causal_lm("liger" if options.peer == "liger" else "bf16", config, DEVICE)
    if options.peer == "liger":
        MODELS["liger"].patch()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, use_cache=False)
    return model.to(DEVICE).train()


def run_peer(options) -> dict:
    torch.manual_seed(0)
    try:
        model = adapted(options.peer, base(options), options.rank)
    except Unavailable as reason:
        return {"skipped": str(reason)}
    leaves = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=options.learning_rate, fused=DEVICE == "cuda")
    tokens = np.load(Path(options.tokens, TOKENS), mmap_mode="r")
    first = len(tokens) // options.length - options.held_out  # of the held-out sequences
    order = passes(first, options.steps * options.batch, seed=0)
    blocks = Blocks(tokens, options.length)

    def loss(rows) -> torch.Tensor:
        ids = torch.stack([blocks[int(row)]["input_ids"] for row in rows]).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    @torch.no_grad()
    def held_out() -> float:
        model.eval()
        losses = [loss([first + i]) for i in range(options.held_out)]
        model.train()
        return torch.stack(losses).mean().item()

    before, losses = held_out(), []
    for rows in order.reshape(options.steps, options.batch):
        optimizer.zero_grad()
        losses.append(loss(rows))
        losses[-1].backward()
        optimizer.step()
        losses[-1] = losses[-1].detach()
    losses = torch.stack(losses).tolist()
    return {"losses": losses, "held_out_before": before, "held_out_after": held_out()}


def show(row: dict) -> str:
    for problem in ("skipped", "error"):
        if problem in row:
            return f"{row['peer']:10s} {problem}: {row[problem].strip().splitlines()[-1]}"
    last = row["losses"][-10:]
    return (
        f"{row['peer']:10s} held out {row['held_out_before']:.4f} -> {row['held_out_after']:.4f}, "
        f"mean of the last {len(last)} steps {sum(last) / len(last):.4f}"
    )


def draw(rows: list[dict], path: Path) -> None:
    """The losses of the peers over the steps, and how far they are from those of the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    whole, beside = figure.subplots(1, 2)
    rows = [row for row in rows if "losses" in row]
    for i, row in enumerate(rows):
        steps = range(1, len(row["losses"]) + 1)
        whole.plot(steps, row["losses"], linewidth=len(rows) - i, label=row["peer"], color=f"C{i}")
        if i:
            apart = [loss - first for loss, first in zip(row["losses"], rows[0]["losses"], strict=True)]
            beside.plot(steps, apart, linewidth=1, label=f"{row['peer']} - {rows[0]['peer']}", color=f"C{i}")
    whole.set(xlabel="step", ylabel="training loss, nats a token")
    beside.set(xlabel="step", ylabel="difference, nats a token")
    for axes in (whole, beside):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["bf16", "nf4", "int8", "lean"])
    parser.add_argument("--model", help="a folder with a causal language model and its tokenizer")
    parser.add_argument("--text", help="where to look for the text; by default where this machine has programs")
    parser.add_argument("--megabytes", type=int, default=16, help="at most as much text is read")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="of a sequence, at most what the model was made for")
    parser.add_argument("--held-out", type=int, default=8, help="sequences")
    parser.add_argument("--layers", type=int, default=32, help="of the Llama-2-7B shape")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape or few short sequences, on the CPU too")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that a peer may take")
    parser.add_argument("--json", type=Path, help="write the losses here, after each peer")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file, by matplotlib")
    parser.add_argument("--peer", help="run this peer in this process and write only its row: what the others are for")
    parser.add_argument("--tokens", help="the folder of the tokens, for --peer")
    options = parser.parse_args()
    if not options.tiny and DEVICE == "cpu":
        parser.error("these sizes need a GPU; --tiny runs on a CPU too")
    if options.tiny:
        options.batch, options.length, options.layers, options.steps, options.held_out = 2, 32, 2, 10, 2
    options.size = TINY if options.tiny else LLAMA_2_7B
    options.vocabulary = 512 if options.tiny else VOCABULARY
    return options


def main() -> None:
    options = parse()
    if options.peer:
        options.json.write_text(json.dumps(run_peer(options)))
        return
    keys = ("batch", "length", "steps", "rank", "learning_rate", "held_out")
    result = environment(*PACKAGES) | {key: getattr(options, key) for key in keys}
    result["model"] = {"size": options.size, "layers": options.layers, "weights": "random"}
    if options.model is not None:
        result["model"] = Path(options.model).name
    rows = result["rows"] = []
    with tempfile.TemporaryDirectory() as folder:
        result["text"] = encode(options, folder)
        for name in options.peers:
            arguments = [*sys.argv[1:], "--peer", name, "--tokens", folder]
            rows.append({"peer": name} | fresh_process(__file__, *arguments, timeout=options.timeout))
            print(show(rows[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()

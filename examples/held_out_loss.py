"""The loss of a checkpoint on the held-out text of a corpus, in BF16 and by transformers alone.

    python examples/held_out_loss.py CHECKPOINT CORPUS BLOCK_SIZE

prints it as JSON, in nats a token. hf_coat cannot be imported there: a checkpoint that a training with COAT wrote is
an ordinary one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from corpus import ABOUT, TOKENS, Blocks
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(checkpoint: str, corpus: str, block_size: str) -> None:
    sys.modules["hf_coat"] = None  # from here on, importing it fails
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device).eval()
    held_out = json.loads(Path(corpus, ABOUT).read_text())["held_out"]
    rows = Blocks(np.load(Path(corpus, TOKENS), mmap_mode="r")[:held_out], int(block_size))
    losses = []
    for batch in DataLoader(rows, batch_size=32):
        mean = model(**{name: value.to(device) for name, value in batch.items()}).loss
        losses.append(mean.double() * len(batch["input_ids"]))  # every row has the same number of tokens
    print(json.dumps({"loss": torch.stack(losses).sum().item() / len(rows), "tokens": len(rows) * rows.length}))


if __name__ == "__main__":
    main(*sys.argv[1:])

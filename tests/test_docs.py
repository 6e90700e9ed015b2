"""What the README shows works: its Python is executed, and its make targets exist.

A ``python`` block runs by itself, as a reader would paste it, in an empty folder, with these names at hand:

    checkpoint  the folder of a small Llama and its tokenizer, for ``from_pretrained``
    model       that model, loaded
    tokenizer   its tokenizer
    dataset     rows of ``input_ids`` and ``labels``, for ``train_dataset``
"""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
BLOCKS = [
    pytest.param(match[1], line := README[: match.start(1)].count("\n"), id=f"line{line + 1}")
    for match in re.finditer(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([README], vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer))).bfloat16().save_pretrained(folder)
    return folder


def test_there_are_blocks():
    assert len(BLOCKS) > 0


@pytest.mark.parametrize(("source", "line"), BLOCKS)
def test_python_block(source, line, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ids = tokenizer(README[:500])["input_ids"][:32]
    names = {
        "checkpoint": checkpoint,
        "model": LlamaForCausalLM.from_pretrained(checkpoint),
        "tokenizer": tokenizer,
        "dataset": Dataset.from_list([{"input_ids": ids, "labels": ids}] * 8),
    }
    exec(compile("\n" * line + source, str(ROOT / "README.md"), "exec"), names)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = set(re.findall(r"^(?:\$ )?make ([a-z-]+)|`make ([a-z-]+)", README, re.MULTILINE))
    assert {name for pair in shown for name in pair if name} <= targets

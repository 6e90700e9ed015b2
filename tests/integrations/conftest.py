"""A tiny Llama, its data and the arguments of a short training: what the tests of the plugs share."""

import logging
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY, LENGTH = 256, 16


def tiny_llama(dtype=torch.float32, seed=0, attention="eager"):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        attn_implementation=attention,  # others than "eager" are not deterministic on every device
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def tiny_tokenizer():
    """A token per word, so that nothing is downloaded."""
    words = ["<pad>", "<eos>", "<unk>", *"to be or not that is the question".split()]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def random_tokens(rows=32):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def short_run(output_dir, **changes):
    """Arguments by name: two steps of two microbatches, nothing saved."""
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return defaults | changes


def bits(tensor):
    """What a tensor is made of, so that comparing is exact (NaN, -0)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a, b):
    """Whether two nested dicts and lists hold the same values, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def run_python(code, *arguments, blocked=()):
    """Standard output of ``code`` in another process, where the modules ``blocked`` cannot be imported."""
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    command = [sys.executable, "-c", f"import sys\n{block}{code}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Heard(logging.Handler):
    """Collects the messages of COAT's logger, with their level in front; that of the run's report is REPORT."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        message = record.getMessage()
        self.lines.append(f"{'REPORT' if message.startswith('COAT: ') else record.levelname} {message}")

    def __contains__(self, text):
        return any(text in line for line in self.lines)


@pytest.fixture
def heard():
    logger, handler = logging.getLogger("transformers.coat"), Heard()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tools():
    """The functions of this file: ``tools.tiny_llama()``."""
    return sys.modules[__name__]

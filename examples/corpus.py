"""Hundreds of megabytes of real text without a download: sources, headers and documentation that a machine has.

    from corpus import load_corpus

    corpus = load_corpus("runs/corpus")   # the first time it reads, trains the tokenizer and encodes: under a minute
    corpus.held_out, corpus.training      # token ids, uint16, memory-mapped: any number of processes share them

Documents are whole files in a fixed random order, each once, with an end token behind it. The first of them are held
out. Software repeats itself: a held-out file may have a near copy in the training text, so losses are lower than on
text of another kind. They compare runs with one another.
"""

import functools
import glob
import hashlib
import json
import multiprocessing
import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

SUFFIXES = {".py", ".pyi", ".h", ".hpp", ".cuh", ".md", ".rst", ".txt"}
LARGEST_FILE = 2_000_000  # bytes; what is larger is data rather than text
END = "<|end|>"
SAMPLE = 4_000_000  # characters that the tokenizer learns from
CHUNK = 2_000_000  # characters that a process encodes at once
TOKENS, TOKENIZER, ABOUT = "tokens.npy", "tokenizer.json", "corpus.json"


@dataclass(frozen=True)
class Corpus:
    """Text as token ids.

    Attributes:
        tokenizer: A byte-level BPE tokenizer that was trained on part of the text.
        held_out: Token ids of the documents that are kept out of the training, uint16.
        training: Token ids of the others, uint16.
        about: What it was made from: ``files``, ``bytes``, ``tokens``, ``sha256`` of the ids, and the settings.
    """

    tokenizer: PreTrainedTokenizerFast
    held_out: np.ndarray
    training: np.ndarray
    about: dict


class Blocks(Dataset):
    """Sequences of ``length`` consecutive tokens as rows of ``input_ids`` and ``labels``.

    Args:
        tokens: Token ids.
        length: Tokens in a sequence; what is left over at the end is not used.
        order: Numbers of sequences in the order in which they are the rows; by default each once.

    Attributes:
        digest: A checksum of the rows that were read so far, and of their order.
    """

    def __init__(self, tokens: np.ndarray, length: int, order: np.ndarray | None = None):
        self.tokens, self.length = tokens, length
        self.order = np.arange(len(tokens) // length) if order is None else order
        self.digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        first = int(self.order[row]) * self.length
        block = self.tokens[first : first + self.length]
        self.digest.update(block.tobytes())
        ids = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def passes(blocks: int, rows: int, seed: int) -> np.ndarray:
    """Block numbers for ``rows`` rows: all blocks in a random order, then all again in another, as often as needed."""
    if blocks < 1:
        raise ValueError(
            "the training text is shorter than one sequence: read more of it, or make the sequences shorter"
        )
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(blocks) for _ in range(-(-rows // blocks))])[:rows]


def load_corpus(
    cache: str | os.PathLike,
    folders: Iterable[str | os.PathLike] | None = None,
    *,
    vocab_size: int = 4096,
    held_out_tokens: int = 2**21,
    megabytes: int = 360,
) -> Corpus:
    """The corpus in the folder ``cache``; it is made first if it is not there, or was made with other settings.

    Args:
        cache: Where the tokens are kept.
        folders: Where to look for text; :func:`text_folders` by default.
        vocab_size: Entries of the tokenizer, at most 65,536.
        held_out_tokens: Whole documents of at least as many tokens are held out.
        megabytes: At most as much text is read.

    Raises:
        ValueError: When there is not more text than is to be held out.
    """
    folders = text_folders() if folders is None else [os.path.realpath(folder) for folder in folders]
    settings = {
        "folders": folders,
        "vocab_size": vocab_size,
        "held_out_tokens": held_out_tokens,
        "megabytes": megabytes,
    }
    cache = Path(cache)
    about = json.loads((cache / ABOUT).read_text()) if (cache / ABOUT).exists() else {}
    if about.get("settings") != settings:
        about = {"settings": settings, **_make(cache, **settings)}
        (cache / ABOUT).write_text(json.dumps(about, indent=1) + "\n")  # last: what is there is complete
    tokens = np.load(cache / TOKENS, mmap_mode="r")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(cache / TOKENIZER), eos_token=END, pad_token=END)
    return Corpus(tokenizer, tokens[: about["held_out"]], tokens[about["held_out"] :], about)


def text_folders() -> list[str]:
    """Where Python, its packages, the C headers, CUDA's and the system's documentation are on this machine."""
    python = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    system = ["/usr/lib/python3", "/usr/include", *glob.glob("/usr/local/cuda*/include"), "/usr/share"]
    found = sorted({os.path.realpath(folder) for folder in (*python, *system) if os.path.isdir(folder)})
    return [f for f in found if not any(f.startswith(other + os.sep) for other in found)]  # not one inside another


def documents(folders: Iterable[str], megabytes: int, suffixes: Collection[str] = SUFFIXES) -> Iterator[str]:
    """The text of each file in a fixed random order; of files with the same bytes only the first."""
    paths = sorted(
        os.path.join(folder, name)
        for root in folders
        for folder, _, names in os.walk(root)
        for name in names
        if os.path.splitext(name)[1] in suffixes
    )
    seen, left = set(), megabytes * 1_000_000
    for i in np.random.default_rng(0).permutation(len(paths)):
        if not os.path.isfile(paths[i]) or not 0 < os.path.getsize(paths[i]) <= LARGEST_FILE:
            continue
        data = Path(paths[i]).read_bytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        left -= len(data)
        if left < 0:
            return
        yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: it can write any text, and puts nothing between or around."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # a document that speaks of the end token does not end there
    return tokenizer


def _chunks(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """The texts in lists of about ``size`` characters."""
    chunk, length = [], 0
    for text in texts:
        chunk.append(text)
        length += len(text)
        if length >= size:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, with the end token behind them."""
    tokenizer.encode_special_tokens = True  # pickling forgets it
    end = tokenizer.token_to_id(END)
    return [np.array([*encoding.ids, end], np.uint16) for encoding in tokenizer.encode_batch_fast(texts)]


def _make(cache: Path, folders: list[str], vocab_size: int, held_out_tokens: int, megabytes: int) -> dict:
    """Write the tokens and the tokenizer into ``cache``; returns what there is to know about them."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ABOUT).unlink(missing_ok=True)
    texts = list(documents(folders, megabytes))
    tokenizer = train_tokenizer(next(_chunks(texts, SAMPLE), []), vocab_size)
    # One process a core with a tokenizer each: the threads of one tokenizer wait for each other's cache of words.
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with multiprocessing.Pool() as pool:
            encoded = pool.imap(functools.partial(_encode, tokenizer), _chunks(texts, CHUNK))
            ids = [document for chunk in encoded for document in chunk]
    finally:
        if parallelism is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism
    ends = np.cumsum([len(document) for document in ids])
    first = int(np.searchsorted(ends, held_out_tokens))  # the last document that is held out
    if first + 1 >= len(ids):
        raise ValueError(
            f"{len(ids)} documents with {int(ends[-1]) if ids else 0} tokens under {', '.join(folders)} are too few "
            f"to hold out {held_out_tokens}: name a folder with more text, or hold out less"
        )
    tokens = np.concatenate(ids)
    np.save(cache / TOKENS, tokens)
    tokenizer.save(str(cache / TOKENIZER))
    return {
        "files": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": len(tokens),
        "held_out": int(ends[first]),
        "sha256": hashlib.sha256(tokens).hexdigest(),
    }

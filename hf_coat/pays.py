"""Whether FP8 pays in time: a decoder layer's forward and backward in BF16 against "lean", as measured on a GPU.

A small step is bound by the host, which has more kernels to launch in FP8, and by what quantizing costs; a large one
by its matrix products, which FP8 makes twice as fast. ``pays.json`` is what was measured of that, written by

    python benchmarks/peers.py small --json hf_coat/pays.json

It holds the GPU's name, versions, and ``rows`` of ``hidden`` (size), ``tokens`` of a forward on one GPU, and the
milliseconds ``bf16_ms`` and ``lean_ms`` of a layer of Llama-2's proportions that trains in full. Nothing is said of
what was not measured: other GPUs, ``torch.compile``, frozen weights under adapters.
"""

import bisect
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("pays.json")


@dataclass(frozen=True)
class Measured:
    """What a file like ``pays.json`` says.

    Args:
        gpu: Name of the GPU, as torch has it; None where nothing was measured.
        factors: Hidden size -> tokens -> BF16's time over that of FP8.
    """

    gpu: str | None
    factors: Mapping[int, Mapping[int, float]]

    @classmethod
    def read(cls, file: Path) -> "Measured":
        record = json.loads(file.read_text(encoding="utf-8"))
        factors: dict[int, dict[int, float]] = {}
        for row in record["rows"]:
            if "bf16_ms" in row and "lean_ms" in row:  # not where one of the two failed
                factors.setdefault(row["hidden"], {})[row["tokens"]] = row["bf16_ms"] / row["lean_ms"]
        return cls(record.get("gpu") if factors else None, factors)


@functools.cache
def measured() -> Measured:
    """What was measured and came with this package."""
    return Measured.read(FILE)


def pays(hidden: int, tokens: int, gpu: str | None) -> float | None:
    """How many times as fast as in BF16 a layer is in FP8: below 1 FP8 costs time.

    Args:
        hidden: Hidden size of the model.
        tokens: Tokens of one forward on one GPU.
        gpu: Name of that GPU, or ``measured().gpu`` to ask of the one that was measured.

    Returns:
        The factor, between measured sizes in proportion to ``log2(tokens)`` and ``log2(hidden)``, beyond them that of
        the nearest; None for a GPU that was not measured, and where FP8 does not pay yet with as many tokens as were
        measured, for more.
    """
    table = measured()
    if gpu is None or gpu != table.gpu:
        return None
    factor = _between(hidden, {width: _between(tokens, cells) for width, cells in table.factors.items()})
    unknown = factor < 1 and tokens > max(map(max, table.factors.values()))
    return None if unknown else factor


def speedup(hidden: int | None, tokens: int, gpu: str | None) -> dict[str, int | float | str] | None:
    """:func:`pays` for records, as ``factor``, with ``hidden``, ``tokens`` and ``gpu``; None where it says nothing."""
    factor = None if hidden is None else pays(hidden, tokens, gpu)
    return None if factor is None else {"factor": factor, "hidden": hidden, "tokens": tokens, "gpu": gpu}


def in_words(speedup: Mapping[str, int | float | str]) -> str:
    """What :func:`speedup` returned, as a line of text; below 1 with what helps."""
    said = (
        f"about {speedup['factor']:.2f}x as fast as in BF16, by a decoder layer of hidden size {speedup['hidden']} "
        f"with {speedup['tokens']:,} tokens, measured on {speedup['gpu']}"
    )
    return said if speedup["factor"] >= 1 else f"{said}: FP8 saves memory here but not time; use larger batches"


def _between(x: int, points: Mapping[int, float]) -> float:
    """The value at ``x``, piecewise linear in ``log2(x)``; that of the nearest point outside of them all."""
    known = sorted(points)
    i = bisect.bisect_right(known, x)
    if i in (0, len(known)):
        return points[known[max(i - 1, 0)]]
    low, high = known[i - 1], known[i]
    share = math.log2(x / low) / math.log2(high / low)
    return (1 - share) * points[low] + share * points[high]


def hidden_size(config: object) -> int | None:
    """Hidden size of the layers that a configuration of transformers describes, in a model with several senses of
    those for text; None for an encoder-decoder, which reads two sequences, and for what is no such configuration."""
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return None
    return getattr(config.get_text_config(), "hidden_size", None)

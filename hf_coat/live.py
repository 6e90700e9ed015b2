"""What a training shows of itself while it runs: speed, memory, and what rounding to FP8 costs.

    tokens/s     tokens that the optimizer's steps have read, padding included, over the time between two logs;
                 evaluations and saves are not counted in it
    MFU          model FLOPs utilisation: 6 x parameters x tokens, as transformers counts them, a second, over what the
                 GPUs' data sheets promise of dense BF16. FP8 may bring it above 1; frozen weights, which need only
                 4, count as others do
    rounding     of what a forward quantizes, by kind: what norms keep (``norm``), what MLPs keep (``mlp``), what
                 attentions keep (``attention``, only with the policy "lean"), and what linears multiply (``linear``)

:class:`Rounding` sees the very codes that the training uses, and changes no bit of it: of each tensor it compares at
most 512 tokens with what stands for them,

    error         ``|x_q * x_s - x| / |x|`` of all of them together; 0.026 where the scales fit
    saturated     fraction of values outside the range that their scale gives them, which are held at its end; 0 as
                  long as scales are made of the values that they are for
    underflowed   fraction of values other than 0 whose code is 0
"""

import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from coat_kernels.formats import largest, unpack_scale
from torch import nn

from .functional import Watcher, sampled

KINDS = ("norm", "mlp", "attention", "linear")
MEASURES = ("error", "saturated", "underflowed")
EVERY = 50  # steps, at least, between two of which rounding is measured: some 20 kernels for each tensor it sees
MOST_SAMPLES = 512  # of them that a record keeps
GIB = 2**30

# FLOP/s of dense BF16 by words in the name of a GPU, from the vendors' data sheets; the first that fits holds. Those
# of GeForce and of the workstation cards are with sums in float32.
PEAK_FLOPS = {
    "MIG": None,  # a part of a GPU
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 836e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def peak_flops(name: str) -> float | None:
    """FLOP/s of dense BF16 of a GPU of this name; None where it is not known."""
    return next((rate for gpu, rate in PEAK_FLOPS.items() if re.search(rf"\b{gpu}\b", name)), None)


class Rounding:
    """Measures what a model's forwards round to FP8 for as long as the context lasts.

        with Rounding(model) as rounding:
            model(**batch).loss.backward()
        rounding.by_layer()

    What gradient checkpointing computes a second time is seen a second time, and tells the same.

    Args:
        model: A converted model. Its layers are the members of its outermost ``nn.ModuleList``.
    """

    def __init__(self, model: nn.Module):
        self.model, self.layer, self.handles = model, "", []
        self.seen: list[tuple[str, str]] = []
        self.sums: list[torch.Tensor] = []  # float32 [5] each: squares of error and values; numbers of values

    def __enter__(self) -> "Rounding":
        for name in _layers(self.model):
            layer = self.model.get_submodule(name)
            self.handles.append(layer.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self.handles.append(layer.register_forward_hook(lambda *_: self._enter("")))
        Watcher.see = self._see
        return self

    def __exit__(self, *_: object) -> None:
        Watcher.see = None
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _enter(self, name: str) -> None:
        self.layer = name

    @torch.no_grad()
    def _see(self, kind: str, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, group_size: int) -> None:
        if not x.numel():
            return
        x, codes = sampled(x.detach().flatten(0, -2)).float(), sampled(codes)
        scale = unpack_scale(sampled(scale))  # a single row, of a scale per tensor, stays one
        if group_size:
            scale = scale.repeat_interleave(group_size, dim=1)[:, : x.shape[1]]
        values, there = codes.float(), x.count_nonzero()
        underflowed = there - values.count_nonzero()  # the code of 0 is 0
        counts = underflowed, (x.abs() > largest(codes.dtype) * scale).sum(), there
        sums = torch.stack([(values * scale - x).square().sum(), x.square().sum(), *counts])
        self.seen.append((self.layer, kind))
        self.sums.append(sums)

    def by_layer(self) -> dict[tuple[str, str], dict[str, float]]:
        """``(layer, kind)`` -> the measures; the layer is "" for what is in none."""
        rows: dict[tuple[str, str], list[float]] = {}
        for key, sums in zip(self.seen, torch.stack(self.sums).tolist() if self.sums else [], strict=True):
            rows[key] = [a + b for a, b in zip(rows.get(key, [0.0] * 5), sums, strict=True)]
        return {key: _measures(*sums) for key, sums in rows.items()}


def _measures(error: float, size: float, underflowed: float, saturated: float, count: float) -> dict[str, float]:
    count = count or 1.0
    error = (error / size) ** 0.5 if size else error  # NaN stays NaN
    return {"error": error, "saturated": saturated / count, "underflowed": underflowed / count}


def _layers(model: nn.Module) -> Iterator[str]:
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            yield from (f"{name}.{i}" for i in range(len(module)))


def by_kind(layers: dict[tuple[str, str], dict[str, float]]) -> dict[str, dict[str, float]]:
    """The means over the layers, for each kind that there is."""
    table = {}
    for kind in KINDS:
        rows = [measures for (_, its), measures in layers.items() if its == kind]
        if rows:
            table[kind] = {name: sum(row[name] for row in rows) / len(rows) for name in MEASURES}
    return table


class RoundingHistory:
    """The errors by layer and kind over a run, as the record of a run holds them: ``steps``, and for each row of
    ``errors``, named ``"kind layer"``, as many numbers. Of a long run every second, fourth, ... is left."""

    def __init__(self, steps: Iterable[int] = (), errors: dict[str, list[float | None]] | None = None):
        self.steps, self.errors = list(steps), {name: list(row) for name, row in (errors or {}).items()}

    def add(self, step: int, layers: dict[tuple[str, str], dict[str, float]]) -> None:
        found = {f"{kind} {layer}".strip(): float(f"{m['error']:.3g}") for (layer, kind), m in layers.items()}
        for name in found.keys() | self.errors.keys():
            self.errors.setdefault(name, [None] * len(self.steps)).append(found.get(name))
        self.steps.append(step)
        if len(self.steps) > MOST_SAMPLES:
            self.steps = self.steps[::2]
            self.errors = {name: row[::2] for name, row in self.errors.items()}

    def to_dict(self) -> dict[str, Any]:
        order = sorted(self.errors, key=lambda name: (KINDS.index(name.split(" ")[0]), _natural(name)))
        return {"steps": self.steps, "errors": {name: self.errors[name] for name in order}}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece or 0), "") if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", name)]


class Speed:
    """Tokens and FLOPs a second between two logs.

    Args:
        flops: What was counted when it begins, of all processes.
        tokens: The same of tokens, where they are counted by themselves, else 0.
        flops_per_token: To tell tokens from FLOPs otherwise; 0 where it is not known.
        peak: FLOP/s that all GPUs promise together, or None.
    """

    def __init__(self, flops: float, tokens: int, flops_per_token: int, peak: float | None):
        self.flops, self.tokens, self.flops_per_token, self.peak = flops, tokens, flops_per_token, peak
        self.since = self.step_ended = time.perf_counter()

    def end_step(self) -> None:
        self.step_ended = time.perf_counter()

    def pause(self) -> None:
        """Leave out what has passed since the last step ended."""
        now = time.perf_counter()
        self.since, self.step_ended = self.since + now - self.step_ended, now

    def figures(self, flops: float, tokens: int) -> dict[str, float]:
        """``tokens_per_second`` and ``mfu`` since the last call, as far as they are known."""
        now = time.perf_counter()
        seconds, done, read = now - self.since, flops - self.flops, tokens - self.tokens
        self.since, self.step_ended, self.flops, self.tokens = now, now, flops, tokens
        read = read or (done / self.flops_per_token if self.flops_per_token else 0)
        found = {"tokens_per_second": read / seconds} if read else {}
        return found | ({"mfu": done / seconds / self.peak} if done and self.peak else {})

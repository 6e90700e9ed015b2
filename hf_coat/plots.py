"""The page of a run, or of two side by side: plots of their records as PNG files and one self-contained HTML page.

Pure: records (see :mod:`hf_coat.record`) in, files out. matplotlib draws: ``pip install 'hf-coat[plot]'``.
"""

import base64
import html
import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .card import run_section
from .report import NAMES

Records = Mapping[str, Mapping[str, Any]]  # by the name of a run
LONG = 40  # logged losses from which on a run's second half is drawn by itself
MOST_POINTS = 300  # of a curve: with more of them the last curve hides the others
COLOURS = ("#1f77b4", "#d95f02", "#4d9221", "#762a83")
MEMORY = ("weights", "gradients", "optimizer_states")
FITS, TOO_MUCH = 0.02, 0.08  # errors at the ends of the colours: 0.026 is what rounding costs where the scales fit


def write_page(records: Records, folder: str | os.PathLike) -> list[Path]:
    """Draw the runs; return the files written: ``report.html`` and a PNG for each plot that there are figures for.

    Raises:
        ImportError: Without matplotlib, with the remedy.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files, pictures = [], []
    for name, draw in (("loss", _loss), ("throughput", _throughput), ("memory", _memory), ("rounding", _rounding)):
        figure = draw(records)
        if figure is None:
            continue
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        files.append(folder / f"{name}.png")
        files[-1].write_bytes(picture.getvalue())
        pictures.append((name, base64.b64encode(picture.getvalue()).decode()))
    files.append(folder / "report.html")
    files[-1].write_text(_page(records, pictures), encoding="utf-8")
    return files


def curve(log: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a logged figure, without those that are not finite; a long one as means of equal pieces."""
    points = [(row["step"], float(row[key])) for row in log if row.get(key) is not None and "step" in row]
    size = -(-len(points) // MOST_POINTS)
    pieces = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return [piece[-1][0] for piece in pieces], [sum(v for _, v in piece) / len(piece) for piece in pieces]


def _figure(height: float = 3.6, columns: int = 0):
    """A figure and its axes, or as many of them side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf-coat[plot]'") from error
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0] if columns else figure.subplots()


def _finish(axes, title: str, x: str, y: str, legend: bool = True) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=9)


def _line(axes, steps: list[float], values: list[float], **how) -> None:
    marker = "s" if how["linestyle"] == "--" else "o"
    axes.plot(steps, values, marker=marker if len(steps) < 20 else None, markersize=4, linewidth=1.4, **how)


def _loss(records: Records):
    """All steps; of a long run beside them the second half, where runs that differ little can be told apart."""
    curves = []
    for (name, record), colour in zip(records.items(), COLOURS, strict=False):
        for key, style, what in (("loss", "-", "training"), ("eval_loss", "--", "evaluation")):
            steps, values = curve(record["log"], key)
            if steps:
                curves.append(
                    (steps, values, {"color": colour, "linestyle": style, "label": f"{_wrapped(name, 30)}, {what}"})
                )
    if not curves:
        return None
    middle = max(steps[-1] for steps, _, _ in curves) / 2
    figure, all_axes = _figure(columns=1 + (max(len(steps) for steps, _, _ in curves) >= LONG))
    for axes, since in zip(all_axes, (0, middle), strict=False):
        for steps, values, how in curves:
            points = [(step, value) for step, value in zip(steps, values, strict=True) if step >= since]
            if points:
                _line(axes, *zip(*points, strict=True), **how)
        title = "Loss" if since == 0 else "Its second half"
        _finish(axes, title, "optimizer step", "loss (nats per token)", legend=since == 0)
        _whole_steps(axes, most=8 // len(all_axes))
    return figure


def _throughput(records: Records):
    figure, axes = _figure()
    drawn = False
    for (name, record), colour in zip(records.items(), COLOURS, strict=False):
        steps, values = curve(record["log"], "coat/tokens_per_second")
        if steps:
            used = curve(record["log"], "coat/mfu")[1]
            label = f"{name}, {sum(used) / len(used):.0%} of the GPUs' dense BF16 peak" if used else name
            _line(axes, steps, values, color=colour, linestyle="-", label=label)
            drawn = True
    if not drawn:
        return None
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])  # room for the names
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:,.0f}")
    _finish(axes, "Throughput, of all GPUs together", "optimizer step", "tokens per second")
    _whole_steps(axes)
    return figure


def _rounding(records: Records):
    """A map for each run that was measured: a row for each kind and layer, and a column for each measurement."""
    measured = {name: record["rounding"] for name, record in records.items() if record.get("rounding")}
    if not measured:
        return None
    rows = max(len(found["errors"]) for found in measured.values())
    figure, all_axes = _figure(min(2.0 + 0.18 * rows, 9), columns=len(measured))
    before = None
    for axes, (name, found) in zip(all_axes, measured.items(), strict=True):
        steps, labels = found["steps"], list(found["errors"])
        values = [[float("nan") if e is None else e for e in row] for row in found["errors"].values()]
        mesh = axes.pcolormesh(
            _edges(steps), range(len(labels) + 1), values, cmap="viridis", vmin=FITS, vmax=TOO_MUCH, rasterized=True
        )
        kinds = [label.split(" ")[0] for label in labels]
        for i in range(1, len(kinds)):
            if kinds[i] != kinds[i - 1]:
                axes.axhline(i, color="white", linewidth=2)
        every = -(-len(labels) // 40)
        shown = [""] * len(labels) if labels == before else labels  # beside the same rows, their names once
        axes.set_yticks([i + 0.5 for i in range(0, len(labels), every)], shown[::every], fontsize=8)
        before = labels
        axes.set_facecolor("#dddddd")  # not measured, or not a number
        axes.invert_yaxis()
        _finish(axes, _wrapped(name, 64 // len(measured)), "optimizer step", "", legend=False)
        _whole_steps(axes, most=8 // len(measured))
        axes.grid(visible=False)
    figure.colorbar(mesh, ax=list(all_axes), label="relative error", extend="both", format="%.2f")
    figure.suptitle("What rounding to FP8 costs, by kind and layer", x=0.01, ha="left", fontsize=11)
    return figure


def _edges(steps: Sequence[int]) -> list[float]:
    """Where columns begin and end: halfway between two steps; at the sides as far as to the neighbour."""
    inner = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    if not inner:
        return [steps[0] - 0.5, steps[0] + 0.5]
    return [2 * steps[0] - inner[0], *inner, 2 * steps[-1] - inner[-1]]


def _memory(records: Records):
    """What is known, one bar above the other; the allocator's peak as a line across the bar."""
    figure, axes = _figure(1.6 + 0.7 * len(records))
    unit, scale = ("GiB", 2**30) if _largest(records) >= 2**30 else ("MiB", 2**20)
    shown = set()
    for row, record in enumerate(records.values()):
        left = 0.0
        for kind, colour in zip(MEMORY, COLOURS, strict=False):
            size = record["memory"].get(kind)
            if size:
                label = NAMES.get(kind, kind.replace("_", " ")) if kind not in shown else None
                axes.barh(row, size / scale, left=left, height=0.5, color=colour, label=label)
                shown.add(kind)
                left += size / scale
        peak = record["memory"].get("peak")
        if peak:
            label = None if "peak" in shown else NAMES["peak"]
            axes.vlines(peak / scale, row - 0.35, row + 0.35, color="black", linewidth=2, label=label)
            shown.add("peak")
    if not shown:
        return None
    axes.set_yticks(range(len(records)), [_wrapped(name, 20) for name in records])
    axes.invert_yaxis()
    _finish(axes, "Memory, measured", unit, "", legend=False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _wrapped(name: str, width: int) -> str:
    return "\n".join(textwrap.wrap(name, width))


def _largest(records: Records) -> int:
    return max((size or 0 for record in records.values() for size in record["memory"].values()), default=0)


def _whole_steps(axes, most: int = 8) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _page(records: Records, pictures: Sequence[tuple[str, str]]) -> str:
    images = "\n".join(f'<img alt="{name}" src="data:image/png;base64,{data}">' for name, data in pictures)
    tables = "\n".join(f"<div><h2>{html.escape(name)}</h2>{_facts(record)}</div>" for name, record in records.items())
    title = html.escape(" and ".join(records))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>hf-coat report: {title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }}
img {{ max-width: 100%; display: block; margin: 1em 0 }}
.runs {{ display: flex; gap: 2em; flex-wrap: wrap }} .runs > div {{ flex: 1; min-width: 20em }}
td {{ padding: 0 1em 0 0; vertical-align: top; overflow-wrap: anywhere }} h1, h2 {{ font-weight: 600 }}
</style></head><body>
<h1>hf-coat report</h1>
{images}
<div class="runs">
{tables}
</div></body></html>
"""


def _facts(record: Mapping[str, Any]) -> str:
    """The rows of the card's table."""
    lines = [line.strip("| ").split(" | ", 1) for line in run_section(record).splitlines() if line.startswith("| ")]
    rows = [row for row in lines if len(row) == 2 and row[0]]
    cells = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"

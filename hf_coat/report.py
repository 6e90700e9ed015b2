"""From the records of a run to what a person reads. Pure: plain records in, text and plain rows out."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

CLASSES = ("weights", "gradients", "optimizer_states", "activations")
NAMES = {"optimizer_states": "optimizer states", "activations": "saved activations", "peak": "peak on the device"}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float) -> str:
    """``1536`` -> ``"1.50 KiB"``: three digits at least, with the largest unit that leaves a number of one or more."""
    unit = 0
    while count >= 1024 and unit < len(UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.{2 if unit and count < 100 else 0}f} {UNITS[unit]}"


def memory_rows(bf16_predicted, coat_predicted, coat_measured=None, bf16_measured=None) -> list[dict[str, Any]]:
    """The rows of :func:`memory_table` as plain dicts, in bytes.

    There is a row for each class, for their ``total``, and where a run was measured on a GPU for its ``peak``. It has
    ``class``, the four columns by their argument's name (None where there is no figure) and ``ratio``: how many times
    fewer bytes COAT needs. A ratio compares measured with measured, or else predicted with predicted.
    """
    records = {
        "bf16_predicted": _record(bf16_predicted),
        "bf16_measured": _record(bf16_measured),
        "coat_predicted": _record(coat_predicted),
        "coat_measured": _record(coat_measured),
    }
    rows = []
    for name in (*CLASSES, "total", "peak"):
        row = {"class": name, **{column: record.get(name) for column, record in records.items()}}
        pairs = [(row[f"bf16_{kind}"], row[f"coat_{kind}"]) for kind in ("measured", "predicted")]
        row["ratio"] = next((bf16 / coat for bf16, coat in pairs if bf16 is not None and coat), None)
        if name != "peak" or any(record.get(name) is not None for record in records.values()):
            rows.append(row)
    return rows


def memory_table(
    bf16_predicted, coat_predicted, coat_measured=None, bf16_measured=None, *, baseline: str = "BF16 AdamW"
) -> str:
    """Bytes by class without and with COAT, predicted and measured, and how many times fewer COAT needs.

    Args:
        bf16_predicted, coat_predicted: A ``MemoryBreakdown`` of :mod:`hf_coat.memory`, or the dict it writes.
        coat_measured, bf16_measured: The same of a live model, or those classes that are known; a column without
            figures is left out.
        baseline: What the model without COAT is, for the heading.

    Returns:
        The table as text of several lines, without colours.
    """
    rows = memory_rows(bf16_predicted, coat_predicted, coat_measured, bf16_measured)
    columns = [key for key in rows[0] if key not in ("class", "ratio") and any(row[key] is not None for row in rows)]
    heads = {"bf16": baseline, "coat": "COAT"}
    header = ["", *("\n".join((heads[key[:4]], key[5:])) for key in columns), f"{baseline}\n/ COAT"]
    body = [
        [
            NAMES.get(row["class"], row["class"]),
            *("-" if row[key] is None else format_bytes(row[key]) for key in columns),
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}x",
        ]
        for row in rows
    ]
    return _render("Memory of one training step", header, body, rule_before="total")


def loss_table(histories: Mapping[str, Sequence[Mapping[str, Any]]], key: str = "loss") -> str:
    """The losses of several runs side by side, step by step.

    Args:
        histories: Name of a run -> its ``TrainerState.log_history``.
        key: Which logged figure to show.
    """
    runs = {name: {row["step"]: float(row[key]) for row in log if key in row} for name, log in histories.items()}
    steps = sorted({step for run in runs.values() for step in run})
    body = [[str(step), *(f"{run[step]:.4f}" if step in run else "-" for run in runs.values())] for step in steps]
    return _render(f"Training {key}", ["step", *runs], body, numbers=range(len(runs) + 1))


def conversion_table(record: Mapping[str, Any]) -> str:
    """What was converted, kept and not covered, and why; the layers of a stack share a line.

    Args:
        record: ``ConversionReport.to_dict()``.
    """
    counts: dict[tuple[str, str, str], int] = {}
    for outcome in ("converted", "kept"):
        for name, what in record[outcome].items():
            key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name) or "(the model)", outcome, what)
            counts[key] = counts.get(key, 0) + 1
    regions = [(name, *what.split(": ", 1)) for name, what in record.get("regions", {}).items()]
    body = [[where, "", region, what] for region, where, what in regions]
    body += [[name, str(count), outcome, what] for (name, outcome, what), count in counts.items()]
    body += [[name, "", "not covered", what] for name, what in record["uncovered"].items()]
    body += [[name, "", "no such module", "named by the configuration"] for name in record.get("unmatched", ())]
    return _render("What COAT did to the model", ["module", "count", "outcome", "how or why"], body, numbers=(1,))


def estimate_table(title: str, rows: Mapping[str, Mapping[str, Any]], cards: Iterable[int]) -> str:
    """Predicted bytes of a training step, a recipe a column.

    Args:
        title: What is trained, and how.
        rows: Name of a recipe -> the fields of a :class:`hf_coat.peak.StepEstimate`, ``fits`` (the cards that hold
            it), and, if it was asked for, ``largest_batch`` by card.
        cards: All cards, by their gigabytes.
    """
    body = [
        [NAMES.get(key, key.replace("_", " ")), *(format_bytes(row[key]) for row in rows.values())]
        for key in ("weights", "gradients", "optimizer_states", "activations", "logits", "peak")
    ]
    whole = [row["at_peak"].get("whole gradients", 0) for row in rows.values()]
    if any(whole):  # of accumulation under FSDP2
        body.insert(2, ["gradients, whole until reduced", *map(format_bytes, whole)])
    body.append(["the peak is in the", *(row["phase"] for row in rows.values())])
    body += [
        [f"fits on {card} GB", *("yes" if card in row["fits"] else "no" for row in rows.values())] for card in cards
    ]
    for card in next(iter(rows.values())).get("largest_batch", ()):
        body.append([f"largest batch on {card} GB", *(str(row["largest_batch"][card]) for row in rows.values())])
    return _render(title, ["per GPU", *rows], body, rule_before=NAMES["peak"])


def _record(breakdown) -> Mapping[str, int | None]:
    if breakdown is None:
        return {}
    record = asdict(breakdown) if is_dataclass(breakdown) else breakdown
    known = [record.get(name) for name in CLASSES]
    return {**record, "total": None if None in known else sum(known)}


def _render(
    title: str, header: list[str], body: list[list[str]], rule_before: str = "", numbers: Iterable[int] | None = None
) -> str:
    """A table as text; the columns ``numbers`` (all but the first by default) are aligned to the right."""
    from rich import box  # comes with transformers; only a drawn table needs it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    numbers = range(1, len(header)) if numbers is None else numbers
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i in numbers else "left")
    for row in body:
        if rule_before and row[0] == rule_before:
            table.add_section()
        table.add_row(*map(Text, row))
    out = io.StringIO()
    Console(file=out, width=160, color_system=None, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")

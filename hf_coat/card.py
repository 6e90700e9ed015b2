"""Cards for the Hub, from plain records. Pure: text and dicts out, no network."""

import json
import re
from collections.abc import Mapping
from typing import Any

from .pays import in_words
from .report import format_bytes

TAGS = ("coat", "fp8", "hf_coat")
BEGIN, END = "<!-- hf_coat: begin -->", "<!-- hf_coat: end -->"


def recipe_card(settings: Mapping[str, Any], repo_id: str) -> str:
    """The card of a repository that holds ``coat_config.json``.

    Args:
        settings: ``HfCoatConfig.to_dict()``.
        repo_id: Its name on the Hub.
    """
    model, optimizer = settings["model"], settings["optimizer"]
    return f"""---
library_name: hf_coat
tags:
{_listed(TAGS)}
---

# {repo_id}

A training recipe for [hf_coat](https://arxiv.org/abs/2410.19313): FP8 training of Hugging Face models, as in COAT.

```python
from transformers import Trainer
import hf_coat

args = hf_coat.TrainingArguments(output_dir="run", coat="{repo_id}")
```

`coat_config.json`, written by hf_coat {settings["hf_coat_version"]}:

| model | |
|---|---|
{_rows(model) if model else "| not converted | |"}

| optimizer | |
|---|---|
{_rows(optimizer) if optimizer else "| that of the training arguments | |"}
"""


def run_section(record: Mapping[str, Any]) -> str:
    """The part of a model's card that tells of its training with COAT, between two marks.

    Args:
        record: What ``coat_run.json`` holds, see :mod:`hf_coat.record`.
    """
    rows = {}
    if record["model"]:
        rows["model"] = f"{record['model']['class']}, {record['model']['parameters']:,} parameters"
    rows["converted"] = _conversion(record["conversion"])
    hardware = record["hardware"]
    size = f" of {format_bytes(hardware['memory_bytes'])}" if hardware["memory_bytes"] else ""
    rows["hardware"] = f"{hardware['processes']} x {hardware['device']}{size}"
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    rows["steps"] = str(record["steps"])
    if record["resumed_at"]:
        rows["resumed at steps"] = ", ".join(map(str, record["resumed_at"]))
    losses = [entry for entry in record["log"] if "loss" in entry]
    if losses:
        ends = losses[:1] if len(losses) == 1 else [losses[0], losses[-1]]
        rows["training loss"] = ", ".join(f"{_number(entry['loss'])} at step {entry['step']}" for entry in ends)
    for entry in [entry for entry in record["log"] if "eval_loss" in entry][-1:]:
        rows["evaluation loss"] = f"{_number(entry['eval_loss'])} at step {entry['step']}"
    for name, rate in record["throughput"].items():
        rows[name.replace("_", " ")] = f"{rate:,.2f}"
    if record.get("speedup"):
        rows["speed to expect"] = in_words(record["speedup"])
    for name, size in record["memory"].items():
        if size is not None:
            rows[f"{name.replace('_', ' ')}, measured"] = format_bytes(size)
    if record["memory"].get("adamw_states") is not None:
        rows["adamw states, by arithmetic"] = rows.pop("adamw states, measured")
    if record["skipped_groups"]:
        rows["groups skipped for gradients that were not finite"] = str(record["skipped_groups"])
    body = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    recipe = json.dumps({key: value for key, value in record["coat"].items() if key != "hf_coat_version"})
    return f"""{BEGIN}
## Trained in FP8 with COAT

Trained with hf_coat {record["versions"]["hf_coat"]} (COAT, [arXiv 2410.19313](https://arxiv.org/abs/2410.19313)). The
weights are plain safetensors and load without it; `coat_run.json` is the whole record.

| | |
|---|---|
{body}

Recipe (`coat_config.json`):

```json
{recipe}
```
{END}
"""


def run_card(record: Mapping[str, Any], name: str) -> str:
    """A card of a run by itself, as those in ``model_cards`` are.

    Args:
        record: What ``coat_run.json`` holds.
        name: Its heading.
    """
    return f"---\ntags:\n{_listed(TAGS)}\n---\n\n# {name}\n\n{run_section(record)}"


def with_section(card: str, section: str) -> str:
    """A card with the section in it: in place of the one that is there, or at its end."""
    old = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n?", re.DOTALL)
    if old.search(card):
        return old.sub(lambda _: section, card, count=1)
    return f"{card.rstrip()}\n\n{section}"


def run_metadata(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the run adds to a card's metadata: tags, and a model-index with its last evaluation loss, if it has one.

    Args:
        record: What ``coat_run.json`` holds.
        name: The model's name in the model-index.
    """
    metadata: dict[str, Any] = {"tags": list(TAGS)}
    evaluations = [entry for entry in record["log"] if "eval_loss" in entry]
    if evaluations and evaluations[-1]["eval_loss"] is not None:
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"name": "evaluation set of the run", "type": "unknown"},
            "metrics": [{"type": "loss", "name": "evaluation loss", "value": evaluations[-1]["eval_loss"]}],
        }
        metadata["model-index"] = [{"name": name, "results": [result]}]
    return metadata


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _conversion(conversion: Mapping[str, Any] | None) -> str:
    if conversion is None:
        return "nothing, only the optimizer is COAT's"
    return f"{len(conversion['converted'])} modules; {len(conversion['kept'])} kept as they were"


def _rows(settings: Mapping[str, Any]) -> str:
    hidden = ("quant_method", "hf_coat_version")
    return "\n".join(f"| `{key}` | `{json.dumps(value)}` |" for key, value in settings.items() if key not in hidden)


def _listed(values) -> str:
    return "\n".join(f"- {value}" for value in values)

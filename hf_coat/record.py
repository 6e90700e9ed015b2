"""``coat_run.json``: what a run with COAT was and what came of it, as plain values. Pure but for asking the machine.

Version 1 of the record:

    schema_version   1
    coat             the recipe, ``HfCoatConfig.to_dict()``
    model            ``class``, ``parameters`` and of those ``trainable``, ``dtypes`` (parameters by dtype)
    conversion       ``ConversionReport.to_dict()``: converted, kept, uncovered, unmatched, regions; null if only the
                     optimizer is COAT's
    versions         hf_coat, torch, triton, transformers, peft, trl; null for what is not installed
    hardware         ``device`` (the GPU's name or "cpu"), ``memory_bytes`` of one GPU or null, ``processes``
    steps            optimizer steps done so far
    resumed_at       the steps at which the run was resumed, in order
    throughput       the rates that Trainer logs at its end, by their names there
    speedup          ``factor``: how many times as fast as in BF16 a decoder layer was measured to be on ``gpu``, of
                     this ``hidden`` size and with as many ``tokens`` as the run's first batch has on a GPU (see
                     hf_coat.pays); null for what was not measured
    memory           bytes that one process holds: ``weights``, ``gradients`` (before the first step of the optimizer;
                     missing without live figures), ``optimizer_states``, ``adamw_states`` (what two moments in the
                     parameters' dtype would be: arithmetic, not measured), ``peak`` of the CUDA allocator or null
    rounding         what rounding to FP8 cost, see :mod:`hf_coat.live`: ``steps`` at which it was measured, and
                     ``errors``, from "kind layer" to as many errors or null; null if it was not measured
    skipped_groups   groups of optimizer states that were skipped because a gradient was not finite
    log              Trainer's log: dicts with ``step``, ``loss``, ``eval_loss`` and what else it was given

Numbers that JSON does not know (NaN, infinity) are null. A reader ignores keys that it does not know; a change of what
a key means is a new version.
"""

import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__

RUN_NAME = "coat_run.json"
SCHEMA_VERSION = 1
PACKAGES = ("torch", "triton", "transformers", "peft", "trl")
MAX_RUN_BYTES = 2**28
REQUIRED = {  # what every record of version 1 has, and what that is in JSON
    **dict.fromkeys(("coat", "model", "versions", "hardware", "throughput", "memory"), dict),
    **dict.fromkeys(("steps", "skipped_groups"), int),
    **dict.fromkeys(("resumed_at", "log"), list),
    "conversion": (dict, type(None)),
}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"hf_coat": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware(device: torch.device, processes: int) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": device.type, "memory_bytes": None, "processes": processes}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "memory_bytes": properties.total_memory, "processes": processes}


def about_model(model: nn.Module) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for p in model.parameters():
        dtypes[str(p.dtype)] = dtypes.get(str(p.dtype), 0) + p.numel()
    return {
        "class": next(c.__name__ for c in type(model).__mro__ if not c.__module__.startswith("hf_coat")),
        "parameters": sum(dtypes.values()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "dtypes": dtypes,
    }


def run_record(
    *,
    coat: Mapping[str, Any],
    model: Mapping[str, Any],
    conversion: Mapping[str, Any] | None,
    hardware: Mapping[str, Any],
    steps: int,
    resumed_at: Sequence[int],
    throughput: Mapping[str, float],
    speedup: Mapping[str, Any] | None,
    memory: Mapping[str, int | None],
    rounding: Mapping[str, Any] | None,
    skipped_groups: int,
    log: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The record of a run; the arguments are described on this page."""
    record = {
        "schema_version": SCHEMA_VERSION, "coat": coat, "model": model, "conversion": conversion,
        "versions": versions(), "hardware": hardware, "steps": steps, "resumed_at": list(resumed_at),
        "throughput": throughput, "speedup": speedup, "memory": memory, "rounding": rounding,
        "skipped_groups": skipped_groups, "log": log,
    }  # fmt: skip
    return _finite(record)


def write_run(record: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Write ``coat_run.json`` into a folder: the whole file or, if that fails, none of it."""
    file = Path(folder, RUN_NAME)
    part = file.with_name(f"_{RUN_NAME}.part")  # Trainer uploads no names that begin so
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(file)


def read_run(path: str | os.PathLike) -> dict[str, Any]:
    """Read ``coat_run.json``, given itself or its folder.

    Raises:
        OSError: Where there is none.
        ValueError: For what is no such record, or one of a newer version.
    """
    file = Path(path)
    file = file / RUN_NAME if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"there is no {RUN_NAME} in {str(path)!r}: a run with coat= writes it where it saves")
    if file.stat().st_size > MAX_RUN_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; a record has at most {MAX_RUN_BYTES:,}")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{file} is no record of a run with COAT")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{file} is a record of version {version}, this hf_coat {__version__} reads up to {SCHEMA_VERSION}: "
            "pip install --upgrade hf-coat"
        )
    wrong = [key for key, kind in REQUIRED.items() if not isinstance(record.get(key), kind)]
    if not wrong and not all(isinstance(entry, dict) for entry in record["log"]):
        wrong = ["log"]
    if wrong:
        raise ValueError(f"{file} is no record of a run with COAT, or it is damaged: see its {', '.join(wrong)}")
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""Which checkpoint of a run training can be resumed from: the newest one that was written to its end.

transformers takes the newest folder. A process that died while it saved leaves one that lacks files, or has them in
part; ``trainer_state.json`` is what the first process writes last.
"""

import json
import os
import re
import zipfile

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers import trainer as hf_trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import CONFIG_NAME
from .callback import logger

# What torch.save writes into a checkpoint: archives, whose table of contents is at their end.
SAVED_BY_TORCH = ("optimizer.", "scheduler.", "scaler.", "rng_state", "pytorch_model_fsdp.")


def flaw(checkpoint: str, on_each_node: bool = False) -> str | None:
    """What shows that a checkpoint was not written to its end; None if nothing does.

    Files are looked at no further than their format tells of their length: tensors are not read.

    Args:
        checkpoint: Its folder.
        on_each_node: ``args.save_on_each_node``: the files of other nodes' processes are elsewhere.
    """
    names = sorted(os.listdir(checkpoint))
    if hf_trainer.TRAINER_STATE_NAME not in names:
        return f"it lacks {hf_trainer.TRAINER_STATE_NAME}"
    ranks = [name for name in names if name.startswith("rng_state_")]
    if ranks == ["rng_state_0.pth"] and not on_each_node:  # the file of a single process has no number
        return "it lacks rng_state_1.pth"
    return next((f"{name} is cut off" for name in names if not _is_whole(os.path.join(checkpoint, name))), None)


def _is_whole(file: str) -> bool:
    if os.path.basename(file).startswith(SAVED_BY_TORCH) and os.path.isfile(file):
        return zipfile.is_zipfile(file)
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, "pt"):
                pass
        elif file.endswith((hf_trainer.TRAINER_STATE_NAME, CONFIG_NAME)):
            with open(file, encoding="utf-8") as stream:
                json.load(stream)
    except (SafetensorError, ValueError):  # which bad JSON and bad UTF-8 are
        return False
    return True


def last_whole(folder: str, on_each_node: bool = False) -> tuple[str | None, dict[str, str]]:
    """The newest checkpoint in a run's folder that was written to its end, and the flaws of those that are newer."""
    steps = (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in os.listdir(folder))
    flaws = {}
    for step in sorted((int(match[1]) for match in steps if match), reverse=True):
        checkpoint = os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        found = flaw(checkpoint, on_each_node)
        if found is None:
            return checkpoint, flaws
        flaws[checkpoint] = found
    return None, flaws


def to_resume_from(args: TrainingArguments, asked: str | bool | None, tells: bool) -> str | bool | None:
    """What ``train(resume_from_checkpoint=asked)`` is to resume from: for True the newest whole checkpoint.

    Args:
        args: The arguments of the run.
        asked: As Trainer takes it.
        tells: Whether this process warns of checkpoints that are passed over.

    Raises:
        ValueError: For a checkpoint, named or the only ones, that was not written to its end.
    """
    if asked is True and os.path.isdir(args.output_dir):
        return _chosen(args, tells)
    if isinstance(asked, str) and os.path.isdir(asked):
        found = flaw(asked, args.save_on_each_node)
        if found is not None:
            raise ValueError(
                f"the checkpoint {asked} was not written to its end, {found}: name an older one, or take the last "
                "whole one with resume_from_checkpoint=True"
            )
    return asked


def _chosen(args: TrainingArguments, tells: bool) -> str | bool:
    """The checkpoint to resume from; True where there is none at all, which transformers has a message for."""
    checkpoint, flaws = last_whole(args.output_dir, args.save_on_each_node)
    said = "; ".join(f"{newer}: {found}" for newer, found in flaws.items())
    if checkpoint is None and flaws:
        raise ValueError(f"no checkpoint in {args.output_dir} was written to its end ({said}): start a new run")
    if flaws and tells:
        logger.warning(f"training is resumed from {checkpoint}; what is newer was not written to its end ({said})")
    return True if checkpoint is None else checkpoint

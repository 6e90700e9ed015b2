"""Which checkpoint of a run training can be resumed from: the newest one that was written to its end.

transformers takes the newest folder. A process that died while it saved leaves one that lacks files, or has them in
part; ``trainer_state.json`` is what the first process writes last.
"""

import functools
import json
import os
import re
import zipfile

from safetensors import SafetensorError, safe_open
from transformers import trainer as hf_trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .callback import CoatCallback, logger

# What torch.save writes into a checkpoint: archives, whose table of contents is at their end.
SAVED_BY_TORCH = ("optimizer.", "scheduler.", "scaler.", "rng_state", "pytorch_model_fsdp.")


def flaw(checkpoint: str) -> str | None:
    """What shows that a checkpoint was not written to its end; None if nothing does.

    Files are looked at no further than their format tells of their length: tensors are not read.
    """
    names = sorted(os.listdir(checkpoint))
    if hf_trainer.TRAINER_STATE_NAME not in names:
        return f"it lacks {hf_trainer.TRAINER_STATE_NAME}"
    if [name for name in names if name.startswith("rng_state_")] == ["rng_state_0.pth"]:  # one process has no number
        return "it lacks rng_state_1.pth"
    return next((f"{name} is cut off" for name in names if not _is_whole(os.path.join(checkpoint, name))), None)


def _is_whole(file: str) -> bool:
    if os.path.basename(file).startswith(SAVED_BY_TORCH) and os.path.isfile(file):
        return zipfile.is_zipfile(file)
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, "pt"):
                pass
        elif file.endswith(hf_trainer.TRAINER_STATE_NAME):
            with open(file, encoding="utf-8") as stream:
                json.load(stream)
    except (SafetensorError, json.JSONDecodeError):
        return False
    return True


def last_whole(folder: str) -> tuple[str | None, dict[str, str]]:
    """The newest checkpoint in a run's folder that was written to its end, and the flaws of those that are newer."""
    steps = (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in os.listdir(folder))
    flaws = {}
    for step in sorted((int(match[1]) for match in steps if match), reverse=True):
        checkpoint = os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        found = flaw(checkpoint)
        if found is None:
            return checkpoint, flaws
        flaws[checkpoint] = found
    return None, flaws


def resume_from_whole(trainer_class: type) -> None:
    """Let ``train(resume_from_checkpoint=True)`` of runs with COAT pass over checkpoints not written to their end, and
    refuse one that is named. Runs without COAT are as they were."""
    train_from = trainer_class.train
    if hasattr(train_from, "__wrapped__"):
        return

    @functools.wraps(train_from)
    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if any(isinstance(callback, CoatCallback) and callback.coat for callback in self.callback_handler.callbacks):
            if resume_from_checkpoint is True and os.path.isdir(self.args.output_dir):
                resume_from_checkpoint = _chosen(self.args.output_dir, self.is_world_process_zero())
            elif isinstance(resume_from_checkpoint, str) and os.path.isdir(resume_from_checkpoint):
                found = flaw(resume_from_checkpoint)
                if found is not None:
                    raise ValueError(
                        f"the checkpoint {resume_from_checkpoint} was not written to its end, {found}: name an older "
                        "one, or take the last whole one with resume_from_checkpoint=True"
                    )
        return train_from(self, resume_from_checkpoint, *args, **kwargs)

    trainer_class.train = train


def _chosen(folder: str, tells: bool) -> str | bool:
    """The checkpoint to resume from; True where there is none at all, which transformers has a message for."""
    checkpoint, flaws = last_whole(folder)
    said = "; ".join(f"{newer}: {found}" for newer, found in flaws.items())
    if checkpoint is None and flaws:
        raise ValueError(f"no checkpoint in {folder} was written to its end ({said}): start a new run")
    if flaws and tells:
        logger.warning(f"training is resumed from {checkpoint}; what is newer was not written to its end ({said})")
    return True if checkpoint is None else checkpoint

"""The COAT section of the cards that trainers write; what stands in it comes from :mod:`hf_coat.card`."""

import functools
import os
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump

from ..card import run_metadata, run_section, with_section
from .callback import CoatCallback, bare


def keep_section(trainer_class: type) -> None:
    """Let the card that trainers of this class write tell of COAT; a run without COAT has the card that it had.

    Trainer writes its card anew each time, and no event follows.
    """
    write_card = trainer_class.create_model_card
    if getattr(write_card, "prepared_by_coat", False):
        return

    @functools.wraps(write_card)
    def create_model_card(self, *args, **kwargs):
        write_card(self, *args, **kwargs)
        callback = next((c for c in self.callback_handler.callbacks if isinstance(c, CoatCallback) and c.coat), None)
        file = os.path.join(self.args.output_dir, "README.md")
        if callback is not None and self.is_world_process_zero() and os.path.isfile(file):
            model = self.accelerator.unwrap_model(self.model)
            record = callback.run_record(self.args, self.state, model, self.optimizer and bare(self.optimizer))
            _add_section(file, record)

    create_model_card.prepared_by_coat = True
    trainer_class.create_model_card = create_model_card


def _add_section(file: str, record: dict[str, Any]) -> None:
    card = ModelCard.load(file)
    data = card.data.to_dict()
    ours = run_metadata(record, data.get("model_name") or os.path.basename(os.path.dirname(os.path.abspath(file))))
    tags = data.get("tags") or []
    data["tags"] = [*tags, *(tag for tag in ours["tags"] if tag not in tags)]
    if not any(entry.get("results") for entry in data.get("model-index") or ()) and "model-index" in ours:
        data["model-index"] = ours["model-index"]
    header = yaml_dump(data, sort_keys=False)
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(f"---\n{header}---\n{with_section(card.text, run_section(record))}")

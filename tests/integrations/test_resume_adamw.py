"""A Trainer's checkpoint of AdamW that COAT resumes from, and the other way round."""

import pytest
import torch
from transformers import Trainer

from hf_coat import TrainingArguments
from hf_coat.optim import from_adamw_state_dict, to_adamw_state_dict

COAT = {"model": None}


@pytest.fixture
def run(tools, tmp_path):
    def run(coat, resume=False, max_steps=4):
        settings = {"coat": coat, "save_strategy": "steps", "save_steps": 2, "max_steps": max_steps}
        args = TrainingArguments(**tools.short_run(tmp_path / "run", **settings), lr_scheduler_type="constant")
        trained = Trainer(tools.tiny_llama(), args, train_dataset=tools.random_tokens())
        trained.train(resume_from_checkpoint=resume)
        return trained

    return run


@pytest.mark.parametrize(
    ("first", "then", "convert", "name"),
    [
        (None, COAT, from_adamw_state_dict, "from_adamw_state_dict"),
        (COAT, None, to_adamw_state_dict, "to_adamw_state_dict"),
    ],
    ids=["AdamW to COAT", "COAT to AdamW"],
)
def test_a_checkpoint_converted(run, tmp_path, first, then, convert, name):
    """The error names the function, and what it makes of optimizer.pt is resumed from as the own run would be."""
    run(first, max_steps=2)
    with pytest.raises(ValueError, match=f"hf_coat.optim.{name}"):
        run(then, resume=True)
    file = tmp_path / "run" / "checkpoint-2" / "optimizer.pt"
    torch.save(convert(torch.load(file, weights_only=True)), file)
    converted = run(then, resume=True)
    assert all(state["step"] == 4 for state in converted.optimizer.state.values())
    losses = [log["loss"] for log in converted.state.log_history if "loss" in log]
    straight = [log["loss"] for log in run(first).state.log_history if "loss" in log]
    assert losses[:3] == straight[:3], "the third is of the weights of the checkpoint"
    assert losses[3] == pytest.approx(straight[3], abs=0.02)

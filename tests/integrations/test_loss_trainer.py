"""A model whose head is fused with its loss, in the hands of Trainer, accelerate, PEFT, TRL and DDP."""

import copy

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import Trainer

from hf_coat.modules import loss as page
from hf_coat.modules.loss import DeferredLogits, fuse_loss

pytestmark = pytest.mark.skipif(
    page.library("cuda" if torch.cuda.is_available() else "cpu") is None, reason=f"needs {page.REMEDY}"
)

FP32_SUMS = 1e-5  # relative, of sums that are made in another order


class Watched(Trainer):
    """Remembers the logits of its training steps, as they came out of the model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.seen = [*getattr(self, "seen", []), outputs["logits"]]
        return (loss, outputs) if return_outputs else loss


def data(tools):
    rows = tools.random_tokens()
    for i, row in enumerate(rows):  # so many without a label that each microbatch has another number of them
        row["labels"] = row["labels"].clone()
        row["labels"][: i % 7] = -100
    return rows


def trained(tools, folder, model, fused, **changes):
    """The trainer after its run, and each step's loss."""
    model = copy.deepcopy(model)
    if fused:
        assert "fused linear" in next(iter(fuse_loss(model).values()))
    settings = dict(use_cpu=not torch.cuda.is_available(), optim="sgd", learning_rate=1e-1) | changes
    args = transformers.TrainingArguments(**tools.short_run(folder, **settings))
    trainer = Watched(model, args, train_dataset=data(tools), eval_dataset=data(tools)[:4])
    trainer.train()
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_same_run(tools, folder, model, bound=FP32_SUMS, **changes):
    runs = [trained(tools, folder, model, fused, **changes) for fused in (True, False)]
    (fused, losses), (plain, expected) = runs
    assert losses == pytest.approx(expected, rel=max(bound, 1e-4))  # Trainer rounds what it logs
    start = dict(model.named_parameters())
    for (name, p), q in zip(fused.model.named_parameters(), plain.model.parameters(), strict=True):
        moved = (q.detach().cpu() - start[name].detach()).norm()
        assert (p - q).norm() <= bound * max(moved.item(), q.norm().item() * 1e-2), name
    return fused


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"average_tokens_across_devices": False}])
def test_the_same_run(tools, tmp_path, changes):
    fused = assert_same_run(tools, tmp_path, tools.tiny_llama(), **changes)
    assert len(fused.seen) == 4
    assert all(isinstance(logits, DeferredLogits) and logits.product.value is None for logits in fused.seen)


def test_bf16(tools, tmp_path):
    """Under autocast; accelerate turns the outputs into FP32, which computes nothing."""
    fused = assert_same_run(tools, tmp_path, tools.tiny_llama(), bound=4 * 2.0**-8, bf16=True)
    assert all(logits.dtype == torch.float32 and logits.product.value is None for logits in fused.seen)


def test_label_smoothing(tools, tmp_path):
    """Trainer keeps the labels for itself then, and works on the logits."""
    fused = assert_same_run(tools, tmp_path, tools.tiny_llama(), label_smoothing_factor=0.1)
    assert all(type(logits) is torch.Tensor for logits in fused.seen)


def test_evaluation(tools, tmp_path):
    trainer, _ = trained(tools, tmp_path, tools.tiny_llama(), True)
    prediction = trainer.predict(data(tools)[:4])
    inputs = torch.stack([row["input_ids"] for row in data(tools)[:4]]).to(trainer.model.device)
    with torch.no_grad():
        expected = trainer.model.eval()(inputs).logits
    assert torch.equal(torch.from_numpy(prediction.predictions), expected.cpu())
    assert prediction.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("order", ["fused before", "fused after"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_peft(tools, device, order, targets):
    peft = pytest.importorskip("peft")
    pair = [tools.tiny_llama().to(device), tools.tiny_llama().to(device)]
    for i, base in enumerate(pair):
        if i == 0 and order == "fused before":
            fuse_loss(base)
        torch.manual_seed(0)
        pair[i] = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
        if i == 0 and order == "fused after":
            [said] = fuse_loss(pair[i]).values()
            assert ("not a plain nn.Linear" in said) is ("lm_head" in targets)
    rows = data(tools)[:4]
    batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
    outputs = [model.train()(**batch) for model in pair]
    fused = isinstance(outputs[0].logits, DeferredLogits) and outputs[0].logits.product.value is None
    assert fused is ("lm_head" not in targets), "with an adapter on the head the logits are computed"
    for o in outputs:
        o.loss.backward()
    for (name, p), q in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).norm() <= FP32_SUMS * q.grad.norm(), name


def test_trl(tools, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    vocabulary = {f"w{i}": i for i in range(tools.VOCABULARY)}
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), pad_token="w0", eos_token="w1"
    )
    runs = []
    for fused in (True, False):
        model = tools.tiny_llama()
        if fused:
            fuse_loss(model)
        settings = tools.short_run(tmp_path, use_cpu=not torch.cuda.is_available(), bf16=False, optim="sgd")
        rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in tools.random_tokens()])
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**settings), train_dataset=rows, processing_class=words)
        trainer.train()
        runs.append([row for row in trainer.state.log_history if "loss" in row])
    assert len(runs[0]) == 2
    for row, expected in zip(*runs, strict=True):
        for key in ("loss", "entropy", "mean_token_accuracy"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4)


def test_ddp(tools, device, tmp_path):
    """DDP passes every output through a function of its own when it looks for unused parameters."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = tools.tiny_llama().to(device).train()
        fused = copy.deepcopy(plain)
        fuse_loss(fused)
        parallel = torch.nn.parallel.DistributedDataParallel(fused, find_unused_parameters=True)
        rows = data(tools)[:4]
        batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        for _ in range(2):
            outputs = parallel(**batch)
            outputs.loss.backward()
            plain(**batch).loss.backward()
        assert isinstance(outputs.logits, DeferredLogits) and outputs.logits.product.value is None
        for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= FP32_SUMS * q.grad.norm()
    finally:
        torch.distributed.destroy_process_group()

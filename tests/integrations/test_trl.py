"""hf_coat.trl.SFTConfig with TRL's own SFTTrainer."""

import json
import pickle

import pytest
import torch

import hf_coat
from hf_coat import CoatAdamW, HfCoatConfig, with_coat
from hf_coat.modules import CoatLinear

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.fixture
def tokenizer(tools):
    return tools.tiny_tokenizer()


def sft(tools, tokenizer, folder, model, **changes):
    settings = tools.short_run(folder, max_length=16, bf16=False, use_cpu=not torch.cuda.is_available())
    args = hf_coat.trl.SFTConfig(**settings | {"save_strategy": "steps", "save_steps": 2} | changes)
    rows = datasets.Dataset.from_dict({"text": ["to be or not to be that is the question"] * 16})
    return trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


def test_a_run(tools, tokenizer, tmp_path):
    trained = sft(tools, tokenizer, tmp_path, tools.tiny_llama(), coat="paper")
    trained.train()
    assert isinstance(trained.args, trl.SFTConfig) and trained.args.coat == HfCoatConfig.resolve("paper")
    assert sum(isinstance(module, CoatLinear) for module in trained.model.modules()) == 14
    assert isinstance(trained.optimizer.optimizer, CoatAdamW)
    assert HfCoatConfig.from_pretrained(tmp_path / "checkpoint-2") == trained.args.coat
    assert torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False).coat == trained.args.coat


def test_a_model_given_by_its_folder(tools, tokenizer, tmp_path):
    tools.tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trained = sft(tools, None, tmp_path / "run", str(tmp_path / "model"), coat="lean")
    assert trained.model.dtype == torch.float32, "TRL loads a model that is given as a string in FP32"
    trained.train()
    assert sum(isinstance(module, CoatLinear) for module in trained.model.modules()) == 14


def test_the_class():
    assert hf_coat.trl.SFTConfig is with_coat(trl.SFTConfig) and issubclass(hf_coat.trl.SFTConfig, trl.SFTConfig)
    args = hf_coat.trl.SFTConfig("x", report_to="none", coat="lean", bf16=False, max_length=99)
    for again in (pickle.loads(pickle.dumps(args)), type(args)(**json.loads(args.to_json_string()))):
        assert type(again) is type(args) and again.coat == HfCoatConfig() and again.max_length == 99
    other = with_coat(trl.RewardConfig)("x", report_to="none", coat="paper", bf16=False)
    assert isinstance(other, trl.RewardConfig) and other.optim == "coat_adamw"

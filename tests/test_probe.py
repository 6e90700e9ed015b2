"""What rounding to FP8 costs the tokens of each modality: measured, and what a Trainer's run does about it."""

import json

import pytest
import torch
import transformers
from torch import nn

import hf_coat
from hf_coat import CoatConfig, probe
from hf_coat.modules import CoatLinear
from hf_coat.probe import Probe

IMAGE, ROUNDING = 30, 0.026
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
DOWN = "model.text_model.layers.0.mlp.down_proj"


def smolvlm() -> transformers.SmolVLMForConditionalGeneration:
    """Not a LLaVA: Trainer cannot resume those, transformers 5 saves them under names that it does not load."""
    torch.manual_seed(0)
    config = transformers.SmolVLMConfig(
        vision_config=dict(**SIZES, image_size=8, patch_size=4), scale_factor=1, image_token_id=IMAGE, pad_token_id=0,
        text_config=transformers.LlamaConfig(**SIZES, vocab_size=32, initializer_range=0.1),
    )  # fmt: skip
    return transformers.SmolVLMForConditionalGeneration(config)


def rows(count: int) -> list[dict]:
    """Samples of an image, whose four tokens are in front, and six words."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((count, 4), IMAGE), torch.randint(3, 30, (count, 6), generator=draws)], dim=1)
    labels = torch.where(ids == IMAGE, -100, ids)
    pixels = torch.randn(count, 1, 3, 8, 8, generator=draws)
    return [dict(input_ids=i, labels=label, pixel_values=p) for i, label, p in zip(ids, labels, pixels, strict=True)]


def batch() -> dict:
    return torch.utils.data.default_collate(rows(2))


def hooks(model: nn.Module) -> dict[str, int]:
    """How many forward pre-hooks each module has."""
    return {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}


def test_what_is_measured():
    model = smolvlm()
    hf_coat.apply_coat(model)
    before = hooks(model)
    expected = model(**batch()).loss
    with Probe(model) as found:
        loss = model(**batch()).loss
    assert torch.allclose(loss, expected, rtol=1e-3)
    assert before == hooks(model)
    assert torch.equal(model(**batch()).loss, expected), "something was left behind"
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert found.figures().keys() == linears - {"lm_head"}
    table = found.by_region()
    assert {region: list(of) for region, of in table.items()} == {
        "vision": ["image"], "projector": ["image"], "language": ["image", "text"],
    }  # fmt: skip
    for figures in (figures for of in table.values() for figures in of.values()):
        assert figures["error"] == pytest.approx(ROUNDING, rel=0.15) and 1 <= figures["kurtosis"] <= 48
    assert not list(found.outstanding())


def test_figures_by_hand():
    x = torch.zeros(2, 64)
    x[0, :2], x[1] = torch.tensor([448.0, 1.0 + 2**-5]), 1.0  # the second value is rounded to 1
    error, kurtosis = Probe(nn.Linear(64, 64))._figures(x, torch.tensor(448.0)).tolist()
    each = torch.tensor([2**-5 / (448**2 + (1 + 2**-5) ** 2) ** 0.5, 0.0])
    assert error == pytest.approx(each.square().mean().sqrt().item(), rel=1e-3)
    assert kurtosis == pytest.approx((64 + 1) / 2, rel=1e-3)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize(("factor", "stands_out"), [(2.0**8, False), (2.0**16, True)])
def test_text_beside_large_image_tokens(granularity, factor, stands_out):
    """Where image tokens are 2^12 times larger, text tokens fall below the normal numbers of the scale they share."""
    config = CoatConfig(granularity=granularity)
    linear = nn.Linear(64, 64)
    text = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    error, _ = Probe(linear, config)._figures(text, (factor * text).abs().amax()).tolist()
    assert (error > probe.LIMIT) == stands_out and (stands_out or error == pytest.approx(ROUNDING, rel=0.1))


def test_text_alone_and_models_of_text():
    model = smolvlm()
    hf_coat.apply_coat(model)
    with Probe(model) as found:
        model(input_ids=torch.randint(3, 30, (1, 8)))
    assert {m for of in found.figures().values() for m in of} == {"text"}
    with Probe(model.model.text_model) as found:
        assert not found.handles and found.figures() == {}


# --- in a Trainer's run ---


def trainer(folder, steps: int, model: nn.Module | None = None, **settings) -> transformers.Trainer:
    args = hf_coat.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=2, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, coat=CoatConfig(**settings), optim="adamw_torch",
        learning_rate=1e-3, lr_scheduler_type="constant",
    )  # fmt: skip
    return transformers.Trainer(model or smolvlm(), args, train_dataset=rows(16))


def callback(made: transformers.Trainer):
    return next(c for c in made.callback_handler.callbacks if isinstance(c, hf_coat.CoatCallback))


def costly_down_projections(monkeypatch) -> None:
    """Measurements in which the down projection alone stands out."""
    own = Probe._figures

    def figures(self, x, largest):
        return own(self, x, largest) + torch.tensor([x.shape[1] == SIZES["intermediate_size"], 0.0])

    monkeypatch.setattr(Probe, "_figures", figures)


def test_a_run_without_findings(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    made = trainer(tmp_path, 3)
    before = hooks(made.model)
    made.train()
    assert "Memory of one training step" in caplog.text and "no estimate of the memory" not in caplog.text
    assert list(callback(made).record["probe"]) == ["1", "2"] and callback(made).probe is None
    assert callback(made).record["probe"]["1"]["language"]["text"]["error"] == pytest.approx(ROUNDING, rel=0.15)
    assert hooks(made.model) == before, "something was left behind"
    with Probe(made.model, made.args.coat.model) as later:  # on request
        made.model(**batch())
    assert later.by_region().keys() == callback(made).record["probe"]["2"].keys()
    never = trainer(tmp_path / "never", 1, probe_steps=0)
    never.train()
    assert "probe" not in callback(never).record


def test_what_stands_out_is_promoted_and_the_run_resumes_to_the_bit(tmp_path, monkeypatch, caplog):
    costly_down_projections(monkeypatch)
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    straight = trainer(tmp_path / "run", 4)
    given = straight.args.coat.model
    straight.train()
    assert type(straight.model.get_submodule(DOWN)) is nn.Linear
    assert isinstance(straight.model.get_submodule(DOWN.replace("down", "up")), CoatLinear)
    reason = callback(straight).report.kept[DOWN]
    assert reason.startswith("in BF16: FP8 costs its ") and "kurtosis" in reason and DOWN in caplog.text
    assert given.promoted == {}, "the user's configuration was changed"
    for step in (1, 2, 4):
        recipe = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "coat_config.json").read_text())
        assert DOWN in recipe["model"]["promoted"]
    for step in (1, 3):  # within the steps that are measured, and behind them
        resumed = trainer(tmp_path / "run", 4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert type(resumed.model.get_submodule(DOWN)) is nn.Linear
        state = straight.model.state_dict()
        differ = [name for name, value in resumed.model.state_dict().items() if not torch.equal(value, state[name])]
        assert not differ, step

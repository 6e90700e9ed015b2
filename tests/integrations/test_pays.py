"""What was measured of FP8's speed at small sizes: read, interpolated, and said where a run or an estimate asks."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, LlamaConfig, LlavaConfig, T5Config, Trainer

from hf_coat import CoatCallback, TrainingArguments, cli, pays
from hf_coat.card import run_section
from hf_coat.record import read_run

# hidden, tokens -> BF16's time over FP8's: two sizes, the second without its smallest batch in FP8
FACTORS = {(1024, 256): 0.5, (1024, 1024): 0.9, (4096, 1024): 1.1, (4096, 4096): 1.7}


def write(file: Path, gpu: str) -> None:
    rows = [{"hidden": h, "tokens": t, "bf16_ms": 2.0, "lean_ms": 2.0 / f} for (h, t), f in FACTORS.items()]
    rows.append({"hidden": 4096, "tokens": 256, "bf16_ms": 2.0})
    file.write_text(json.dumps({"gpu": gpu, "rows": rows}))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """``table(gpu)``: the measured table is this page's, of that GPU."""

    def table(gpu):
        write(tmp_path / "pays.json", gpu)
        monkeypatch.setattr(pays, "FILE", tmp_path / "pays.json")
        pays.measured.cache_clear()

    yield table
    monkeypatch.undo()
    pays.measured.cache_clear()


def test_the_file_that_is_shipped():
    """It holds what the benchmark writes, of sizes that grow, or nothing yet."""
    found = pays.Measured.read(pays.FILE)
    assert (found.gpu is None) == (not found.factors)
    assert all(0.1 < factor < 4 for cells in found.factors.values() for factor in cells.values())


def test_what_the_benchmark_writes_is_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    rows = [
        {"peer": peer, "rows": [{"hidden": 1024, "tokens": 256, "ms": ms, "host_ms": 1.0, "spread_ms": 0.1}]}
        for peer, ms in (("bf16", 3.0), ("lean", 2.0))
    ]
    written = {"gpu": "some GPU"} | importlib.import_module("peers").pays(rows)
    (tmp_path / "pays.json").write_text(json.dumps(written))
    assert pays.Measured.read(tmp_path / "pays.json") == pays.Measured("some GPU", {1024: {256: 1.5}})


@pytest.mark.parametrize(
    ("hidden", "tokens", "factor"),
    [(h, t, f) for (h, t), f in FACTORS.items()]
    + [
        (1024, 512, 0.7),  # half way in log2(tokens)
        (2048, 1024, 1.0),  # half way in log2(hidden)
        (2048, 512, 0.9),  # (0.7 + 1.1) / 2, of which the second is that of the nearest batch
        (64, 1, 0.5),
        (8192, 10**6, 1.7),
        (64, 4096, 0.9),
        (4096, 256, 1.1),  # FP8 was not measured there
    ],
)
def test_between_and_beyond_what_was_measured(table, hidden, tokens, factor):
    table("some GPU")
    assert pays.pays(hidden, tokens, "some GPU") == pytest.approx(factor)


def test_nothing_is_said_of_what_was_not_measured(table, tmp_path):
    table("some GPU")
    assert pays.pays(64, 8192, "some GPU") is None, "so many tokens may make up for it"
    assert pays.pays(1024, 256, "another GPU") is None and pays.pays(1024, 256, None) is None
    (tmp_path / "none.json").write_text('{"gpu": "some GPU", "rows": []}')
    assert pays.Measured.read(tmp_path / "none.json") == pays.Measured(None, {})
    assert pays.speedup(None, 256, "some GPU") is None


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (LlamaConfig(hidden_size=64), 64),
        (BertConfig(hidden_size=64, num_attention_heads=4), 64),
        (LlavaConfig(text_config=LlamaConfig(hidden_size=64)), 64),
        (T5Config(), None),
        (None, None),
    ],
)
def test_hidden_size(config, width):
    assert pays.hidden_size(config) == width


@pytest.mark.parametrize(("batch", "factor"), [(16, 0.5), (64, 0.9), (128, 1.4)])
def test_a_run(table, tools, heard, tmp_path, batch, factor):
    """The size is the first batch's; one warning where FP8 does not pay; the figure is in the record and the card."""
    device = "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    table(device)
    model = tools.tiny_llama()
    model.config.hidden_size = 1024 if batch < 128 else 4096  # only named: the factors are those of such models
    args = TrainingArguments(
        **tools.short_run(tmp_path, coat="lean", per_device_train_batch_size=batch, gradient_accumulation_steps=1)
    )
    hooks = dict(model._forward_pre_hooks)
    trained = Trainer(model, args, train_dataset=tools.random_tokens(2 * batch))
    trained.train()
    found = {"hidden": model.config.hidden_size, "tokens": batch * 16, "gpu": device, "factor": pytest.approx(factor)}
    assert read_run(tmp_path)["speedup"] == found
    callback = next(c for c in trained.callback_handler.callbacks if isinstance(c, CoatCallback))
    assert callback.record["speedup"] == found
    warned = [line for line in heard.lines if "as fast as in BF16" in line]
    assert len(warned) == (factor < 1) and all("use larger batches" in line and device in line for line in warned)
    assert f"about {factor:.2f}x as fast" in run_section(read_run(tmp_path))
    assert len(model._forward_pre_hooks) == len(hooks) + 2, "all that is left is the fused loss's, and FSDP2's"


def test_a_run_on_another_gpu(table, tools, heard, tmp_path):
    table("some GPU")
    Trainer(
        tools.tiny_llama(),
        TrainingArguments(**tools.short_run(tmp_path, coat="lean")),
        train_dataset=tools.random_tokens(),
    ).train()
    assert read_run(tmp_path)["speedup"] is None and "as fast as" not in heard


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "about 0.50x as fast as in BF16, by a decoder layer of hidden size 1024 with 128 tokens, measured on X"),
        (["--batch", "8"], "about 0.90x"),  # 8 x 128 tokens
        (["--coat", "bf16"], None),
        (["--lora", "4"], None),
    ],
)
def test_estimate(table, tmp_path, capsys, options, said):
    table("X")
    LlamaConfig(
        hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, vocab_size=64
    ).save_pretrained(tmp_path)
    assert cli.main(["estimate", str(tmp_path), "--batch", "1", "--seq", "128", *options]) == 0
    out = capsys.readouterr().out
    assert said in out if said else "as fast as" not in out

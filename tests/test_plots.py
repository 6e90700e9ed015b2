"""The page of a run: which pictures there are, what they show, and the commands that make and strip."""

import json
import math

import pytest
from transformers import LlamaConfig

from hf_coat import CoatConfig, HfCoatConfig, cli
from hf_coat.card import BEGIN, run_metadata, run_section, with_section
from hf_coat.live import KINDS, RoundingHistory
from hf_coat.plots import MOST_POINTS, curve, write_page
from hf_coat.record import read_run, run_record, write_run

ROUNDED = 0.026


def record(steps=3, **changes):
    """A run of so many steps."""
    log = [{"step": step, "loss": 2 + 1 / step} for step in range(1, steps + 1)]
    for row in log:
        row |= {"coat/tokens_per_second": 5e4 + row["step"] % 7, "coat/mfu": 0.41}
    log.append({"step": steps, "eval_loss": 2.5})
    history = RoundingHistory()
    for step in (1, *range(20, steps + 1, 20)):
        history.add(step, {(f"model.layers.{i}", kind): {"error": ROUNDED} for i in range(16) for kind in KINDS})
    settings = {
        "coat": HfCoatConfig.resolve("lean").to_dict(), "conversion": None,
        "model": {"class": "LlamaForCausalLM", "parameters": 10**9, "trainable": 10**9, "dtypes": {}},
        "hardware": {"device": "NVIDIA H200", "memory_bytes": 150 * 10**9, "processes": 1}, "steps": steps,
        "resumed_at": [], "throughput": {"train_tokens_per_second": 1000.0}, "skipped_groups": 0,
        "speedup": {"factor": 0.8, "hidden": 4096, "tokens": 2048, "gpu": "NVIDIA H200"},
        "rounding": history.to_dict(),
        "memory": {"weights": 2 * 2**30, "optimizer_states": 2**31, "adamw_states": 2**32, "peak": 9 * 2**30},
        "log": log,
    }  # fmt: skip
    return run_record(**(settings | changes))


@pytest.mark.parametrize("steps", [1, 10_000])
def test_page(tmp_path, steps):
    files = write_page({"one": record(steps), "other & <b>": record(max(1, steps // 2))}, tmp_path)
    assert [file.name for file in files] == ["loss.png", "throughput.png", "memory.png", "rounding.png", "report.html"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files[:-1])
    page = files[-1].read_text()
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 4 and "href" not in page
    assert "other &amp; &lt;b&gt;" in page and "<b>" not in page


def test_no_figures_no_picture(tmp_path):
    bare = record(log=[], memory={"peak": None}, rounding=None)
    assert [file.name for file in write_page({"bare": bare}, tmp_path)] == ["report.html"]


def test_a_long_curve_is_made_of_means():
    log = [{"step": i, "loss": float(i % 2)} for i in range(10 * MOST_POINTS)] + [{"step": 7, "loss": None}]
    steps, values = curve(log, "loss")
    assert len(steps) <= MOST_POINTS + 1 and steps[0] == 9 and all(value == 0.5 for value in values[:-1])


def test_record_round_trip(tmp_path):
    made = record(log=[{"step": 1, "loss": math.nan, "grad_norm": math.inf}])
    write_run(made, tmp_path)
    assert read_run(tmp_path) == read_run(tmp_path / "coat_run.json") == json.loads(json.dumps(made))
    assert made["log"] == [{"step": 1, "loss": None, "grad_norm": None}]
    assert [file.name for file in tmp_path.iterdir()] == ["coat_run.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no record of a run"),
        ('{"schema_version": 99, "coat": {}, "log": []}', "version 99.*upgrade"),
        ('{"schema_version": 1, "coat": {}, "log": []}', "its model, versions, hardware"),
        (json.dumps(record(log=[{"step": 1}]) | {"log": [[1]]}), "its log$"),
        (json.dumps(record()).replace('"steps": 3', '"steps": ' + "9" * 5000), "not valid JSON"),
    ],
)
def test_what_is_no_record(tmp_path, text, said):
    (tmp_path / "coat_run.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_run(tmp_path)


def test_card_section_is_replaced():
    first, second = (run_section(record(steps)) for steps in (3, 5))
    card = with_section("# A model\n\ntext\n", first)
    assert with_section(card, second) == with_section("# A model\n\ntext\n", second)
    assert card.count(BEGIN) == 1 and "| evaluation loss | 2.5000 at step 3 |" in first
    (result,) = run_metadata(record(), "name")["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 2.5
    assert "model-index" not in run_metadata(record(log=[]), "name")


def test_report_command(tmp_path, capsys):
    for name, steps in (("a", 3), ("b", 4)):
        (tmp_path / name).mkdir()
        write_run(record(steps), tmp_path / name)
    assert cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "page")]) == 0
    assert "report.html" in capsys.readouterr().out and (tmp_path / "page" / "loss.png").exists()
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "there is no coat_run.json" in capsys.readouterr().err


def test_strip_command(tmp_path, capsys):
    config = LlamaConfig(hidden_size=64)
    config.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    marked = plain | {"quantization_config": CoatConfig().to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(marked))
    assert cli.main(["strip", str(tmp_path)]) == 0
    assert "removed quantization_config" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text()) == plain
    foreign = json.dumps(plain | {"quantization_config": {"quant_method": "fp8"}})
    (tmp_path / "config.json").write_text(foreign)
    assert cli.main(["strip", str(tmp_path)]) == 0 and (tmp_path / "config.json").read_text() == foreign


def test_bench_command(tmp_path, capfd, monkeypatch):
    """A script that stands for a benchmark: what it is given, and what comes of its end."""
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path)
    assert cli.main(["bench", "lora"]) == 1
    assert "there is no lora.py" in (said := capfd.readouterr().err) and "pip install -e ." in said
    (tmp_path / "peers.py").write_text("import sys; print(sys.argv[1:]); sys.exit('--tiny' not in sys.argv)")
    assert cli.main(["bench", "stack", "--peers", "bf16", "lean", "--tiny"]) == 0
    assert "['stack', '--peers', 'bf16', 'lean', '--tiny']" in capfd.readouterr().out
    assert cli.main(["bench"]) == 1 and "peers.py layer ended with exit status 1" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["strip", str(tmp_path), "--tiny"])


def test_each_case_has_its_script():
    assert all((cli.BENCHMARKS / script).is_file() for script, *_ in cli.CASES.values())

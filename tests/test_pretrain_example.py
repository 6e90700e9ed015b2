"""``examples/pretrain.py`` and the benchmark that runs it several times: a small text on the CPU, the whole path."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_coat

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scripts():
    """The example's files and the benchmark, as modules."""
    folders = [str(ROOT / name) for name in ("examples", "benchmarks")]
    sys.path[:0] = folders
    try:
        import corpus
        import pretrain
        import pretrain_runs

        yield types.SimpleNamespace(corpus=corpus, pretrain=pretrain, runs=pretrain_runs)
    finally:
        for folder in folders:
            sys.path.remove(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sixty files of this repository's own text, no two alike."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"{i}.md").write_text(f"# Document {i}\n\n{text[i * 50 : i * 50 + 2000]}", encoding="utf-8")
    return folder


def test_corpus(scripts, folder, tmp_path):
    """Each document once, whole, in one of the two parts; what is no text is not read."""
    text = tmp_path / "text"
    (text / "inner").mkdir(parents=True)
    for path in folder.iterdir():
        (text / path.name).write_bytes(path.read_bytes())
    (text / "inner" / "copy.txt").write_bytes((folder / "0.md").read_bytes())
    (text / "inner" / "data.txt").write_bytes(b"\xff\xfe not UTF-8")
    (text / "inner" / "program.so").write_text("another kind of file")
    (text / "inner" / "large.txt").write_text("x" * (scripts.corpus.LARGEST_FILE + 1))
    settings = {"vocab_size": 300, "held_out_tokens": 3000}
    corpus = scripts.corpus.load_corpus(tmp_path / "cache", [text], **settings)

    def read(ids):
        return corpus.tokenizer.decode(ids).split(scripts.corpus.END)[:-1]

    held_out, training = read(corpus.held_out), read(corpus.training)
    assert len(corpus.held_out) >= 3000 > len(corpus.held_out) - len(corpus.tokenizer(held_out[-1])["input_ids"]) - 1
    assert sorted(held_out + training) == sorted(path.read_text(encoding="utf-8") for path in folder.iterdir())
    assert corpus.about["files"] == 60
    assert corpus.about["tokens"] == len(corpus.held_out) + len(corpus.training)

    written = (tmp_path / "cache" / scripts.corpus.TOKENS).stat().st_mtime_ns
    again = scripts.corpus.load_corpus(tmp_path / "cache", [text], **settings)
    assert (tmp_path / "cache" / scripts.corpus.TOKENS).stat().st_mtime_ns == written, "it is not made twice"
    assert again.about == corpus.about
    other = scripts.corpus.load_corpus(tmp_path / "cache", [text], vocab_size=300, held_out_tokens=6000)
    assert len(other.held_out) >= 6000, "other settings make another one"
    with pytest.raises(ValueError, match="hold out 1000000"):
        scripts.corpus.load_corpus(tmp_path / "cache", [text], vocab_size=300, held_out_tokens=1_000_000)


def test_order_of_the_data(scripts):
    """Every pass has every block once, in another order; the seed decides, and what was read leaves its checksum."""
    order = scripts.corpus.passes(blocks=50, rows=120, seed=0)
    first, second, rest = order[:50], order[50:100], order[100:]
    assert sorted(first) == sorted(second) == list(range(50))
    assert len(set(rest)) == 20
    assert not np.array_equal(first, second)
    assert np.array_equal(order, scripts.corpus.passes(50, 120, seed=0))
    assert not np.array_equal(order, scripts.corpus.passes(50, 120, seed=1))
    with pytest.raises(ValueError, match="shorter than one sequence"):
        scripts.corpus.passes(blocks=0, rows=1, seed=0)

    tokens = np.arange(8 * 50 + 3, dtype=np.uint16)  # three are left over
    forward, again, backward = (scripts.corpus.Blocks(tokens, 8, o) for o in (None, None, np.arange(50)[::-1]))
    for blocks in (forward, again, backward):
        rows = [blocks[i] for i in range(len(blocks))]
    assert rows[0]["input_ids"].tolist() == rows[0]["labels"].tolist() == list(range(392, 400))
    assert rows[0]["input_ids"].dtype == torch.int64
    assert forward.digest.digest() == again.digest.digest() != backward.digest.digest()


@pytest.fixture
def pretrain(scripts, folder, tmp_path, monkeypatch):
    """Run the example in this process, but for the program that reads its checkpoint; returns its record."""

    def run(*options: str) -> dict:
        monkeypatch.setattr(scripts.pretrain, "plain_loss", lambda checkpoint, script_args: math.nan)
        places = ["--text", str(folder), "--corpus", str(tmp_path / "corpus"), "--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "--tiny", "--disable_tqdm", "true", *places, *options])
        scripts.pretrain.main()
        return json.loads((tmp_path / "out" / scripts.runs.RECORD).read_text())

    return run


def test_stops_in_time(scripts, pretrain):
    """A training that takes too long ends at a step, and is evaluated and recorded as what it is."""
    record = pretrain("--max_seconds", "0")
    assert (record["steps"], record["planned_steps"]) == (1, scripts.pretrain.TINY["max_steps"])
    assert list(record["train_loss"]) == ["1"]
    assert record["held_out_loss"] > 0


def test_the_same_but_for_coat(scripts, pretrain):
    """BF16 and COAT train on the same rows from the same weights, and both learn."""
    bf16, lean = pretrain(), pretrain("--coat", "lean")
    assert bf16["arguments"]["coat"] is None
    assert lean["arguments"]["coat"]["optimizer"] is not None
    assert bf16["data_sha256"] == lean["data_sha256"]
    assert bf16["tokens"] == lean["tokens"] == 30 * 4 * 2 * 64
    learned = math.log(scripts.pretrain.TINY["vocab_size"]) - bf16["held_out_loss"]
    assert learned > 0
    assert abs(lean["held_out_loss"] - bf16["held_out_loss"]) < learned / 2
    assert lean["memory"]["optimizer_states"] < bf16["memory"]["optimizer_states"] / 3, "E4M3 and its scales, not FP32"


def test_bf16_weights(scripts, pretrain, tmp_path):
    """The same numbers at first, but for their rounding; what lies beside BF16 weights is what their variant says."""
    rows = {}
    for variant in ("optimizer", "bf16-weights", "bf16-weights-nearest", "bf16-weights-master"):
        rows[variant] = pretrain("--max_steps", "10", *scripts.runs.parse_run(variant)[2])
    shared = {variant: scripts.runs.shared(row) for variant, row in rows.items()}
    assert all(settings == shared["optimizer"] for settings in shared.values()), "runs that one table compares"
    dtypes = [row["weights_dtype"] for row in rows.values()]
    assert dtypes == ["float32", "bfloat16", "bfloat16", "bfloat16"]
    full, plain, nearest, master = (row["memory"] for row in rows.values())
    count = shared["optimizer"]["parameters"]
    assert full["weights"] - plain["weights"] == full["gradients"] - plain["gradients"] == 2 * count
    assert full["optimizer_states"] == nearest["optimizer_states"] == master["optimizer_states"] - count
    # One step of the same rounded weights, from which only the next BF16 number is as far away as 2**-8 of a weight.
    losses = [next(iter(row["train_loss"].values())) for row in rows.values()]
    assert losses == pytest.approx([losses[0]] * 4, rel=2**-8)
    with pytest.raises(SystemExit):
        pretrain("--weights_dtype", "float16")


def test_runs(scripts, folder, tmp_path, monkeypatch, capfd):
    """The benchmark: a process for each run, a checkpoint that transformers reads alone, the file and the table."""
    options = ["--tiny", "--text", str(folder), "--folder", str(tmp_path), "--json", str(tmp_path / "runs.json")]
    monkeypatch.setattr(sys, "argv", ["pretrain_runs.py", "lean:1", "--steps", "8", *options])
    scripts.runs.main()
    result = json.loads((tmp_path / "runs.json").read_text())
    (row,) = result["rows"]
    assert (row["name"], row["seed"], row["steps"], result["planned_steps"]) == ("lean", 1, 8, 8)
    assert result["arguments"]["bf16"] is True
    # The same weights: BF16 instead of FP32 weights, or of FP8 products, moves the loss by less than E4M3's 2**-4.
    assert row["held_out_loss_bf16"] == pytest.approx(row["held_out_loss"], rel=2**-4)
    printed = [line.split()[:3] for line in capfd.readouterr().out.splitlines()]
    assert ["lean:1", "8", f"{row['held_out_loss']:.4f}"] in printed


def test_branches(scripts, folder, tmp_path, monkeypatch, capfd):
    """Runs go on from the first one's weights and states, on the same rows; which need torch's AdamW."""
    options = ["--tiny", "--text", str(folder), "--folder", str(tmp_path), "--json", str(tmp_path / "runs.json")]
    options += ["--steps", "8", "--branch_at", "5", "--logging_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["pretrain_runs.py", "bf16", "paper", "lean-model", *options])
    scripts.runs.main()
    result = json.loads((tmp_path / "runs.json").read_text())
    base, *branches = result["rows"]
    assert result["branch_at"] == 5
    assert [row.get("branched_at") for row in result["rows"]] == [None, 5, 5]
    assert branches[0]["data_sha256"] == branches[1]["data_sha256"] != base["data_sha256"], "three steps of eight"
    start = [base["train_loss"][str(step)] for step in range(1, 6)]
    fall = start[0] - start[-1]
    for row in branches:
        losses = [row["train_loss"][str(step)] for step in range(1, 9)]
        assert losses[:5] == start
        assert losses[5] == pytest.approx(base["train_loss"]["6"], abs=fall / 50), "the same weights and rows"
        assert losses[7] == pytest.approx(base["train_loss"]["8"], abs=fall / 20), "the same moments"
        assert losses[5:] != [base["train_loss"][str(step)] for step in range(6, 9)], "in FP8"
    assert "NOT THE SAME DATA" not in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", ["pretrain_runs.py", "bf16", "lean-model", *options, "--max_seconds", "75"])
    assert (tmp_path / "bf16-0" / "checkpoint-5").exists()
    with pytest.raises(SystemExit, match="failed: "):  # there is no time to start any
        scripts.runs.main()
    assert not (tmp_path / "bf16-0" / "checkpoint-5").exists(), "nobody branches off an earlier call's"
    monkeypatch.setattr(sys, "argv", ["pretrain_runs.py", "lean", "paper", *options])
    with pytest.raises(SystemExit, match="'lean' comes first of its seed and has COAT's optimizer"):
        scripts.runs.main()


def test_table(scripts):
    """Gaps stand only where they mean something, and what went wrong is said."""
    losses = {"held_out_loss": 2.5, "held_out_loss_bf16": 2.6, "tokens_per_second": 1e5, "peak_bytes": 2**31}
    base = {"name": "bf16", "seed": 0, "steps": 40, "data_sha256": "a", "train_loss": {"20": 3.0, "40": 2.0}, **losses}
    rows = [
        base,
        {**base, "name": "lean", "held_out_loss": 2.51, "train_loss": {"20": 3.1, "40": 2.3}},
        {**base, "name": "paper", "steps": 20, "train_loss": {"20": 3.5}},
        {**base, "name": "other", "data_sha256": "b"},
        {**base, "seed": 1, "data_sha256": "c", "held_out_loss": 2.53},
    ]
    head, *lines, spread = scripts.runs.table(rows, planned_steps=40).splitlines()
    bf16, lean, paper, other, seed = (line.split() for line in lines)
    assert bf16 == ["bf16", "40", "2.5000", "2.6000", "100,000", "2.0"]
    assert lean == ["lean", "40", "2.5100", "+0.0100", "2.6000", "+0.0000", "+0.2000", "100,000", "2.0"]
    assert paper[:5] == ["paper", "20", "2.5000", "2.6000", "+0.5000"], "no gap between different steps"
    assert "stopped before step 40" in lines[2]
    assert "NOT THE SAME DATA" in lines[3]
    assert seed[:4] == ["bf16:1", "40", "2.5300", "+0.0300"]
    assert "NOT" not in lines[4], "another seed has other data"
    assert spread == "spread of the 2 seeds of bf16: 0.0300"
    rows += [{**base, "name": "lean", "seed": 1, "data_sha256": "c", "held_out_loss": 2.56}]
    *_, gap, spread, _, pairs = scripts.runs.table(rows, planned_steps=40).splitlines()
    assert gap.split()[:4] == ["lean:1", "40", "2.5600", "+0.0300"], "to the first run of its seed"
    assert pairs == "lean less bf16, 2 seeds: +0.0200 in the mean, standard error 0.0100"


def test_names_of_runs(scripts):
    assert scripts.runs.parse_run("bf16") == ("bf16", 0, [])
    assert scripts.runs.parse_run("lean:2") == ("lean", 2, ["--coat", "lean"])
    name, seed, arguments = scripts.runs.parse_run("bf16-weights-master:3")
    assert (name, seed, arguments[:2]) == ("bf16-weights-master", 3, ["--weights_dtype", "bfloat16"])
    recipe = hf_coat.HfCoatConfig.from_dict(json.loads(arguments[-1]))
    assert recipe == hf_coat.HfCoatConfig(model=None, optimizer=hf_coat.CoatOptimizerConfig(weights="master"))
    assert scripts.runs.parse_run('mine:1={"model": null}') == ("mine", 1, ["--coat", '{"model": null}'])
    model_only = json.loads(scripts.runs.parse_run("paper-model")[2][1])
    assert model_only["optimizer"] is None
    assert model_only["model"]["granularity"] == "tensor"
    with pytest.raises(SystemExit, match="'bf61' is no run"):
        scripts.runs.parse_run("bf61")


def test_a_second_call_adds_runs(scripts, tmp_path, capsys):
    """Rows of a file stay if everything else in it is the same."""
    file = tmp_path / "runs.json"
    assert scripts.runs.earlier_rows(file, {"gpu": "a"}) == scripts.runs.earlier_rows(None, {"gpu": "a"}) == {}
    row = {"name": "bf16", "seed": 1, "held_out_loss": 2.0}
    file.write_text(json.dumps({"gpu": "a", "commit": "c", "rows": [row, {**row, "seed": 2, "commit": "d"}]}))
    rows = scripts.runs.earlier_rows(file, {"gpu": "a"})
    assert rows["bf16", 1] == {**row, "commit": "c"}
    assert rows["bf16", 2] == {**row, "seed": 2, "commit": "d"}
    assert capsys.readouterr().out == ""
    assert scripts.runs.earlier_rows(file, {"gpu": "b"}) == {}
    assert "not kept" in capsys.readouterr().out

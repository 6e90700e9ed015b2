"""The training benchmarks run, with a tiny model on the CPU, and say of every peer what became of it."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from coat_kernels import Granularity

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder's modules, which import each other as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(case: str, *arguments: str, folder: Path) -> dict:
    """The rows that ``peers.py`` writes, by peer."""
    result = folder / "result.json"
    command = [sys.executable, str(BENCHMARKS / "peers.py"), case, "--tiny", "--json", str(result), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return {row["peer"]: row for row in json.loads(result.read_text())["rows"]}


def test_every_peer_has_a_row(tmp_path):
    rows = run("stack", "--iterations", "1", "--peers", "nvcoat", "lean", folder=tmp_path)
    assert list(rows) == ["nvcoat", "lean"]
    assert "LlamaForCausalLM" in rows["nvcoat"]["skipped"]  # it is one layer
    assert rows["lean"].get("ms", 0) > 0, rows["lean"]
    assert rows["lean"]["tokens_per_second"] == pytest.approx(2 * 16 / rows["lean"]["ms"] * 1e3)


def test_the_trainer_run(tmp_path):
    rows = run("step", "--steps", "3", "--warmup", "1", "--peers", "lean", folder=tmp_path)
    row = rows["lean"]
    assert row.get("steps_measured") == 2, row
    # two codes and, for each group of 128 of a row, two float32 scales and two 8-bit expansions; rows here are shorter
    assert 2 < row["state_bytes_per_parameter"] < 4, "not CoatAdamW's states"


def test_a_failing_peer_is_recorded(tmp_path, benchmarks):
    script = tmp_path / "broken.py"
    script.write_text("raise ValueError('no such kernel')")
    failed = benchmarks("environment").fresh_process(str(script))
    assert failed["error"].endswith("ValueError: no such kernel")
    script.write_text("import time; time.sleep(60)")
    assert "0.5 s" in benchmarks("environment").fresh_process(str(script), timeout=0.5)["error"]


def test_pays_puts_the_peers_side_by_side(benchmarks):
    times = {"hidden": 1024, "tokens": 256, "spread_ms": 0.1}
    rows = [
        {"peer": "bf16", "rows": [times | {"ms": 2.0, "host_ms": 1.0}]},
        {"peer": "lean", "rows": [times | {"ms": 3.0, "host_ms": 2.5}]},
        {"peer": "paper", "error": "out of memory"},
    ]
    table = benchmarks("peers").pays(rows)
    beside = {"bf16_ms": 2.0, "bf16_host_ms": 1.0, "lean_ms": 3.0, "lean_host_ms": 2.5}
    assert table == {"rows": [{"hidden": 1024, "tokens": 256} | beside], "missing": [rows[2]]}


def test_text_tokens_keep_their_resolution_beside_outliers(benchmarks):
    """The modality claim, at one point: with a scale per token text tokens do not see image tokens."""
    row = {
        (scale, factor): benchmarks("modality").through_linear(
            factor, Granularity(scale), text=16, image=16, width=64
        )["forward"]
        for scale in ("token", "tensor")
        for factor in (1.0, 2.0**16)
    }
    # Two operands, each rounded with a relative error of 0.026.
    assert max(row["token", 1.0], row["token", 2.0**16], row["tensor", 1.0]) < 1.2 * 2**0.5 * 0.026
    assert row["tensor", 2.0**16] > 0.1


@pytest.mark.parametrize("case", ["llava", "qwen"])
def test_vision_language_models(case, benchmarks):
    """A row of a tiny model whose tower is frozen, and what of it trains."""
    options = argparse.Namespace(case=case, train="all but the tower", peer="lean", tiny=True, batch=2, iterations=1)
    options.trace = False
    row = benchmarks("vlm").run(options)
    images = {"llava": [4, 4], "qwen": [1, 2]}[case]
    assert row["tokens"] == sum(images) + 2 * 128
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["ms"] * 1e3)
    assert 0 < row["trainable"] < row["parameters"]

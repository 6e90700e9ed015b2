"""The training benchmarks run, with a tiny model on the CPU, and say of every peer what became of it."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen
from coat_kernels import Granularity

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder's modules, which import each other as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("lora", "vlm"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # an example has the same name
    return importlib.import_module


def run(*arguments: str, folder: Path, script: str = "peers.py") -> dict:
    """The rows that ``peers.py`` writes, or another script, by peer."""
    result = folder / "result.json"
    command = [sys.executable, str(BENCHMARKS / script), "--tiny", "--json", str(result), *arguments]
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
    rows = run("step", "--steps", "3", "--warmup", "1", "--peers", "lean", "--release", folder=tmp_path)
    row = rows["lean"]
    assert row.get("steps_measured") == 2, row
    # two codes and, for each group of 128 of a row, two float32 scales and two 8-bit expansions; rows here are shorter
    assert 2 < row["state_bytes_per_parameter"] < 4, "not CoatAdamW's states"


def test_lora(tmp_path):
    rows = run("--peers", "bf16", "lean", folder=tmp_path, script="lora.py")
    assert all(row.get("ms", 0) > 0 for row in rows.values()), rows
    assert rows["bf16"]["base_bytes_per_weight"] == 2
    # a byte, and 4 for each row of 64 to 176 values
    assert 1 + 4 / 176 < rows["lean"]["base_bytes_per_weight"] < 1 + 4 / 64
    assert rows["lean"]["losses"] == pytest.approx(rows["bf16"]["losses"], rel=0.01)


def test_losses_of_lora_on_real_text(tmp_path):
    """Each peer sees the same text, from files; its losses are those of BF16 within what FP8 rounds."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(8):
        (text / f"{i}.c").write_text("".join(f"int f{n}(int x) {{ return x * {n * i}; }}\n" for n in range(40)))
    chosen = ["--peers", "bf16", "lean", "--text", str(text), "--learning-rate", "1e-3"]
    rows = run(*chosen, "--plot", str(tmp_path / "losses.png"), folder=tmp_path, script="lora_losses.py")
    lean, bf16 = rows["lean"], rows["bf16"]
    assert len(lean["losses"]) == 10 and lean["held_out_after"] < lean["held_out_before"]
    assert lean["losses"] == pytest.approx(bf16["losses"], rel=0.01)
    assert json.loads((tmp_path / "result.json").read_text())["text"]["files"] == 8
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes(tmp_path):
    """FSDP2 gathers a layer's weights for its forward and again for its backward, embeddings and head once."""
    rows = run("--peers", "lean-fsdp2-values", "lean-fsdp2", folder=tmp_path, script="sharded.py")
    for row in rows.values():
        assert row.get("ms", 0) > 0, row
    values, codes = (rows[name]["bytes_in_collectives"]["all_gather"] for name in ("lean-fsdp2-values", "lean-fsdp2"))
    half = rows["lean-fsdp2"]["parameters"] * 2 / 2  # bytes of BF16
    assert half < values < 2 * half and codes < values


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


def script(name: str, *arguments: str, folder: Path) -> dict:
    """What a benchmark writes as JSON."""
    result = folder / "result.json"
    command = [sys.executable, str(BENCHMARKS / name), *arguments, "--json", str(result)]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())


def test_optimizers(tmp_path):
    options = [
        "--tiny",
        "--iterations",
        "1",
        "--warmup",
        "1",
        "--peers",
        "torch-foreach",
        "lean",
        "lean-master",
        "paper",
    ]
    rows = {row["peer"]: row for row in script("optimizer.py", *options, folder=tmp_path)["rows"]}
    assert [round(row["state_bytes_per_parameter"], 1) for row in rows.values()] == [4.0, 2.1, 3.1, 2.2], rows
    assert all(row["ms_per_billion"] > 0 for row in rows.values())


def test_state_formats(tmp_path):
    """On moments of Gaussian gradients of many sizes lean has less than 0.65 of the paper's error."""
    generator = torch.Generator().manual_seed(0)
    m, v = torch.zeros(2, 16, 300)
    for _ in range(100):
        g = torch.randn(16, 300, generator=generator)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    file = tmp_path / "states-100.pt"
    torch.save({"step": 100, "states": {"w": {"exp_avg": m, "exp_avg_sq": v, "grad": g}}}, file)
    rows = {row["format"]: row for row in script("state_formats.py", "study", str(file), folder=tmp_path)["rows"]}
    assert rows["lean 128"]["error"] < 0.65 * rows["paper 128"]["error"] < rows["e4m3 128"]["error"]
    assert rows["lean 128"]["bytes_per_parameter"] == 2 + 8 * 3 / 300


def test_states_are_captured(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.md").write_text(f"# {i}\n" + "".join(f"{i * j} words of text {j} {i}. " for j in range(150)))
    sizes = '{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}'
    command = [sys.executable, str(BENCHMARKS / "state_formats.py"), "capture", str(tmp_path / "states"), "--at", "2"]
    command += ["--tiny", "--max_steps", "2", "--sizes", sizes, "--text", str(text), "--corpus", str(tmp_path / "c")]
    command += ["--output_dir", str(tmp_path / "run"), "--bf16", "false", "--vocab_size", "300"]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    captured = torch.load(tmp_path / "states" / "states-2.pt", weights_only=True)
    assert captured["step"] == 2 and len(captured["states"]) == 12
    for state in captured["states"].values():
        assert set(state) == {"exp_avg", "exp_avg_sq", "grad"} and all(t.any() for t in state.values())


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


@pytest.mark.parametrize(("case", "peer"), [("llava", "lean"), ("qwen", "uniform")])
def test_vision_language_models(case, peer, benchmarks, monkeypatch):
    """A row of a tiny model whose tower is frozen, and what of it trains; Qwen's windows by one call a layer."""
    seen = []

    def varlen_attn(q, k, v, bounds, bounds_k, longest, longest_k):
        seen.append(bounds.tolist())
        assert torch.equal(bounds, bounds_k) and longest == longest_k == bounds.diff().max()
        windows = zip(
            *(x.transpose(0, 1)[None].tensor_split(bounds[1:-1].long(), dim=2) for x in (q, k, v)), strict=True
        )
        out = [torch.nn.functional.scaled_dot_product_attention(*window) for window in windows]
        return torch.cat(out, dim=2)[0].transpose(0, 1)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    options = argparse.Namespace(case=case, train="all but the tower", peer=peer, tiny=True, batch=2, iterations=1)
    options.trace, options.attention = False, "varlen"
    row = benchmarks("vlm").run(options)
    images = {"llava": [4, 4], "qwen": [1, 2]}[case]
    assert row["tokens"] == sum(images) + 2 * 128
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["ms"] * 1e3)
    assert 0 < row["trainable"] < row["parameters"]
    assert all(bounds == [0, 4, 12] for bounds in seen) and bool(seen) == (case == "qwen")
    options.peer = "text-only"
    if case == "qwen":  # whose tower's sizes are no multiples of 8, as those of the real one
        assert benchmarks("vlm").run(options)["tokens"] == row["tokens"]
    else:
        with pytest.raises(benchmarks("peer_models").Unavailable, match="the same as lean"):
            benchmarks("vlm").run(options)


@pytest.mark.parametrize("case", ["llava", "qwen"])
@pytest.mark.parametrize("peer", ["bf16", "lean", "text-only"])
def test_vision_language_models_that_train_whole(case, peer, benchmarks):
    options = argparse.Namespace(case=case, train="everything", peer=peer, tiny=True, batch=2, iterations=1)
    options.trace, options.attention = False, "default"
    row = benchmarks("vlm").run(options)
    assert row["ms"] > 0 and row["trainable"] == row["parameters"]


def test_what_fsdp2_gathers(tmp_path):
    result = tmp_path / "result.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--tiny", "--layers", "1", "--steps", "1", "--json", str(result)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(BENCHMARKS / "fsdp_gather.py"), *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text())["rows"]
    assert [row["peer"].split()[0] for row in rows] == ["bf16", "fp8"] * 2
    for values, codes in zip(rows[::2], rows[1::2], strict=True):  # four bytes for each row of 64 or 96 values
        assert 0.5 < codes["gathered"] / values["gathered"] < 0.5 * (1 + 4 / 64) + 0.01


def test_what_fits(benchmarks, monkeypatch):
    """More GPUs hold more, and the row's step is the one of the largest batch."""
    fits = benchmarks("fits")
    wide = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=16)
    monkeypatch.setitem(fits.SHAPES, "7b", wide)
    rows = fits.largest("7b", "BF16 weights, BF16", [1, 8], 24)
    assert rows[0]["largest_batch"] <= rows[1]["largest_batch"]
    assert all(0.9 * 23.6 < row["step"]["peak"] / 2**30 + 1 < 23.6 for row in rows)
    nothing = rows[0] | {"recipe": "paper", "largest_batch": 0}
    cell = f"{rows[0]['largest_batch']} ({rows[0]['step']['peak'] / 2**30:.1f} GiB)"
    assert fits.table([rows[0], nothing]).splitlines()[-1] == f"| 7B on 1 GPU | {cell} | - |"


def test_estimates_in_a_table(benchmarks):
    row = {"setting": "7b-lora-lean", "coat": "lean", "batch": 4, "length": 2048, "error": -0.0093}
    row |= {"estimated": 23.28 * 2**30, "measured": 23.5 * 2**30}
    check = benchmarks("estimate_check")
    lines = check.table([row, {"setting": "llava-1b-bf16", "failed": "out of memory"}]).splitlines()
    assert lines[2] == "| 7 B Llama, LoRA 16 | lean | 4 x 2048 | 23.28 GiB | 23.50 GiB | -0.9% |"
    assert "CLIP tower" in lines[3] and "failed" in lines[3]
    assert set(check.SETTINGS) >= {"1b-lean", "7b-paper", "7b-lora-lean", "llava-1b-lean"}

"""The stock Trainer in two processes, under DDP and under FSDP2, against one process with the same global batches."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights

from hf_coat.modules.loss import library

WORKER = Path(__file__).with_name("trainer_processes.py")
IN_ONE = ["full_ddp", "bf16_ddp", "lora_ddp", "vlm_ddp", "resumed_sharded", "resumed_whole"]
FSDP2 = ["full_sharded", "full_whole", "bf16_whole", "lora_whole", "vlm_whole", "accumulated_whole"]
IN_TWO = [*FSDP2, *IN_ONE, "accumulated_ddp", "options", "again_sharded", "again_whole", "recovered"]
ON_GPUS = {1: ["full_ddp", "resumed_sharded", "resumed_whole"], 2: ["full_ddp", "full_sharded", "full_whole"]}
ON_GPUS[2] += ["resumed_sharded", "resumed_whole", "again_sharded", "again_whole"]
SECONDS = 400  # all of it takes about 60 where nothing else runs
GRACE = 60  # within which a process notices that another one is gone, here by its closed connection


def processes(folder, device, places, scenarios):
    """How processes that run scenarios ended, ``(rank, world_size)`` each, and their logs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    runs, logs, meeting = [], [], tempfile.mkdtemp(dir=folder)
    for rank, world_size in places:
        command = [sys.executable, WORKER, folder, rank, world_size, meeting, device, *scenarios[world_size]]
        logs.append(folder / f"log-{world_size}-{rank}")
        with logs[-1].open("w") as log:
            runs.append(subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment))
    end = time.monotonic() + SECONDS
    try:
        while any(run.poll() is None for run in runs) and not any(run.poll() for run in runs):
            assert time.monotonic() < end, "not done in time"
            time.sleep(0.1)
        end = time.monotonic() + GRACE
        while any(run.poll() is None for run in runs) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for run in runs:
            run.kill()
            run.wait()
    return [run.returncode for run in runs], [log.read_text() for log in logs]


def start(folder, device, scenarios):
    """All scenarios, in one process and in two, which run side by side."""
    codes, logs = processes(folder, device, ((0, 1), (0, 2), (1, 2)), scenarios)
    for code, log in zip(codes, logs, strict=True):
        assert code == 0, log[-5000:]
    return lambda name, world_size=2, rank=0: torch.load(folder / f"{name}-{world_size}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def killed(folder):
    """How two processes ended, the second of which was killed while it saved, and what they said."""
    return processes(folder, "cpu", ((0, 2), (1, 2)), {2: ["killed"]})


@pytest.fixture(scope="module")
def result(folder, killed):
    """What a scenario gave in a process."""
    return start(folder, "cpu", {1: IN_ONE, 2: IN_TWO})


def near(losses, alone, bf16=False):
    """Sums are taken in another order. Losses that are BF16 themselves differ by one of its steps and more."""
    assert losses[0] == pytest.approx(alone[0], rel=2**-8 if bf16 else 1e-5)
    assert losses == pytest.approx(alone, rel=2**-7 if bf16 else 2e-3)
    assert len(set(alone)) == len(alone), "nothing was learned"


@pytest.mark.parametrize("kind", ["ddp", "whole"])
@pytest.mark.parametrize("model", ["full", "bf16", "lora", "vlm", "accumulated"])
def test_losses_are_those_of_one_process(result, model, kind):
    """The global batch of ``accumulated`` is that of ``full``, in two microbatches on each process."""
    alone = result("full_ddp" if model == "accumulated" else f"{model}_ddp", 1)
    two = [result(f"{model}_{kind}", 2, rank) for rank in (0, 1)]
    assert two[0]["losses"] == two[1]["losses"] and two[0]["norms"] == two[1]["norms"]
    near(two[0]["losses"], alone["losses"], bf16=model == "bf16")
    assert two[0]["norms"][0] == pytest.approx(alone["norms"][0], rel=2**-8)  # gradients are BF16 in some of them
    assert two[0]["sharded"] == (kind == "whole"), "which parameters are DTensors"
    assert two[0]["bucket_views"] is (True if kind == "ddp" else None), "no second copy of the gradients"
    there = kind == "ddp" and model != "lora"  # adapters are no converted linears
    assert two[0]["made_there"] == (["hf_coat.functional.buckets"] if there else [])
    assert all(two[0]["fused"]) and bool(two[0]["fused"]) == (library("cpu") is not None), "logits were computed"
    assert two[0]["states"] == alone["states"] > 0
    if kind == "whole":  # each process has half of the states, but for rows that two cannot share evenly
        assert sum(r["local_bytes"] for r in two) == pytest.approx(alone["local_bytes"], rel=0.01)


def test_more_of_fsdp2(result):
    """Its own activation checkpointing, and weights that only the first process has before they are shared out."""
    straight = result("full_whole")
    near(result("options")["losses"], straight["losses"])
    assert result("options")["sharded"] == 1


def test_one_process_tells_and_writes(result, folder):
    for name in ("full_ddp", "full_sharded", "full_whole", "lora_whole", "vlm_whole"):
        first, second = (result(name, 2, rank)["said"] for rank in (0, 1))
        assert second == []
        assert sum("converted" in line for line in first) == 1, first
        assert sum("the optimizer's states took" in line for line in first) == 1, first
    record = json.loads((folder / "full-sharded-2" / "coat_run.json").read_text())
    assert record["hardware"]["processes"] == 2


@pytest.mark.parametrize("kind", ["ddp", "whole"])
def test_gradients_are_whole_between_microbatches(result, kind):
    """Under FSDP2 too: what the estimate says of accumulation."""
    assert set(result(f"accumulated_{kind}")["between"]) == {1.0}


@pytest.mark.parametrize("kind", ["sharded", "whole"])
def test_resuming(result, kind):
    """On as many processes not a bit differs; on another number sums are taken in another order."""
    resumes_as_if_never_stopped(result, kind, saved=2)


def resumes_as_if_never_stopped(result, kind, saved):
    straight = result(f"full_{kind}")["losses"]
    assert result(f"again_{kind}")["losses"] == straight
    between = result(f"resumed_{kind}", 1)["losses"]
    near(between, straight[: len(between)])
    assert between[:saved] == straight[:saved], "the log of the steps before comes from the checkpoint"
    after = result(f"resumed_{kind}")["losses"]
    near(after, straight)
    assert after[: len(between)] == between and len(after) == len(straight)


def test_a_process_that_dies_while_it_saves(result, folder, killed):
    """The other one ends with an error, and what was half written is not taken up."""
    (first, second), (said, _) = killed
    assert second == -signal.SIGKILL and first > 0
    assert "closed by peer" in said or "reset by peer" in said, said[-3000:]
    run = folder / "killed" / "full-sharded-2"
    assert (run / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir(), "nothing was half written"
    recovered = [result("recovered", 2, rank) for rank in (0, 1)]
    assert recovered[0]["losses"] == result("full_sharded")["losses"]
    assert sum("checkpoint-4: it lacks trainer_state.json" in line for line in recovered[0]["said"]) == 1
    assert recovered[1]["said"] == []


def test_what_is_saved_loads_without_hf_coat(result, folder):
    merge_fsdp_weights(folder / "full-sharded-2" / "checkpoint-4" / "pytorch_model_fsdp_0", folder / "merged")
    (folder / "merged" / "config.json").write_bytes((folder / "full-whole-2" / "config.json").read_bytes())
    code = (
        "import sys\n"
        "sys.modules['hf_coat'] = None\n"
        "import transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "    print(sum(p.double().sum() for p in model.parameters()).item(), model.dtype)\n"
    )
    saved = [str(folder / name) for name in ("full-whole-2", "full-whole-2/checkpoint-4", "merged")]
    done = subprocess.run([sys.executable, "-c", code, *saved], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == said[1] == said[2] and "float32" in said[0]


@pytest.mark.gpu
def test_two_gpus(tmp_path):
    """The same on GPUs with NCCL: save on two, go on with one, and back on two."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    result = start(tmp_path, "cuda", ON_GPUS)
    alone = result("full_ddp", 1)["losses"]
    for name in ("full_ddp", "full_sharded", "full_whole"):
        near(result(name)["losses"], alone)
    for kind in ("sharded", "whole"):
        resumes_as_if_never_stopped(result, kind, saved=10)

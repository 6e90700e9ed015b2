"""Gradients averaged by copies between two GPUs: to the bit the mean of both processes' own gradients."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("copies_processes.py")
SECONDS = 120  # it takes about 20, most of them to begin
KILLED = 17

pytestmark = pytest.mark.gpu


@pytest.fixture
def run(tmp_path):
    """``run(scenario)``: how two processes ended, what they found, and what they said."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")

    def run(scenario):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        logs = [tmp_path / f"log-{rank}" for rank in (0, 1)]
        runs = []
        for rank in (0, 1):
            command = [sys.executable, WORKER, tmp_path, rank, 2, port, scenario]
            with logs[rank].open("w") as log:
                runs.append(
                    subprocess.Popen(
                        [*map(str, command)], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
                    )
                )
        end = time.monotonic() + SECONDS
        try:
            while any(run.poll() is None for run in runs) and time.monotonic() < end:
                time.sleep(0.1)
            codes = [run.poll() for run in runs]
        finally:
            for run in runs:
                run.kill()
                run.wait()
        files = [tmp_path / f"{scenario}-{rank}.pt" for rank in (0, 1)]
        return codes, [torch.load(f) if f.exists() else None for f in files], [log.read_text() for log in logs]

    return run


def test_two_gpus(run):
    codes, results, logs = run("averaged")
    assert codes == [0, 0], logs[0][-5000:] + logs[1][-5000:]
    for found in results:
        for name in ("large_turns", "small_turns", "accumulated"):
            trained = found[name]
            assert trained["why_not"] is None
            assert all(map(all, trained["exact"])), (name, trained["exact"])
            assert all(trained["alike"]) and trained["weights_alike"]
            buckets = trained["buckets"]
            assert len(buckets[0]) > 1 and buckets[1] != buckets[0], "DDP made no new buckets after the first step"
            assert len({sum(step) for step in buckets}) == 1 and buckets[1:] == [buckets[1]] * (len(buckets) - 1)
        assert all(found["bfloat16"]) and all(found["float32"])
    assert [f["large_turns"]["buckets"] for f in results] == [results[0]["large_turns"]["buckets"]] * 2


def test_a_process_that_dies(run):
    """The other one ends with an error after the timeout of the process group."""
    (first, second), _, (said, _) = run("killed")
    assert second == KILLED
    assert first not in (None, 0), f"it still waits, or found nothing wrong: {said[-3000:]}"

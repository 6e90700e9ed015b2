"""Two processes (gloo, CPU) against one: FSDP2 and DDP, states as DTensors, checkpoints that change hands."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_coat.modules.loss import library

WORKER = Path(__file__).with_name("two_processes.py")
SECONDS = 300  # all of it takes about 60 where nothing else runs
IN_ONE = ["adamw", "stochastic", "coat", "coat_lora", "coat_ddp", "heads", "released", "muon", "resumed"]
IN_TWO = [*IN_ONE, "in_buckets", "full", "refused", "gathered", "gathered_saved", "gathered_undone", "killed"]
KILLED = 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the results are, of all scenarios in one process and in two, which run side by side."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    runs, logs = {}, {}
    for rank, world_size, scenarios in ((0, 1, IN_ONE), (0, 2, IN_TWO), (1, 2, IN_TWO)):
        command = [sys.executable, WORKER, folder, rank, world_size, *scenarios]
        log = logs[rank, world_size] = folder / f"log-{world_size}-{rank}"
        with log.open("w") as stream:
            runs[rank, world_size] = subprocess.Popen(
                [*map(str, command)], stdout=stream, stderr=subprocess.STDOUT, env=environment
            )
    end = time.monotonic() + SECONDS
    try:
        for key, run in runs.items():
            run.wait(max(1.0, end - time.monotonic()))
            assert run.returncode == (KILLED if key == (1, 2) else 0), logs[key].read_text()
    finally:
        for run in runs.values():
            run.kill()
            run.wait()
    return folder


@pytest.fixture
def results(folder):
    def results(scenario, rank=0):
        """What a scenario gave in one process and in two."""
        files = [folder / f"{scenario}-1-0.pt", folder / f"{scenario}-2-{rank}.pt"]
        return [torch.load(file, weights_only=True) if file.exists() else None for file in files]

    return results


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_sharded_training_is_the_training(results):
    """Uneven shapes, vectors, a parameter with nothing left for the second process: not a bit differs."""
    alone, first = results("adamw")
    second = results("adamw", rank=1)[1]
    assert alone["losses"] == first["losses"] == second["losses"] and len(set(alone["losses"])) == 4
    assert same(alone["params"], first["params"]) and same(alone["params"], second["params"])
    assert same(alone["states"], first["states"])
    assert (alone["rows_held"], first["rows_held"], second["rows_held"]) == (5, 3, 2)
    of_weight, of_vector = (first["states"]["state"][name] for name in ("up.weight", "scale"))
    assert of_weight["exp_avg_scale"].shape == (5, 3) and of_vector["exp_avg_scale"].shape == (301, 1)


def test_chance_does_not_know_of_processes(results):
    """Stochastic rounding of a row is the same wherever the row lies."""
    alone, first = results("stochastic")
    assert same(alone, first) and len(set(alone["losses"])) == 3


def test_checkpoints_change_hands(results):
    """What two saved one goes on with, and the other way round: bit for bit the run that was never stopped."""
    straight, _ = results("adamw")
    for resumed in results("resumed"):
        assert resumed["losses"] == straight["losses"][2:]
        assert same(resumed["params"], straight["params"]) and same(resumed["states"], straight["states"])


def test_gradient_release(results):
    straight, _ = results("adamw")
    alone, first = results("released")
    for released in (alone, first):
        assert released["losses"] == straight["losses"] and same(released["params"], straight["params"])
    # The sums of squares are of float32, in another order.
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-6) and min(alone["norms"]) > 0
    assert first["clipped"] == pytest.approx(alone["clipped"], rel=1e-3)


def test_muon(results):
    alone, first = results("muon")
    assert same(alone, first) and alone["states"]["state"]["up.weight"]["momentum_scale"].shape == (5, 3)


def test_whole_state_dicts(results):
    _, taken = results("full")
    states, again = taken["states"]["state"], taken["again"]["state"]
    assert same(states, again) and states["up.weight"]["exp_avg_codes"].shape == (5, 300)


def test_what_cannot_be_is_refused(results):
    for rank in (0, 1):
        _, refused = results("refused", rank)
        whole, cut, nothing = refused["messages"]
        assert "exp_avg_codes is one whole tensor, its parameter distributed as (Shard(dim=0),)" in whole
        assert "set_optimizer_state_dict" in whole
        assert "shape [4, 256] is cut into 2 pieces along its last dimension" in cut and "groups of 256" in cut
        assert nothing is None, "a piece that is whole groups is not cut"


@pytest.mark.parametrize("scenario", ["coat", "coat_lora", "coat_ddp"])
def test_a_converted_model(results, scenario):
    """FSDP2 and DDP add gradients up in another order: a bit of a few of them, and of the losses, may differ.

    A gradient that differs by a bit may move a code by one, m by 1/16 of itself and a step of lr by as much.
    """
    alone, first = results(scenario)
    losses = alone["losses"][::2] if scenario == "coat_ddp" else alone["losses"]
    assert first["losses"] == pytest.approx(losses, abs=1e-5) and len(set(losses)) == 6
    assert alone["params"].keys() == first["params"].keys()
    for name, value in alone["params"].items():
        assert (value - first["params"][name]).abs().max() <= 1e-2 / 16, name


def test_gradients_are_made_in_the_buckets(results):
    """Those of linears, from the fourth step on, when DDP's buckets are known to stay; but not the sum of the two of a
    weight that is used twice. Not a bit differs."""
    _, first = results("in_buckets")
    second = results("in_buckets", rank=1)[1]
    copied = first["copied"]
    assert len(set(copied["losses"])) == 10 and not any(any(step.values()) for step in copied["there"])
    for how in ("made there", "checkpointed"):
        made = first[how]
        assert copied["losses"] == made["losses"] and same(copied["params"], made["params"]), how
        assert same(made["params"], second[how]["params"]), how
        assert not any(any(step.values()) for step in made["there"][:3])
        for step in made["there"][3:]:
            linears = {name for name in step if "_proj" in name} - {"model.layers.0.mlp.down_proj.weight"}
            assert len(linears) == 12 and {name for name, there in step.items() if there} == linears, how
    assert first["offered"] == first["elsewhere"] == [True, True], "torch.autograd.grad gives gradients to keep"
    assert first["copy"] == "DistributedDataParallel"
    assert first["kept"] == [False, False], "buckets outlived DDP"
    assert "make it with gradient_as_bucket_view=True" in first["refused"]


@pytest.mark.skipif(library("cpu") is None, reason="the loss of CPU tensors needs torch 2.13 or newer")
def test_the_fused_loss_under_fsdp2(results):
    """The head in a unit of its own, as accelerate has it, tied or frozen or computing in BF16: the losses and weights
    of one process, the unit told of the backward, the logits never computed; but where the weight is given back: there
    gradients are rounded otherwise, and codes of m may move, as in :func:`test_a_converted_model`."""
    alone, first = results("heads")
    second = results("heads", rank=1)[1]
    for name, run in first.items():
        deferred, root = not name.endswith("given back"), name.startswith("root")
        assert run["losses"] == second[name]["losses"] and len(set(run["losses"])) == 6, name
        assert run["never"] is deferred, name
        assert ("FSDP2 had taken" in run["after backward"]) is deferred, name
        assert ("FSDP2 had taken" in run["after step"]) is deferred, name
        if not root:  # where the head is a unit's module
            assert run["told"] == [() if deferred else (2, 16, 64)], "by the gradient of the loss, not of the logits"
        assert run["evaluated"][0] == "Tensor"
        assert run["undone"] == ["Tensor", "Linear" if root else "FSDPLinear"], name
        assert run["still sharded"] is not root
        if name == "bf16":
            assert run["losses"][:2] == pytest.approx(alone["tail"]["losses"][:2], rel=1e-3)
            continue
        losses, evaluated, values = (alone[name][what] for what in ("losses", "evaluated", "values"))
        assert alone[name]["never"] and run["losses"][:2] == pytest.approx(losses[:2], abs=1e-5), name
        if not deferred:
            assert [*run["losses"], run["evaluated"][1]] == pytest.approx([*losses, evaluated[1]], rel=3e-3), name
            assert (run["values"] - values).norm() < 0.05 * values.norm(), name
            continue
        assert run["losses"] == pytest.approx(losses, abs=1e-5), name
        assert run["evaluated"][1] == pytest.approx(evaluated[1], abs=1e-5), name
        assert (run["values"] - values).abs().max() < 1e-5, name
        for parameter, value in alone[name]["params"].items():
            assert (value - run["params"][parameter]).abs().max() <= CLOSE, (name, parameter)


CLOSE = 1e-2 / 16  # lr, and the least that a code of m differs by: as where gradients are added up in another order


def layer_bytes(width=64, intermediate=96, value=4, code=0):
    """What a process of two gives of a layer: rows of the linears, with a scale of 4 bytes where they are codes, and
    of the two norms."""
    rows = [(width, width)] * 2 + [(width // 2, width)] * 2 + [(intermediate, width)] * 2 + [(width, intermediate)]
    of_row = (lambda k: k * code + 4) if code else (lambda k: k * value)
    return sum(-(-n // 2) * of_row(k) for n, k in rows) + 2 * width // 2 * value


def test_fsdp2_gathers_codes(results):
    """A byte for each value of a linear's weight and four for each row, from the first forward on."""
    _, first = results("gathered")
    assert set(first["values"]["bytes"]) == {layer_bytes()} and set(first["values uneven"]["bytes"]) == {
        layer_bytes(intermediate=99)
    }
    for name in ("codes", "codes kept", "codes recomputed", "codes meta"):
        assert set(first[name]["bytes"]) == {layer_bytes(code=1)}, name
    assert set(first["codes uneven"]["bytes"]) == {layer_bytes(intermediate=99, code=1)}
    assert set(first["codes bf16"]["bytes"]) == {layer_bytes(value=2, code=1)}
    adapters = layer_bytes(value=4) - first["values lora"]["bytes"][0]
    assert set(first["codes lora"]["bytes"]) == {layer_bytes(code=1) - adapters}
    # Before the first forward its values are gathered, in vain: nothing tells yet that codes can be.
    values, *codes = first["codes whole"]["bytes"]
    assert {values - n for n in codes} == {2 * (layer_bytes() - layer_bytes(code=1))}


@pytest.mark.parametrize("case", ["", " uneven", " lora"])
def test_gathered_codes_are_those_of_gathered_values(results, case):
    """The same codes, forward. Transposed from them and not from the values, what is 2**15 smaller than the largest
    scale's values loses bits."""
    _, first = results("gathered")
    codes, values = first[f"codes{case}"], first[f"values{case}"]
    assert codes["losses"][0] == values["losses"][0] and len(set(codes["losses"])) == 6
    assert codes["losses"] == pytest.approx(values["losses"], abs=1e-5)
    for name, value in values["params"].items():
        assert (value - codes["params"][name]).abs().max() <= CLOSE, name


def test_codes_are_gathered_however_fsdp2_is_set_up(results):
    """Weights that stay gathered, layers that are recomputed, a model that is filled when it is sharded: the same run.
    Where computation is in BF16 the weights' codes are still those of the FP32 parameters."""
    alone, _ = results("coat")
    first, second = (results("gathered", rank)[1] for rank in (0, 1))
    assert first["codes"]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    for name in ("codes kept", "codes recomputed", "codes meta"):
        assert first[name]["losses"] == first["codes"]["losses"], name
        assert same(first[name]["params"], first["codes"]["params"]), name
    assert first["codes whole"]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert first["codes bf16"]["losses"][:2] == pytest.approx(alone["losses"][:2], rel=1e-3)
    for name, run in first.items():
        assert same(run["params"], second[name]["params"]), name


def test_checkpoints_of_gathered_codes_are_plain(results):
    alone, _ = results("coat")
    _, saved = results("gathered_saved")
    assert saved["again"] == saved["losses"] and len(set(saved["losses"])) == 6
    assert saved["pieces"] == ["Tensor"]
    assert saved["whole"]["resumed"] == saved["whole"]["stopped"], "also where the first forward gathers values"
    assert {name: (p.dtype, p.shape) for name, p in saved["full"].items() if "lm_head" not in name} == {
        name: (p.dtype, p.shape) for name, p in alone["params"].items() if "lm_head" not in name
    }


def test_gathered_codes_are_undone(results):
    _, undone = results("gathered_undone")
    assert undone["type"] and "writes to a weight that FSDP2 gathered" in undone["written"]
    error = (undone["values"] - undone["weight"]).abs() / undone["weight"].abs()
    assert 0 < error[undone["weight"].abs() > 1e-2].max() <= 2**-4  # of E4M3's normal numbers
    assert undone["part"] == "Parameter" and undone["other part"] == 7
    assert "wait to be reduced" in undone["refused"] and undone["gradient"] == "torch.float32"
    assert undone["hooks"][0] == "CodeGather" and "CodeGather" not in undone["hooks after"]
    assert set(undone["bytes"]) == {layer_bytes()}
    assert undone["loss"] == undone["plain"]
    # a forward and a backward, of which q_proj's 32 rows of 64 values are not in codes
    assert undone["but q_proj"] == [layer_bytes(code=1) + 32 * (64 * 3 - 4)] * 4
    assert undone["by columns"] == [layer_bytes()] * 4
    (said,) = undone["said"]
    assert "values of 14 converted weights" in said and "14 x cut along its columns" in said
    assert results("gathered_undone", rank=1)[1]["said"] == []


def test_a_process_that_dies_ends_the_other_with_an_error(folder):
    message = torch.load(folder / "message.pt")
    assert "closed by peer" in message or "reset by peer" in message or "Timed out" in message

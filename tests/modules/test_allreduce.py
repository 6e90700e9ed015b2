"""Gradients averaged by copies: the protocol between processes that are threads here, and when it is not used."""

import random
import threading
import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from coat_kernels.average import average_ref
from torch import nn

from hf_coat.modules import allreduce
from hf_coat.modules.allreduce import Copies, average_by_copies

CPU = torch.device("cpu")
TURN = 2**14  # bytes, so that larger buckets take several turns
SIZES = [1, 5000, 64, 63, 2049, 130, 4096, 200, 7]  # of buckets in their order, in values


class Memory:
    """Symmetric memory of ``size`` threads: what one writes the others find. Barriers keep each for a while."""

    def __init__(self, size):
        self.meeting, self.tensors = threading.Barrier(size, timeout=30), {}

    def empty_strided_p2p(self, size, stride, dtype, device):
        return torch.full(size, 0x7F, dtype=dtype, device=device)  # what is read before it is written shows

    def rendezvous(self, tensor, name):
        self.tensors[int(name)] = tensor
        self.meeting.wait()
        return SimpleNamespace(get_buffer=lambda p, shape, dtype: self.tensors[p])

    def barrier(self):
        time.sleep(random.random() * 2e-3)
        self.meeting.wait()
        time.sleep(random.random() * 2e-3)


def group(rank, size):
    options = SimpleNamespace(_timeout=SimpleNamespace(total_seconds=lambda: 90))
    return SimpleNamespace(
        rank=lambda: rank,
        size=lambda: size,
        group_name=str(rank),
        _get_backend=lambda device: SimpleNamespace(options=options),
    )


def in_threads(monkeypatch, size, work):
    """What ``work`` of the copies of each process gives."""
    memory, results, errors = Memory(size), [None] * size, []
    monkeypatch.setattr(allreduce, "TURN", TURN)
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", memory)
    monkeypatch.setattr("torch.distributed._symmetric_memory.rendezvous", memory.rendezvous)
    monkeypatch.setattr(Copies, "barrier", lambda copies: memory.barrier())
    monkeypatch.setattr(Copies, "watch", lambda copies: None)  # it needs a GPU

    def run(rank):
        try:
            copies = Copies(group(rank, size), CPU)
            copies.allocate()
            copies.meet()
            results[rank] = work(copies)
        except Exception as error:
            errors.append(error)
            memory.meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_buckets_one_after_the_other(monkeypatch, size, dtype):
    """Whichever is ahead: all have the same bits, which are those of the mean in float32, rounded once."""
    generator = torch.Generator().manual_seed(size)
    buckets = [torch.randn(size, n, generator=generator).to(dtype) for n in SIZES]

    def work(copies):
        mine = [bucket[copies.rank].clone() for bucket in buckets]
        for values in mine:
            copies.average(values)
        return mine

    results = in_threads(monkeypatch, size, work)
    for i, bucket in enumerate(buckets):
        assert all(torch.equal(result[i], results[0][i]) for result in results)
        orders = []  # a sum begins with the owner's value
        for owner in range(size):
            orders.append(bucket[owner].clone())
            average_ref(orders[-1], torch.cat((bucket[:owner], bucket[owner + 1 :])))
        assert (results[0][i] == torch.stack(orders)).any(0).all()
        exact = bucket.double().mean(0)
        # half a step of the dtype, and one of float32 for each sum
        bound = exact.abs() * torch.finfo(dtype).eps / 2 + bucket.double().abs().sum(0) * 2**-23
        assert ((results[0][i].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_check_before_the_training(monkeypatch, size):
    assert in_threads(monkeypatch, size, lambda copies: copies.check(torch.bfloat16)) == [None] * size

    def broken(copies):
        if copies.rank == 0:
            copies.staging[1] = torch.zeros_like(copies.staging[1])  # what is sent there is lost
        return copies.check(torch.float32)

    found = in_threads(monkeypatch, size, broken)
    assert all("do not arrive" in reason for reason in found[1:])


def ddp(module=None, rank=0, size=2, hooks=(), backend="ProcessGroupNCCL"):
    """What average_by_copies looks at of a DDP model."""
    module = module or nn.Linear(4, 4)
    joined = group(rank, size)
    joined._get_backend = lambda device: type(backend, (), {})()
    registered = []
    return SimpleNamespace(
        parameters=module.parameters,
        process_group=joined,
        _comm_hooks=hooks,
        _use_python_reducer=False,
        register_comm_hook=lambda *hook: registered.append(hook),
        registered=registered,
    )


@pytest.fixture
def alike(monkeypatch):
    """All processes have what this one has."""
    monkeypatch.setattr(allreduce, "_gathered", lambda value, group: [value] * group.size())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ddp(size=1), "one process"),
        (ddp(), "parameters are on cpu, expected one NVIDIA GPU"),
        (ddp(hooks=["chosen"]), "has a communication hook already"),
    ],
)
def test_where_it_cannot_be(alike, model, reason):
    assert reason in average_by_copies(model) and model.registered == []


@pytest.mark.parametrize(
    ("dtype", "backend", "reason"),
    [
        (torch.float16, "ProcessGroupNCCL", "gradients are torch.float16, expected torch.bfloat16 or torch.float32"),
        (torch.float32, "ProcessGroupGloo", "the backend is ProcessGroupGloo, expected ProcessGroupNCCL"),
        (torch.float32, "ProcessGroupNCCL", None),
    ],
)
def test_what_one_process_looks_at(monkeypatch, dtype, backend, reason):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    parameters = [SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)]
    assert allreduce._obstacle(ddp(backend=backend), parameters) == reason


def host(monkeypatch, names, seen, atomics=1):
    """Two processes on hosts of these names, who see these GPUs; the second GPU is the other process's."""
    gpus = [SimpleNamespace(uuid=uuid) for uuid in seen]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(allreduce, "_gathered", lambda value, group: [((name, ""), "ab"[i]) for i, name in names])
    asked = []

    def query(found, attribute, *pair):
        asked.append((attribute, *pair))
        found._obj.value = atomics
        return 0

    monkeypatch.setattr(allreduce, "_library", lambda: SimpleNamespace(cuDeviceGetP2PAttribute=query))
    return allreduce._distance(Copies(group(0, 2), torch.device("cuda", 0))), asked


def test_what_lies_between_processes(monkeypatch):
    here = list(enumerate(("one", "one")))
    assert host(monkeypatch, here, "ab") == (None, [(3, 0, 1)])
    assert "no atomic access" in host(monkeypatch, here, "acb", atomics=0)[0]
    assert host(monkeypatch, here, "acb") == (None, [(3, 0, 2)])
    assert "CUDA_VISIBLE_DEVICES" in host(monkeypatch, here, "a")[0]
    assert "several hosts" in host(monkeypatch, list(enumerate(("one", "two"))), "ab")[0]


def test_all_decide_alike(monkeypatch):
    """A process that could goes on as little as the one that could not, and no process is left waiting."""
    others = []
    monkeypatch.setattr(allreduce, "_gathered", lambda value, group: [value, *others])
    others[:] = [None, "no memory"]
    assert allreduce._agreed(lambda: None, group(0, 3)) == "no memory"
    others[:] = [None, None]
    assert allreduce._agreed(lambda: None, group(0, 3)) is None

    def fails():
        raise RuntimeError("rendezvous failed\nat length")

    assert allreduce._agreed(fails, group(0, 3)) == "RuntimeError: rendezvous failed"


def test_all_steps_are_taken_in_their_order(monkeypatch, alike):
    taken = []
    monkeypatch.setattr(allreduce, "_obstacle", lambda *_: taken.append("obstacle"))
    monkeypatch.setattr(allreduce, "_distance", lambda *_: taken.append("distance"))
    for name in ("allocate", "meet", "check"):
        monkeypatch.setattr(Copies, name, lambda *_, name=name: taken.append(name))
    model = ddp()
    assert average_by_copies(model) is None
    assert taken == ["obstacle", "distance", "allocate", "meet", "check"]
    ((copies, hook),) = model.registered
    assert isinstance(copies, Copies) and hook is allreduce.copies_hook


def test_who_waits_too_long_ends(monkeypatch, caplog):
    """What is done in time is forgotten; the first that is not ends the process."""

    class Ended(Exception):
        pass

    def abort():
        raise Ended

    monkeypatch.setattr(allreduce.os, "abort", abort)
    monkeypatch.setattr(allreduce.time, "sleep", lambda seconds: None)
    soon, never = SimpleNamespace(query=lambda: True), SimpleNamespace(query=lambda: False)
    expected = deque([(soon, -100.0), (never, time.monotonic() - 3)])
    with pytest.raises(Ended):
        allreduce._end_if_late(expected, 2.0)
    assert len(expected) == 1 and "not averaged within 2 s (ddp_timeout)" in caplog.text

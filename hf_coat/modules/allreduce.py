"""DDP's gradients averaged by the GPUs' copy engines, which take no multiprocessors from the backward.

NCCL's all-reduce is a kernel: while it runs, the products of the backward have less of the GPU. Here the GPUs of one
host map each other's memory (``torch.distributed._symmetric_memory``), all traffic is plain copies, and the only
arithmetic is one short kernel. A bucket of n values is cut into one piece for each of N processes:

    1. each process copies piece p into the staging memory of process p                     (a barrier of the GPUs)
    2. process p averages the N versions of its piece, in float32 and rounded once, and
       copies the result into the staging memory of all others                              (a barrier of the GPUs)
    3. each process copies the others' results into the bucket

Each value is averaged by one process, so that all have the same bits. Everything runs on a stream of its own. The
barriers are numbers that the stream writes into the others' memory and waits for in its own, no kernels, which would
take a multiprocessor from the backward while they wait. The received pieces and the received results lie apart, so two
barriers are enough: a process writes pieces of the next bucket after the second barrier, before which they were
averaged; and results after the next first barrier, which comes behind the copies of 3.

Staging memory has a fixed size, :data:`TURN` bytes for results and nearly as many for pieces, which the caching
allocator does not count. It is made before the training starts, and a bucket that is larger takes several turns. A
process whose bucket is not averaged within the timeout of the process group (Trainer's ``ddp_timeout``), because
another one has died, ends itself, as it does under NCCL; launchers mostly end it before that.
"""

import ctypes
import functools
import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from coat_kernels.average import DTYPES, average
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)
TURN = 256 * 2**20  # bytes of a bucket that are averaged at once
BUCKET_MIB = 160  # of DDP's buckets, which with the parameter that fills them mostly take one turn
FLAGS = 4096  # bytes behind the staging memory: a number for each process, int32
ALIGN = 64  # values: pieces begin at multiples of it
BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells hosts of one name apart
NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED: NVLink has them, and PCIe mostly not
AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, also once the numbers have come to their end and begin anew


class Copies:
    """The staging memory of one process, and those of the others as it sees them.

    Args:
        group: The processes, all on one host, each with a GPU of its own.
        device: The GPU of this one.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.rank, self.size = group.rank(), group.size()
        self.others = [(self.rank + i) % self.size for i in range(1, self.size)]  # no two begin with the same one

    def allocate(self) -> None:
        from torch._C._distributed_c10d import _SymmetricMemory

        self.bytes = 2 * TURN - TURN // (FLAGS * self.size) * FLAGS
        self.own = _SymmetricMemory.empty_strided_p2p((self.bytes + FLAGS,), (1,), torch.uint8, self.device)
        self.own[self.bytes :].zero_().sum().item()  # they are zero before another process can write there

    def meet(self) -> None:
        """Map the memory of the others. All processes call this together."""
        from torch.distributed._symmetric_memory import rendezvous

        self.handle = rendezvous(self.own, self.group.group_name)
        theirs = {p: self.handle.get_buffer(p, self.own.shape, torch.uint8) for p in self.others}
        memory = [theirs.get(p, self.own) for p in range(self.size)]
        self.staging = [m[: self.bytes] for m in memory]
        self.flags = [m.data_ptr() + self.bytes for m in memory]
        self.rounds = 0

    def barrier(self) -> None:
        """Let the current stream wait until those of all processes are here."""
        self.rounds = (self.rounds + 1) % 2**32
        stream = torch.cuda.current_stream(self.device).cuda_stream
        for p in self.others:
            _driver("cuStreamWriteValue32_v2", stream, self.flags[p] + 4 * self.rank, self.rounds, 0)
        for p in self.others:
            _driver("cuStreamWaitValue32_v2", stream, self.flags[self.rank] + 4 * p, self.rounds, AT_LEAST)

    def watch(self) -> None:
        """Expect what the current stream has to do to be done within the timeout of the process group."""
        done = torch.cuda.Event()
        done.record()
        self.expected.append((done, time.monotonic()))

    @functools.cached_property
    def expected(self) -> deque:
        """What is watched, the oldest first: an event, and since when."""
        expected: deque = deque()
        timeout = self.group._get_backend(self.device).options._timeout.total_seconds()
        threading.Thread(target=_end_if_late, args=(expected, timeout), daemon=True).start()
        return expected

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def average(self, values: torch.Tensor) -> None:
        """Average a tensor with those of the other processes, in place, on the current stream.

        Args:
            values: BF16 or FP32 [n], contiguous; n and the dtype are the same on all processes.
        """
        step = ALIGN * self.size
        for turn in values.split(TURN // (values.element_size() * step) * step):
            self._average(turn)
        self.watch()

    def _average(self, values: torch.Tensor) -> None:
        n, rank = values.numel(), self.rank
        size = -(-n // (ALIGN * self.size)) * ALIGN  # of a piece; the last ones may be shorter, or empty
        pieces = [values[p * size : (p + 1) * size] for p in range(self.size)]
        staging = [memory.view(values.dtype) for memory in self.staging]
        behind = TURN // values.element_size()  # the results, [N, size], lie the pieces, [N - 1, size]
        for p in self.others:
            row = behind + (rank - (rank > p)) * size
            staging[p][row : row + pieces[p].numel()].copy_(pieces[p])
        self.barrier()
        received = staging[rank][behind : behind + (self.size - 1) * size].view(self.size - 1, size)
        own, begin = pieces[rank], rank * size
        average(own, received[:, : own.numel()])
        for p in self.others:
            staging[p][begin : begin + own.numel()].copy_(own)
        self.barrier()
        results = staging[rank][:n]
        values[:begin].copy_(results[:begin])
        values[begin + size :].copy_(results[begin + size :])

    def check(self, dtype: torch.dtype) -> str | None:
        """Average something whose average is known. All processes call this together."""
        n = 3 * ALIGN * self.size + 5
        values = torch.arange(n, device=self.device).remainder(8).to(dtype)
        expected = values + (self.size - 1) / 2
        values += self.rank
        self.average(values)
        return None if torch.equal(values, expected) else "copies between these GPUs do not arrive as they were sent"


def _end_if_late(expected: deque, timeout: float) -> None:
    """End the process when something is later than ``timeout`` seconds: nothing else could end a GPU's wait."""
    while True:
        time.sleep(min(5.0, timeout / 4))
        while expected and expected[0][0].query():
            expected.popleft()
        if expected and time.monotonic() - expected[0][1] > timeout:
            logger.critical(
                f"COAT: gradients were not averaged within {timeout:g} s (ddp_timeout). Another process has died or "
                "hangs: its own log says why. This one ends now, and the last complete checkpoint can be resumed"
            )
            os.abort()


def _driver(function: str, *args: int) -> None:
    """Call the CUDA driver: a stream, an address, a number, flags."""
    kinds = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint
    error = getattr(_library(), function)(*(kind(value) for kind, value in zip(kinds, args, strict=True)))
    if error:
        raise RuntimeError(f"{function} gave the CUDA error {error}")


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def copies_hook(copies: Copies, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook. The bucket's memory may be freed when DDP makes new ones, after this stream's work."""
    values, stream = bucket.buffer(), copies.stream
    stream.wait_stream(torch.cuda.current_stream(copies.device))
    values.record_stream(stream)
    with torch.cuda.stream(stream):
        copies.average(values)
        future = torch.futures.Future(devices=[copies.device])
        future.set_result(values)
    return future


def average_by_copies(model: DistributedDataParallel) -> str | None:
    """Let the gradients of a DDP model be averaged by the GPUs' copy engines, where that can be.

    It can on NVIDIA GPUs of one host that are linked by NVLink, under NCCL, with gradients in BF16 or FP32, in a model
    that has no communication hook yet. All processes call it together, before the first backward, and all decide
    alike. Trainer's runs with ``coat=`` do it by themselves (``HfCoatConfig(ddp_all_reduce=...)``).

        model = DistributedDataParallel(
            model, device_ids=[rank], gradient_as_bucket_view=True, bucket_cap_mb=160
        )
        why_not = hf_coat.average_by_copies(model)

    Args:
        model: As ``DistributedDataParallel`` made it.

    Returns:
        None, or why DDP's own all-reduce stays in use.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    copies = Copies(model.process_group, parameters[0].device)
    if copies.size == 1:
        return "there is one process"
    steps = [
        functools.partial(_obstacle, model, parameters),
        functools.partial(_distance, copies),
        copies.allocate,
        copies.meet,
        *(functools.partial(copies.check, dtype) for dtype in dict.fromkeys(p.dtype for p in parameters)),
    ]
    with torch.cuda.device(copies.device if copies.device.type == "cuda" else -1):  # where NCCL gathers objects
        for step in steps:
            reason = _agreed(step, copies.group)
            if reason is not None:
                return reason
    model.register_comm_hook(copies, copies_hook)
    return None


def _agreed(step: Callable[[], str | None], group: dist.ProcessGroup) -> str | None:
    """Take a step on every process; the first reason of any of them against going on."""
    try:
        reason = step()
    except (ImportError, RuntimeError) as error:  # torch without symmetric memory, a driver that refuses, no memory
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return next((reason for reason in _gathered(reason, group) if reason is not None), None)


def _gathered(value: Any, group: dist.ProcessGroup) -> list:
    """What each process of a group has. All of them call this together."""
    found = [None] * group.size()
    dist.all_gather_object(found, value, group=group)
    return found


def _obstacle(model: DistributedDataParallel, parameters: list[torch.Tensor]) -> str | None:
    """What is against it in a process alone."""
    if model._comm_hooks:
        return "the model has a communication hook already"
    if model._use_python_reducer:
        return "torch.compile reduces the gradients (torch._dynamo.config.optimize_ddp='python_reducer')"
    devices, dtypes = {p.device for p in parameters}, {p.dtype for p in parameters}
    if len(devices) > 1 or parameters[0].device.type != "cuda" or torch.version.cuda is None:
        return f"parameters are on {', '.join(sorted(map(str, devices)))}, expected one NVIDIA GPU for each process"
    if dtypes - set(DTYPES):
        return f"gradients are {', '.join(sorted(map(str, dtypes)))}, expected {' or '.join(map(str, DTYPES))}"
    backend = type(model.process_group._get_backend(parameters[0].device)).__name__
    return None if backend == "ProcessGroupNCCL" else f"the backend is {backend}, expected ProcessGroupNCCL"


def _distance(copies: Copies) -> str | None:
    """What is against it between the processes. All of them call this together."""
    seen = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    host = platform.node(), BOOT.read_text() if BOOT.exists() else ""
    places = _gathered((host, seen[copies.device.index]), copies.group)
    if len({host for host, _ in places}) > 1:
        return "the processes are on several hosts"
    found = ctypes.c_int()
    for _, gpu in (places[p] for p in copies.others):
        if gpu not in seen:
            return "processes do not see each other's GPUs, expected one CUDA_VISIBLE_DEVICES for all of them"
        pair = copies.device.index, seen.index(gpu)
        if _library().cuDeviceGetP2PAttribute(ctypes.byref(found), NATIVE_ATOMICS, *pair) or not found.value:
            return f"GPUs {pair[0]} and {pair[1]} have no atomic access to each other's memory, as NVLink gives it"
    return None

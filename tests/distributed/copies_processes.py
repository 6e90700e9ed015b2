"""What test_copies.py runs on two GPUs: DDP whose gradients are averaged by copies, beside what each process finds.

    python copies_processes.py FOLDER RANK WORLD_SIZE PORT SCENARIO

Results go to FOLDER/SCENARIO-RANK.pt.
"""

import copy
import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hf_coat
from hf_coat.modules import allreduce

STEPS = 5  # DDP makes new buckets after the first one
LATE = 10**8  # cycles of a GPU, tens of milliseconds
SECONDS = 20  # after which a process gives up on another one, in the scenario "killed"


class Net(nn.Module):
    """BF16 and FP32, odd sizes, from a parameter with one value to those that are larger than a bucket."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(257, 3001, dtype=torch.bfloat16)
        self.narrow = nn.Linear(3001, 403, dtype=torch.bfloat16)
        self.exact = nn.Linear(403, 401)
        self.last = nn.Linear(401, 129)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.narrow(self.wide(x.bfloat16()).relu()).float()
        return self.last(self.exact(x).relu()) * self.scale


def means(tensors):
    """Of each tensor the mean over both processes, in float32 and rounded once."""
    for tensor in tensors:
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor)
        yield ((both[0].float() + both[1].float()) * 0.5).to(tensor.dtype)


def alike(tensors):
    """Whether both processes have the same bits."""
    for tensor in tensors:
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.detach())
        if not torch.equal(*both):
            return False
    return True


def train(rank, device, turn, accumulated=1):
    """Steps in which now one process is late and now the other one."""
    allreduce.TURN = turn
    torch.manual_seed(0)
    plain = Net().to(device)
    model = DistributedDataParallel(
        copy.deepcopy(plain), device_ids=[rank], bucket_cap_mb=1, gradient_as_bucket_view=True
    )
    why_not = hf_coat.average_by_copies(model)
    calls, hook = [], allreduce.Copies.average
    allreduce.Copies.average = lambda self, values: calls.append(values.numel()) or hook(self, values)
    found = {"why_not": why_not, "exact": [], "alike": [], "buckets": []}
    generator = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        plain.load_state_dict(model.module.state_dict())
        plain.zero_grad()
        model.zero_grad()
        for i in range(accumulated):
            x = torch.randn(33, 257, generator=generator).to(device)
            plain(x).square().mean().backward()
            if (step + rank) % 2:
                torch.cuda._sleep(LATE)
            if i + 1 < accumulated:
                with model.no_sync():
                    model(x).square().mean().backward()
            else:
                model(x).square().mean().backward()
        expected = list(means([p.grad for p in plain.parameters()]))
        gradients = [p.grad for p in model.parameters()]
        found["exact"].append([torch.equal(a, b) for a, b in zip(gradients, expected, strict=True)])
        found["alike"].append(alike(gradients))
        found["buckets"].append([*calls])
        calls.clear()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
    found["weights_alike"] = alike(list(model.parameters()))
    allreduce.Copies.average = hook
    return found


def averages(rank, device, dtype):
    """Tensors of many sizes one after the other, without a wait between them: what is left of each."""
    allreduce.TURN = 2**16
    copies = allreduce.Copies(dist.group.WORLD, device)
    copies.allocate()
    copies.meet()
    generator = torch.Generator().manual_seed(rank)
    sizes = [1, 127, 64, 300_001, 128, 5, 65_536, 99_999] * 3
    own = [torch.randn(n, generator=generator).to(device, dtype) for n in sizes]
    result = [values.clone() for values in own]
    dist.barrier()
    for i, values in enumerate(result):
        if (i + rank) % 5 == 0:
            torch.cuda._sleep(LATE // 20)
        copies.average(values)
    return [torch.equal(a, b) for a, b in zip(result, means(own), strict=True)]


def killed(rank, device):
    """The second process is gone; the first one may not wait for ever."""
    model = DistributedDataParallel(Net().to(device), device_ids=[rank])
    assert hf_coat.average_by_copies(model) is None
    x = torch.randn(33, 257, device=device)
    model(x).mean().backward()
    torch.cuda.synchronize()
    if rank == 1:
        os._exit(17)
    copies = model._comm_hooks[0][1]
    copies.average(torch.ones(1000, device=device))
    torch.cuda.synchronize()


def main(folder, rank, world_size, port, scenario):
    rank, device = int(rank), torch.device("cuda", int(rank))
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": world_size}
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=SECONDS if scenario == "killed" else 100))
    if scenario == "killed":
        killed(rank, device)
        return
    result = {
        "large_turns": train(rank, device, 64 * 2**20),
        "small_turns": train(rank, device, 2**16),
        "accumulated": train(rank, device, 64 * 2**20, accumulated=3),
        "bfloat16": averages(rank, device, torch.bfloat16),
        "float32": averages(rank, device, torch.float32),
    }
    torch.save(result, Path(folder, f"{scenario}-{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Adapters on a frozen FP8 base over two processes: DDP, and FSDP2, which shards the codes as bytes."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hf_coat
from hf_coat.integrations.checks import SHARDS_BYTES, check_shards
from hf_coat.modules import CoatFrozenLinear

RANKS = 2
BYTES = Version(torch.__version__).release >= Version(SHARDS_BYTES).release  # whether FSDP2 shards them
IDS = torch.arange(64).view(4, 16) * 3


def build(tools):
    model = get_peft_model(tools.tiny_llama(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    hf_coat.apply_coat(model)
    return model.train()


def steps(model, ids, count=2):
    """Losses of some steps of SGD, whose updates are the gradients themselves."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(count):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def work(rank, folder, tools_path):
    spec = importlib.util.spec_from_file_location("tools", tools_path)
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)

    model = build(tools)
    results = {"ddp": (steps(DistributedDataParallel(model), IDS[rank::RANKS]), model.state_dict())}

    if BYTES:
        model, mesh = build(tools), init_device_mesh("cpu", (RANKS,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        bases = [m for m in model.modules() if isinstance(m, CoatFrozenLinear)]
        assert len(bases) == 14 and all(isinstance(m.weight, DTensor) for m in bases)
        assert all(m.weight.to_local().numel() * RANKS == m.weight.numel() for m in bases)
        losses = steps(model, IDS[rank::RANKS])
        assert all(m.weight.dtype == torch.uint8 for m in bases)
        results["fsdp2"] = losses, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))

    for losses, _ in results.values():
        dist.all_reduce(losses)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tools, tmp_path):
    mp.start_processes(work, (str(tmp_path), tools.__file__), RANKS, start_method="spawn")
    model = build(tools)
    expected, alone = steps(model, IDS), model.state_dict()
    for kind, (losses, state) in torch.load(tmp_path / "results.pt").items():
        # means over halves of a batch, each rounded to BF16 on its way
        torch.testing.assert_close(losses / RANKS, expected, rtol=2.0**-8, atol=0, msg=kind)
        assert state.keys() == alone.keys()
        for name, value in alone.items():
            if value.dtype == torch.uint8 or "weight_scale" in name:
                assert torch.equal(state[name], value), (kind, name)
            elif "lora_" in name:
                assert (state[name] - value).norm() <= 0.02 * value.norm(), (kind, name)


def test_an_fsdp2_that_cannot_shard_bytes_is_refused(tools, monkeypatch):
    model = build(tools)
    monkeypatch.setattr(torch, "__version__", SHARDS_BYTES)
    check_shards(model)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    check_shards(tools.tiny_llama())
    with pytest.raises(ValueError, match=r"torch 2\.11\.0.*upgrade to torch 2\.13.*frozen_weights='bf16'"):
        check_shards(model)

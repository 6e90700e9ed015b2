"""What test_two_processes.py runs in two processes at once, and in one, to compare: trainings of small models.

    python two_processes.py FOLDER RANK WORLD_SIZE PORT SCENARIO...

Results go to FOLDER/SCENARIO-RANK.pt. Where both processes see the same batch, the mean of their gradients is each
one's, exactly, so that two processes must end at the very bits of one.
"""

import copy
import functools
import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_coat import CoatConfig, apply_coat, remove_coat
from hf_coat.functional import GatheredWeight, write_into_buckets
from hf_coat.functional.buckets import _place
from hf_coat.integrations.checks import SHARDS_BYTES
from hf_coat.modules.loss import DeferredLogits
from hf_coat.optim import CoatAdamW, CoatMuon, GradientRelease, muon_groups

WIDTH = 300
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the first process has it
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class Uneven(nn.Module):
    """Sizes that two processes cannot share evenly: 5 rows, 3, one (nothing is left for the second), vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(WIDTH, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.last, self.scale = nn.Linear(3, 1, bias=False), nn.Parameter(torch.ones(WIDTH + 1))

    def forward(self, x):
        return self.last(torch.tanh(self.down(self.norm(self.up(x * self.scale[:-1]))))) * self.scale[-1]


def batch(step):
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps, data=batch):
    """The losses of these steps."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(data(step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def made(sharded, dtype=torch.float32, **options):
    model = Uneven().to(dtype)
    if sharded:
        for part in (model.up, model.down):
            fully_shard(part)
        fully_shard(model)
    return model, CoatAdamW(model.parameters(), lr=1e-2, **options)


def whole(model, optimizer):
    """Parameters and states by name, complete, on every process."""
    params = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return params, get_optimizer_state_dict(model, optimizer, options=FULL)


def save(folder, model, optimizer):
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)


def load(folder, model, optimizer):
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)


def adamw(folder, rank, sharded):
    """Four steps straight; the first two saved."""
    model, optimizer = made(sharded)
    losses = train(model, optimizer, range(2))
    save(folder / f"saved-by-{dist.get_world_size()}", model, optimizer)
    losses += train(model, optimizer, range(2, 4))
    params, states = whole(model, optimizer)
    codes = optimizer.state[model.up.weight]["exp_avg_codes"]
    return {
        "losses": losses,
        "params": params,
        "states": states,
        "rows_held": len(codes.to_local() if sharded else codes),
    }


def stochastic(folder, rank, sharded):
    """BF16 weights that are rounded by chance."""
    model, optimizer = made(sharded, torch.bfloat16, weights="stochastic")
    losses = train(model, optimizer, range(3), data=lambda step: batch(step).bfloat16())
    return {"losses": losses, "params": whole(model, optimizer)[0]}


def resumed(folder, rank, sharded):
    """The last two of those steps, from what the other number of processes saved."""
    other = 1 if dist.get_world_size() == 2 else 2
    model, optimizer = made(sharded)
    while not (folder / f"saved-by-{other}" / ".metadata").exists():  # it is written last
        time.sleep(0.05)
    load(folder / f"saved-by-{other}", model, optimizer)
    losses = train(model, optimizer, range(2, 4))
    params, states = whole(model, optimizer)
    return {"losses": losses, "params": params, "states": states}


def released(folder, rank, sharded):
    """The steps of ``adamw`` taken inside the backward, the norm measured; then one that is clipped."""
    model, optimizer = made(sharded)
    release = GradientRelease(optimizer, max_norm=float("inf"))
    losses, norms = [], []
    for step in range(4):
        losses += train(model, optimizer, [step])
        norms.append(release.gradient_norm().item())
    params, _ = whole(model, optimizer)
    release.remove()
    GradientRelease(optimizer, max_norm=1e-3)
    clipped = train(model, optimizer, range(4, 7))
    return {"losses": losses, "params": params, "norms": norms, "clipped": clipped}


def muon(folder, rank, sharded):
    """Every process orthogonalizes the whole matrix, and keeps its rows."""
    model, _ = made(sharded)
    optimizer = CoatMuon(muon_groups(model), lr=1e-2)
    losses = train(model, optimizer, range(3))
    params, states = whole(model, optimizer)
    return {"losses": losses, "params": params, "states": states}


def full(folder, rank, sharded):
    """A complete state dict, taken and given back."""
    model, optimizer = made(sharded)
    train(model, optimizer, range(2))
    params, states = whole(model, optimizer)
    again, second = made(sharded)
    set_optimizer_state_dict(again, second, states, options=SPREAD)
    return {"states": states, "again": whole(again, second)[1]}


def refused(folder, rank, sharded):
    """What goes wrong with a message."""
    model, optimizer = made(sharded)
    train(model, optimizer, range(1))
    messages = []
    complete = optimizer.state_dict()
    complete["state"] = {
        i: {key: value.full_tensor() if key != "step" else value for key, value in state.items()}
        for i, state in complete["state"].items()
    }
    cut = nn.Parameter(distribute_tensor(torch.ones(4, 256), init_device_mesh("cpu", (2,)), [Shard(1)]))
    cut.grad = torch.ones_like(cut)
    for attempt in (
        lambda: optimizer.load_state_dict(complete),
        lambda: CoatAdamW([cut], group_size=256).step(),
        lambda: messages.append(CoatAdamW([cut], group_size=128).step()),  # a piece is one group
    ):
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return {"messages": messages}


def tokens(step, rank=0):
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(step + 100 * rank))
    return {"input_ids": ids, "labels": ids}


# What FSDP2 of an older torch can shard: the same numbers, made from BF16 weights.
OLD = None if Version(torch.__version__) >= Version(SHARDS_BYTES) else CoatConfig(frozen_weights="bf16")


def llama(adapters=False, coat=None, **changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, **changes}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=64, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if adapters:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    apply_coat(model, OLD if coat is None else coat)
    return model


def train_llama(model, optimizer, rank, accumulate=None, steps=3):
    """Steps of two microbatches each; ``accumulate(last)`` is told before each whether it is the last."""
    losses = []
    for step in range(steps):
        for last in (False, True):
            accumulate(last)
            loss = model(**tokens(2 * step + last, rank)).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def coat(folder, rank, sharded, adapters=False):
    """A converted model, sharded by layers, with gradient accumulation; the same batches on all processes."""
    model = llama(adapters)
    if sharded:
        for layer in model.get_submodule("base_model.model.model.layers" if adapters else "model.layers"):
            fully_shard(layer)
        fully_shard(model)
    optimizer = CoatAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    accumulate = model.set_requires_gradient_sync if sharded else lambda last: None
    losses = train_llama(model, optimizer, 0, accumulate)
    return {"losses": losses, "params": whole(model, optimizer)[0]}


class Counted(DefaultAllGather):
    """FSDP2's all-gather, that writes down how many bytes each process gives."""

    def __init__(self):
        self.bytes = []

    def __call__(self, output_tensor, input_tensor, *args, **kwargs):
        self.bytes.append(input_tensor.nbytes)
        return super().__call__(output_tensor, input_tensor, *args, **kwargs)


BF16_COMPUTE = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# What is gathered, what FSDP2 is asked for, and what differs in the model.
GATHERS = {
    "codes": ("fp8", {}),
    "values": ("bf16", {}),
    "codes kept": ("fp8", {"reshard_after_forward": False}),
    "codes bf16": ("fp8", {"mp_policy": BF16_COMPUTE}),
    "codes whole": ("fp8", {"whole": True}),  # the model is one unit, whose parameters stay gathered
    "codes uneven": ("fp8", {"intermediate_size": 99}),  # 50 rows and 49
    "values uneven": ("bf16", {"intermediate_size": 99}),
    "codes recomputed": ("fp8", {"checkpointing": True}),
    "codes lora": ("fp8", {"adapters": True}),  # over a base that is not stored as FP8
    "values lora": ("bf16", {"adapters": True}),
    "codes meta": ("fp8", {"meta": True}),
}


def made_llama(gather, whole=False, checkpointing=False, meta=False, adapters=False, intermediate_size=96, **fsdp):
    """A converted model under FSDP2; and what its all-gathers move."""
    config = CoatConfig(fsdp_all_gather=gather, frozen_weights="bf16")
    model = llama(adapters, config, intermediate_size=intermediate_size)
    state, buffers = model.state_dict(), dict(model.named_buffers())
    if meta:
        model.to("meta")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    counted = Counted()
    if not whole:
        for layer in model.get_submodule("base_model.model.model.layers" if adapters else "model.layers"):
            fully_shard(layer, **fsdp)
            layer.set_custom_all_gather(counted)
    fully_shard(model, **fsdp)
    if whole:
        model.set_custom_all_gather(counted)
    if meta:
        model.to_empty(device="cpu")
        set_model_state_dict(model, state, options=SPREAD)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return model, counted


def gathered(folder, rank, sharded):
    """Each of GATHERS."""
    results = {}
    for name, (gather, changes) in GATHERS.items():
        model, counted = made_llama(gather, **changes)
        optimizer = CoatAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = train_llama(model, optimizer, 0, model.set_requires_gradient_sync)
        results[name] = {"losses": losses, "bytes": counted.bytes, "params": whole(model, optimizer)[0]}
    return results


def gathered_saved(folder, rank, sharded):
    """Checkpoints of a run that gathers codes: plain, the run that goes on is the run that was never stopped."""
    straight, _ = made_llama("fp8")
    optimizer = CoatAdamW(straight.parameters(), lr=1e-2)
    train_llama(straight, optimizer, 0, straight.set_requires_gradient_sync)
    save(folder / "codes-gathered", straight, optimizer)
    full = get_model_state_dict(straight, options=FULL)
    pieces = {type(p.to_local()).__name__ for p in get_model_state_dict(straight).values()}
    losses = train_llama(straight, optimizer, 0, straight.set_requires_gradient_sync)

    other, _ = made_llama("fp8")
    second = CoatAdamW(other.parameters(), lr=1e-2)
    train_llama(other, second, 1, other.set_requires_gradient_sync)  # so that codes were gathered of other values
    load(folder / "codes-gathered", other, second)
    again = train_llama(other, second, 0, other.set_requires_gradient_sync)

    runs = {}  # FSDP2's root has all weights, and has them gathered when the first forward begins
    for name in ("stopped", "resumed"):
        whole, _ = made_llama("fp8", whole=True, mp_policy=BF16_COMPUTE)
        third = CoatAdamW(whole.parameters(), lr=1e-2)
        if name == "resumed":
            load(folder / "codes-whole", whole, third)
        else:
            train_llama(whole, third, 0, whole.set_requires_gradient_sync)
            save(folder / "codes-whole", whole, third)
        runs[name] = train_llama(whole, third, 0, whole.set_requires_gradient_sync)
    return {"losses": losses, "again": again, "full": full, "pieces": sorted(pieces), "whole": runs}


def gathered_undone(folder, rank, sharded):
    """remove_coat of a sharded model, refused while gradients wait; who else reads a weight, or writes to it; a model
    that is converted when it is sharded, in part; and one that cannot."""
    model, counted = made_llama("fp8")
    q_proj = model.model.layers[0].self_attn.q_proj
    read = {}

    def look(module, args):
        weight = module.weight
        read["values"] = weight + 0
        read["type"] = isinstance(weight, GatheredWeight) and isinstance(weight, nn.Parameter)
        try:
            weight.data.mul_(2)
        except RuntimeError as error:
            read["written"] = str(error)

    handle = q_proj.register_forward_pre_hook(look)
    model.set_requires_gradient_sync(False)
    model(**tokens(0)).loss.backward()
    handle.remove()
    try:
        remove_coat(model)
    except RuntimeError as error:
        read["refused"] = str(error)
    model.set_requires_gradient_sync(True)
    model(**tokens(0)).loss.backward()
    read["gradient"] = str(q_proj.weight.grad.dtype)
    weight = q_proj.weight.full_tensor()
    counted.bytes.clear()
    read["hooks"] = [type(hook).__name__ for hook in model._forward_pre_hooks.values()]
    remove_coat(model)
    read["hooks after"] = [type(hook).__name__ for hook in model._forward_pre_hooks.values()]
    loss = model(**tokens(0)).loss.item()
    read["bytes"] = [*counted.bytes]
    plain = llama()
    remove_coat(plain)

    apply_coat(model)
    model(**tokens(0)).loss.backward()
    model.zero_grad()
    remove_coat(model.model.layers[0])  # a part: its linears read values again
    handle = q_proj.register_forward_pre_hook(lambda module, args: read.update(part=type(module.weight).__name__))
    model(**tokens(0)).loss.backward()
    handle.remove()
    read["other part"] = sum(type(m).__name__ == "CoatLinear" for m in model.modules())
    model.zero_grad()
    remove_coat(model)

    apply_coat(model, CoatConfig(modules_to_not_convert=["q_proj"]))  # as the probe does in the middle of a run
    counted.bytes.clear()
    model(**tokens(0)).loss.backward()
    read["but q_proj"] = [*counted.bytes]

    said = []
    logging.getLogger("hf_coat.modules.gather").addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())
    by_columns, counted = made_llama("fp8", shard_placement_fn=lambda p: Shard(p.dim() - 1))
    by_columns(**tokens(0)).loss.backward()
    read["by columns"], read["said"] = [*counted.bytes], said
    return read | {"weight": weight, "loss": loss, "plain": plain(**tokens(0)).loss.item()}


# What is sharded as a unit with the head, for how long it stays gathered, and what differs in the model.
HEADS = {
    "tail": (("model.norm", "lm_head"), False, {}),  # as accelerate has it
    "tied": (("model.norm", "model.embed_tokens", "lm_head"), False, {"tie_word_embeddings": True}),
    "alone": (("lm_head",), False, {}),
    "bf16": (("model.norm", "lm_head"), False, {"mp_policy": BF16_COMPUTE}),
    "frozen": (("model.norm", "lm_head"), False, {"frozen": True}),
    "root": ((), False, {}),
    "given back": (("lm_head",), True, {}),
    "root given back": ((), True, {}),
}


def heads(folder, rank, sharded):
    """Each of HEADS: the losses, which are computed with the head, and what becomes of the logits."""
    results = {}
    for name, (unit, given_back, changes) in HEADS.items():
        changes = dict(changes)
        policy, frozen = changes.pop("mp_policy", None), changes.pop("frozen", False)
        model = llama(**changes)
        model.lm_head.requires_grad_(not frozen)
        if sharded:
            options = {} if policy is None else {"mp_policy": policy}
            for layer in model.model.layers:
                fully_shard(layer, **options)
            if unit:
                together = [model.get_submodule(part) for part in unit]
                fully_shard(together if len(unit) > 1 else together[0], reshard_after_forward=given_back, **options)
            fully_shard(model, **options, **({"reshard_after_forward": True} if given_back and not unit else {}))
        elif policy is not None:
            continue
        optimizer = CoatAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = train_llama(model, optimizer, 0, model.set_requires_gradient_sync if sharded else lambda last: None)
        params, _ = whole(model, optimizer)
        results[name] = {"losses": losses, "params": params} | after(model, optimizer)
    return results


def after(model, optimizer):
    """Of three steps and an evaluation: what became of the logits, and who can read them when."""
    told = []
    if hasattr(model.lm_head, "_get_fsdp_state"):
        unit = model.lm_head._get_fsdp_state()
        before = unit._pre_backward
        unit._pre_backward = lambda gradient: told.append(tuple(gradient.shape)) or before(gradient)
    output = model(**tokens(0))
    output.loss.backward()
    never = isinstance(output.logits, DeferredLogits) and output.logits.product.value is None
    found = {"never": never, "told": [*told]}
    read = model(**tokens(0))
    found["values"] = read.logits.detach() + 0
    read.loss.backward()
    found["after backward"] = refusal(output)
    optimizer.step()
    optimizer.zero_grad()
    again = model(**tokens(1))  # the weight is gathered again, as it is now
    found["after step"] = refusal(output)
    again.loss.backward()
    model.eval()
    evaluated = model(**tokens(2))
    found["evaluated"] = (type(evaluated.logits).__name__, evaluated.loss.item())
    optimizer.zero_grad()
    remove_coat(model)
    model.train()
    head, undone = type(model.lm_head), model(**tokens(2))
    undone.loss.backward()
    names = ["Tensor" if not isinstance(undone.logits, DeferredLogits) else "DeferredLogits", head.__name__]
    return found | {"undone": names, "still sharded": issubclass(head, FSDPModule)}


def refusal(output):
    """What is said where its logits are summed up; "" where they can be."""
    try:
        output.logits.detach().sum()
    except RuntimeError as error:
        return str(error)
    return ""


def coat_lora(folder, rank, sharded):
    """The same with adapters on a converted base that is frozen."""
    return coat(folder, rank, sharded, adapters=True)


def coat_ddp(folder, rank, sharded):
    """A converted model under DDP, each process with its own batches; one process sees both."""
    model = llama()
    optimizer = CoatAdamW(model.parameters(), lr=1e-2)
    if not sharded:
        losses = []
        for step in range(3):
            of_step = [model(**tokens(2 * step + last, rank)).loss for last in (0, 1) for rank in (0, 1)]
            (sum(of_step) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [loss.item() for loss in of_step]
        return {"losses": losses, "params": dict(model.named_parameters())}
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses = train_llama(wrapped, optimizer, rank, lambda last: setattr(wrapped, "require_backward_grad_sync", last))
    return {"losses": losses, "params": {name: p.detach() for name, p in model.named_parameters()}}


def in_buckets(folder, rank, sharded):
    """A converted model under DDP with its linears' gradients copied into the buckets, and made there; one weight is
    used twice. Also the names of the gradients that lay there when they were made, by backward."""
    runs = {}
    for how in ("copied", "made there", "checkpointed"):
        model = llama()
        layers = model.model.layers
        layers[0].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
        optimizer = CoatAdamW(model.parameters(), lr=1e-2)
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=0.1)
        if how != "copied":
            write_into_buckets(wrapped)
        if how == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        made, there = {}, []
        for name, p in model.named_parameters():
            note = functools.partial(lambda made, name, p: made.update({name: p.grad.data_ptr()}), made, name)
            p.register_post_accumulate_grad_hook(note)

        def accumulate(last, wrapped=wrapped, made=made):
            wrapped.require_backward_grad_sync = last
            made.clear()

        def of_step(optimizer, args, kwargs, model=model, made=made, there=there):
            at = {name: p.grad.data_ptr() for name, p in model.named_parameters()}
            there.append({name: at[name] == address for name, address in made.items()})

        optimizer.register_step_pre_hook(of_step)
        losses = train_llama(wrapped, optimizer, rank, accumulate, steps=5)
        runs[how] = {"losses": losses, "there": there, "params": {n: p.detach() for n, p in model.named_parameters()}}
    weights = [layer.mlp.up_proj.weight for layer in layers]
    gradients = torch.autograd.grad(model(**tokens(0, rank)).loss, weights)
    runs["offered"] = [_place(w) is not None for w in weights]
    runs["elsewhere"] = [_place(w).data_ptr() != g.data_ptr() for w, g in zip(weights, gradients, strict=True)]
    runs["copy"] = type(copy.deepcopy(wrapped)).__name__
    del wrapped, accumulate
    runs["kept"] = [_place(w) is not None for w in weights]
    try:
        write_into_buckets(nn.parallel.DistributedDataParallel(model))
    except ValueError as error:
        runs["refused"] = str(error)
    return runs


def killed(folder, rank, sharded):
    """The second process ends in the middle of a step; says how the first one does."""
    model, optimizer = made(sharded)
    train(model, optimizer, range(1))
    if rank == 1:
        os._exit(17)
    try:
        train(model, optimizer, range(1, 3))
    except RuntimeError as error:
        torch.save(str(error), folder / "message.pt")
        os._exit(0)  # there is nobody left to meet at the barrier


SCENARIOS = [adamw, stochastic, resumed, released, muon, full, refused, coat, coat_lora, coat_ddp, heads, killed]
SCENARIOS = {f.__name__: f for f in (*SCENARIOS, in_buckets, gathered, gathered_saved, gathered_undone)}


def main(folder, rank, world_size, *scenarios):
    folder, rank, world_size = Path(folder), int(rank), int(world_size)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    # they meet at a file: a port that was free may be taken by the time it is listened at
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    for name in scenarios:
        result = SCENARIOS[name](folder, rank, world_size > 1)
        torch.save(result, f"{folder}/{name}-{world_size}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

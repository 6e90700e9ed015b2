"""What test_trainer.py runs in two processes at once, and in one: the stock Trainer, under DDP and under FSDP2.

    python trainer_processes.py FOLDER RANK WORLD_SIZE PORT DEVICE SCENARIO...

Results go to FOLDER/SCENARIO-WORLD_SIZE-RANK.pt. A global batch has the same samples in one process and in two.
"""

import importlib.util
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainerCallback
from transformers import trainer as hf_trainer

import hf_coat
from hf_coat.integrations.checks import SHARDS_BYTES
from hf_coat.modules import loss
from hf_coat.modules.gather import _groups

_spec = importlib.util.spec_from_file_location("tools", Path(__file__).parents[1] / "integrations" / "conftest.py")
tools = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tools)

BATCH = 4  # of all processes
IMAGE = 120  # the id of image tokens
STEPS = {"cpu": (2, 3, 4), "cuda": (10, 15, 20)}  # where two processes save, where one saves, and the last

LEARNING_RATE = {"cpu": 1e-2, "cuda": 1e-3}  # what a bit moves grows with the steps


def dataset(steps):
    return tools.random_tokens(rows=BATCH * steps)


def images(steps):
    """An image of four tokens before the text of each sample."""
    pixels = torch.randn(BATCH * steps, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rows = []
    for row, image in zip(dataset(steps), pixels, strict=True):
        text = row["input_ids"] % IMAGE
        ids = torch.cat([torch.full((4,), IMAGE), text])
        rows.append({"input_ids": ids, "labels": torch.cat([torch.full((4,), -100), text]), "pixel_values": image})
    return rows


# What FSDP2 of an older torch can shard: the same numbers, made from BF16 weights.
OLD = {} if Version(torch.__version__) >= Version(SHARDS_BYTES) else {"coat": {"model": {"frozen_weights": "bf16"}}}


def full():
    return tools.tiny_llama()


def full_bf16():
    return tools.tiny_llama(torch.bfloat16)


def lora():
    model = get_peft_model(tools.tiny_llama(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:  # those that torch makes differ from process to process
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def vlm():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(
        LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
            text_config=transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=tools.VOCABULARY),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            attn_implementation="eager",
        )
    )
    model.model.vision_tower.requires_grad_(False)
    return model


def arguments(output_dir, world_size, device, sharded=None, **changes):
    """Those of a run; ``sharded`` is what FSDP2 keeps in checkpoints, None is DDP."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if sharded is not None:
        changes |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": sharded} | changes.pop("more", {})}
        if device == "cpu":
            # accelerate shards on accelerators only, and would run DDP: it takes these processes for such
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            changes["accelerator_config"] = {"use_configured_state": True}
    defaults = {
        "coat": "lean",
        "max_steps": STEPS[device][-1],
        "per_device_train_batch_size": BATCH // world_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE[device],
        "lr_scheduler_type": "constant",
        "use_cpu": device == "cpu",
        "ddp_find_unused_parameters": False,
    }
    return hf_coat.TrainingArguments(**tools.short_run(output_dir, **defaults | changes))


class Said(logging.Handler):
    """The messages of COAT's logger in this process."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class Between(TrainerCallback):
    """The values of gradients that a process holds between microbatches, for each value of a parameter."""

    def __init__(self):
        self.held = []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        whole = [p._unsharded_param for group in _groups(model) for p in group.fsdp_params]
        held = sum(p.grad.numel() for p in whole or model.parameters() if p.grad is not None)
        self.held.append(held / sum(p.numel() for p in model.parameters()))


def run(model, data, args, **train):
    """A training, and what it left in this process."""
    logger, said = logging.getLogger("transformers.coat"), Said()
    logger.addHandler(said)
    can_fuse, fused = loss._can_fuse, []
    loss._can_fuse = lambda *arguments: fused.append(can_fuse(*arguments)) or fused[-1]
    between = Between()
    trainer = Trainer(model, args, train_dataset=data, callbacks=[between])
    trainer.train(**train)
    trainer.save_model()
    loss._can_fuse = can_fuse
    logger.removeHandler(said)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    kinds = [type(p).__name__ for p in trainer.model.parameters()]
    return trainer, {
        "losses": [entry["loss"] for entry in logged],
        "norms": [entry["grad_norm"] for entry in logged],
        "said": said.lines,
        "bucket_views": getattr(trainer.model_wrapped, "gradient_as_bucket_view", None),
        "made_there": [hook.__module__ for hook, _ in getattr(trainer.model_wrapped, "_comm_hooks", ())],
        "fused": fused,
        "between": between.held,
        "sharded": kinds.count("DTensor") / len(kinds),
        "states": len(trainer.optimizer.optimizer.state),
        "local_bytes": sum(
            (t.to_local() if hasattr(t, "to_local") else t).nbytes
            for state in trainer.optimizer.optimizer.state.values()
            for t in state.values()
            if torch.is_tensor(t)
        ),
    }


def trained(make, data, kind, folder, world_size, device, **changes):
    output = folder / f"{make.__name__}-{kind}-{world_size}"
    sharded = {"sharded": "SHARDED_STATE_DICT", "whole": "FULL_STATE_DICT"}.get(kind)
    args = arguments(output, world_size, device, sharded, **changes)
    return run(make(), data(STEPS[device][-1]), args)[1]


SAVES = {"save_strategy": "steps"}


def scenarios(folder, rank, world_size, device):
    """What can be run, by name."""
    at = (folder, world_size, device)
    first, second, last = STEPS[device]

    def saving(make, kind, **changes):
        return trained(make, dataset, kind, *at, **SAVES, save_steps=first, **changes)

    def accumulated(kind):
        size = BATCH // world_size // 2
        return trained(
            full, dataset, kind, folder / "accumulated", *at[1:], per_device_train_batch_size=size,
            gradient_accumulation_steps=2,
        )  # fmt: skip

    def resumed(kind):
        """One process goes on from what two saved, and two from what it saved then."""
        mine = first if world_size == 1 else second
        source = folder / f"full-{kind}-2" if world_size == 1 else folder / f"resumed-{kind}-1"
        wait_for(folder / f"full_{kind}-2-0.pt" if world_size == 1 else folder / f"resumed_{kind}-1-0.pt")
        args = arguments(
            folder / f"resumed-{kind}-{world_size}", world_size, device,
            {"sharded": "SHARDED_STATE_DICT", "whole": "FULL_STATE_DICT"}[kind],
            max_steps=second if world_size == 1 else last, save_steps=second, **SAVES,
        )  # fmt: skip
        # the data of the whole training, so that steps have the same samples
        return run(full(), dataset(last), args, resume_from_checkpoint=str(source / f"checkpoint-{mine}"))[1]

    def again(kind):
        """Two processes go on from what two saved."""
        args = arguments(
            folder / f"again-{kind}", world_size, device,
            {"sharded": "SHARDED_STATE_DICT", "whole": "FULL_STATE_DICT"}[kind],
        )  # fmt: skip
        source = folder / f"full-{kind}-2" / f"checkpoint-{first}"
        return run(full(), dataset(last), args, resume_from_checkpoint=str(source))[1]

    def killed():
        """The second process is killed while the last checkpoint is saved."""
        save = hf_trainer.save_fsdp_optimizer

        def save_or_die(plugin, accelerator, optimizer, model, output_dir, **kwargs):
            if rank == 1 and output_dir.endswith(f"checkpoint-{last}"):
                os.kill(os.getpid(), signal.SIGKILL)
            return save(plugin, accelerator, optimizer, model, output_dir, **kwargs)

        hf_trainer.save_fsdp_optimizer = save_or_die
        return trained(full, dataset, "sharded", folder / "killed", world_size, device, **SAVES, save_steps=first)

    def recovered():
        """What is started again in its folder."""
        args = arguments(folder / "killed" / "full-sharded-2", world_size, device, "SHARDED_STATE_DICT")
        return run(full(), dataset(last), args, resume_from_checkpoint=True)[1]

    return {
        "killed": killed,
        "recovered": recovered,
        "full_ddp": lambda: saving(full, "ddp"),
        "full_sharded": lambda: saving(full, "sharded"),
        "full_whole": lambda: saving(full, "whole"),
        "bf16_ddp": lambda: trained(full_bf16, dataset, "ddp", *at, bf16=True),
        "bf16_whole": lambda: trained(full_bf16, dataset, "whole", *at, bf16=True),
        "lora_ddp": lambda: trained(lora, dataset, "ddp", *at),
        "lora_whole": lambda: trained(lora, dataset, "whole", *at, **OLD),
        "vlm_ddp": lambda: trained(vlm, images, "ddp", *at),
        # accelerate looks for all layers that LLaVA may have, and does not find those of a text tower
        "vlm_whole": lambda: trained(
            vlm, images, "whole", *at,
            more={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "CLIPEncoderLayer"]},
        ),
        "accumulated_ddp": lambda: accumulated("ddp"),
        "accumulated_whole": lambda: accumulated("whole"),
        "options": lambda: trained(
            full, dataset, "whole", folder / "options", *at[1:],
            more={"activation_checkpointing": True, "cpu_ram_efficient_loading": True},
        ),
        "resumed_sharded": lambda: resumed("sharded"),
        "resumed_whole": lambda: resumed("whole"),
        "again_sharded": lambda: again("sharded"),
        "again_whole": lambda: again("whole"),
    }  # fmt: skip


def wait_for(file):
    while not file.exists():
        time.sleep(0.05)


def main(folder, rank, world_size, meeting, device, *names):
    folder, rank, world_size = Path(folder), int(rank), int(world_size)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    backend = "cpu:gloo,cuda:nccl"
    if device == "cpu":
        os.environ["GLOO_SOCKET_IFNAME"], backend = "lo", "gloo"
    # they meet at a file: a port that was free may be taken by the time it is listened at
    store = torch.distributed.FileStore(f"{meeting}/{world_size}", world_size)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    made = scenarios(folder, rank, world_size, device)
    for name in names:
        result = made[name]()
        target = folder / f"{name}-{world_size}-{rank}.pt"
        torch.save(result, target.with_suffix(".part"))
        os.replace(target.with_suffix(".part"), target)  # another process waits for it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

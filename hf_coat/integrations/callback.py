"""What COAT does in a run of the stock Trainer: convert, report, watch, and put recipe and record into checkpoints."""

import dataclasses
import json
import math
import os
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import trainer as hf_trainer
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from transformers.utils import logging

from ..card import TAGS
from ..config import CONFIG_NAME, CoatConfig, HfCoatConfig
from ..convert import ConversionReport, apply_coat
from ..families import is_adapted
from ..functional import WeightCache
from ..live import EVERY, GIB, Rounding, RoundingHistory, Speed, by_kind, peak_flops
from ..memory import predict
from ..optim import CoatOptimizer, GradientRelease
from ..optim.sharding import local
from ..pays import hidden_size, in_words, measured, speedup
from ..probe import Probe
from ..record import RUN_NAME, about_model, hardware, read_run, run_record, write_run
from ..report import format_bytes, memory_table
from .checks import check_model, check_release, check_run, check_shards, loaded_with

# A child of transformers' own logger, governed by Trainer's log_level and logging.set_verbosity. What COAT did is told
# as a warning: transformers shows nothing less by default, and what was not converted must not go unseen.
logger = logging.get_logger("transformers.coat")


def convert_model(model: nn.Module, coat: HfCoatConfig) -> ConversionReport | None:
    """Carry out the model half of ``coat``, if it has one. Doing it again changes nothing."""
    if coat.model is None:
        return None
    check_model(model, coat.model)
    return apply_coat(model, coat.model)


class CoatCallback(TrainerCallback):
    """What COAT does in a Trainer's run: convert the model, report, put ``coat_config.json`` into the checkpoints.

    Beside it stands ``coat_run.json``, the record of the run (see :mod:`hf_coat.record`), and the model's card gets a
    section and metadata made from it, whenever Trainer writes one.

    Into Trainer's own log, and so to whatever shows that, go the live figures of :mod:`hf_coat.live`, their names
    beginning with ``coat/``: the tokens of all processes a second and the ``mfu``, and of this process the GiB of
    ``weights``, ``gradients``, ``optimizer_states`` and of the CUDA allocator's ``peak``; and every now and then (at
    least 50 steps lie between, and it is one forward of the step) what rounding to FP8 costs, by kind.

    Every Trainer has one that follows ``args.coat``. Give one explicitly only with arguments that have no ``coat``,
    and then name the optimizer too: ``optimizer_cls_and_kwargs=(CoatAdamW, {"lr": 1e-5})``.

    Args:
        coat: What :meth:`hf_coat.HfCoatConfig.resolve` takes.

    Attributes:
        coat: The recipe; None in a run without COAT.
        report: What happened to the model; None before, and where the recipe has no model half.
        record: The run as plain values: ``coat``, ``conversion``; the rates that Trainer logs, by their names there;
            for a vision-language model what the ``probe`` of the first steps found, by step, region and modality;
            ``speedup``, where this GPU was measured, what :func:`hf_coat.pays.speedup` says of the first batch;
            at the end the bytes of ``weights``, ``optimizer_states``, and ``adamw_states``: what AdamW's would be.
        probe: What watches the step that is being taken; None outside of the first steps.
        resumed_at: The steps at which the run was resumed.
    """

    def __init__(self, coat: HfCoatConfig | dict | str):
        self._start(HfCoatConfig.resolve(coat))

    def _start(self, coat: HfCoatConfig | None) -> None:
        self.coat = coat
        self.report: ConversionReport | None = None
        self.record: dict[str, Any] = {}
        self.resumed_at: list[int] = []
        self.probe: Probe | None = None
        self._release: GradientRelease | None = None
        self._first_batch: RemovableHandle | None = None
        self._speed: Speed | None = None
        self._rounding: Rounding | None = None
        self._history = RoundingHistory()
        self._epoch_begins = False
        self._batch: dict[str, Any] | None = None  # the first one, for the estimate at the end

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if getattr(args, "coat", None) is not None:
            raise ValueError("coat is given twice, to CoatCallback and to the training arguments: leave one out")
        self._prepare(args, model)

    def _prepare(self, args, model: nn.Module) -> None:
        check_release(self.coat, args.gradient_accumulation_steps)
        accelerator = AcceleratorState()
        fsdp = getattr(accelerator, "fsdp_plugin", None)
        check_run(
            mixed_precision=accelerator.mixed_precision,
            deepspeed=accelerator.deepspeed_plugin is not None,
            fsdp_version=None if fsdp is None else fsdp.fsdp_version,
            cpu_offload=fsdp is not None and isinstance(fsdp.cpu_offload, CPUOffloadPolicy),
        )
        self._convert(model)
        if fsdp is not None:
            check_shards(model)
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(list(TAGS))

    def _convert(self, model: nn.Module) -> None:
        self.report = convert_model(model, self.coat)
        self.record = {"coat": self.coat.to_dict(), "conversion": self.report and self.report.to_dict()}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step > 0:
            _refuse_codes(bare(optimizer))  # without COAT too
        if self.coat is None:
            return
        WeightCache.clear_all()  # only optimizers step here, so codes are kept from the first step on, resumed or not
        if state.global_step > 0:  # what the run that is resumed had found
            file, then = _checkpoint_recipe(args, state)
            if then is not None:
                self._promote((then.get("model") or {}).get("promoted", {}))
        self._convert(model)  # model_init may have made another one since
        if self.report is not None and state.is_world_process_zero:
            logger.warning(f"COAT: {self.report.summary()}")
        self._check_optimizer(bare(optimizer), state.global_step)
        self._release_gradients(args, bare(optimizer))
        if state.global_step > 0:
            if then is not None:
                self._compare(file, then)
            before = _record_before(args, state)
            self.resumed_at = [*before.get("resumed_at", ()), state.global_step]
            self._history = RoundingHistory(**(before.get("rounding") or {}))
        if self.coat.live:
            self._speed = _speed(args, state, model)
        self._look_at_first_batch(args, model, state.is_world_process_zero)

    def _check_optimizer(self, optimizer: Optimizer, resumed_at: int) -> None:
        if self.coat.optimizer is None:
            return
        if not isinstance(optimizer, CoatOptimizer):
            logger.warning(
                f"the Trainer was given or made {type(optimizer).__name__}, so COAT's optimizer half is not in use. "
                "If that is meant, say so: coat=HfCoatConfig(optimizer=None)"
            )
        elif resumed_at > 0 and not optimizer.state:
            raise ValueError(
                f"training was to be resumed at step {resumed_at}, but no optimizer states were loaded: the "
                f"checkpoint lacks {hf_trainer.OPTIMIZER_NAME} or {hf_trainer.SCHEDULER_NAME}, because it was saved "
                "with save_only_model=True. Resume from another one, or start a new run from its weights"
            )

    def _release_gradients(self, args, optimizer: Optimizer) -> None:
        """Begin with gradient release, if the recipe says so: only now are these the parameters that are trained."""
        if self._release is not None:  # auto_find_batch_size begins a second time
            self._release.remove()
        if self.coat.optimizer is not None and self.coat.optimizer.gradient_release:
            if isinstance(optimizer, CoatOptimizer):
                self._release = GradientRelease(optimizer, max_norm=args.max_grad_norm or math.inf)

    def _look_at_first_batch(self, args, model: nn.Module, told: bool) -> None:
        """When the first batch comes, keep it for the estimate at the end; note what FP8 gains at its size, and warn
        if that is nothing."""
        if self._first_batch is not None:  # auto_find_batch_size begins a second time
            self._first_batch.remove()
        self._batch, gpu = None, hardware(args.device, args.world_size)["device"]
        kept = self._speed is not None and args.world_size == 1
        of_measured = self.report is not None and gpu == measured().gpu and not is_adapted(model)
        if args.torch_compile or not (kept or of_measured):
            return

        def look(model: nn.Module, positional: tuple, inputs: dict[str, Any]) -> None:
            if not model.training:  # eval_on_start
                return
            self._first_batch.remove()
            ids = inputs.get("input_ids")
            if of_measured and ids is not None:
                found = speedup(hidden_size(getattr(model, "config", None)), ids.numel(), gpu)
                if found is not None:
                    self.record["speedup"] = found
                    if told and found["factor"] < 1:
                        logger.warning(f"COAT: {in_words(found)}")
            if kept:  # with the values, which models look into: token ids, images that are padding
                there = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
                self._batch = inputs | {k: v.detach().cpu() for k, v in there.items()}

        self._first_batch = model.register_forward_pre_hook(look, with_kwargs=True)

    def _compare(self, file: str, then: dict[str, Any]) -> None:
        """Say in what the recipe differs from the one that the checkpoint was made with."""
        then, now = _flat(then), _flat(self.coat.to_dict())
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        if keys:
            changes = "; ".join(f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in keys)
            logger.warning(f"coat differs from what {file} was saved with: {changes}")

    def _promote(self, linears: dict[str, str]) -> None:
        """Keep these in BF16, and no others that a probe found. The user's own configuration stays what it was."""
        if self.coat.model is not None and self.coat.model.promoted != linears:
            self.coat = dataclasses.replace(self.coat, model=dataclasses.replace(self.coat.model, promoted=linears))

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch_begins = True

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._end_rounding()  # of a step that was given up
        converted = self.report is not None and not args.torch_compile
        if self._speed is not None and converted and _is_measured(args, state, self._epoch_begins):
            self._rounding = Rounding(model).__enter__()
        self._epoch_begins = False
        if self.probe is not None:  # of a step that was given up
            self.probe.__exit__()
            self.probe = None
        if converted and self.report.regions and state.global_step < self.coat.model.probe_steps:
            self.probe = Probe(model, self.coat.model).__enter__()

    def _end_rounding(self) -> None:
        if self._rounding is not None:
            self._rounding.__exit__()

    def on_substep_end(self, args, state, control, **kwargs):
        self._end_rounding()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._end_rounding()
        if self._speed is not None and "gradients" not in self.record:
            self.record["gradients"] = sum(local(p.grad).nbytes for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._speed is not None:
            self._speed.end_step()
        if self.probe is None:
            return
        # Each step decides by itself, so that a run that is resumed between two of them decides as if it were not.
        probe, self.probe = self.probe, None
        probe.__exit__()
        found = dict(probe.outstanding())
        if found:
            self._promote(self.coat.model.promoted | found)
            self.report = apply_coat(model, self.coat.model)
            self.record |= {"coat": self.coat.to_dict(), "conversion": self.report.to_dict()}
            if state.is_world_process_zero:
                said = "; ".join(f"{name}: {why}" for name, why in found.items())
                logger.warning(f"COAT: step {state.global_step} showed what FP8 costs too much: {said}")
        self.record.setdefault("probe", {})[str(state.global_step)] = probe.by_region()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._speed is not None:
            self._speed.pause()

    def on_log(self, args, state, control, logs=None, model=None, optimizer=None, **kwargs):
        if self.coat is None:
            return
        if self._speed is not None and "loss" in logs:
            live = {f"coat/{name}": value for name, value in self._live(args, state, model, bare(optimizer)).items()}
            logs.update(live)  # the callbacks that show the logs come after this one
            state.log_history[-1].update(live)
        self.record |= {key: value for key, value in logs.items() if key.endswith("_per_second")}
        skipped = bare(optimizer).skipped_groups() if isinstance(bare(optimizer), CoatOptimizer) else 0
        if skipped and "loss" in logs:
            logs["coat/skipped_groups"] = state.log_history[-1]["coat/skipped_groups"] = skipped
        if self._release is not None and "grad_norm" in logs:  # Trainer itself found no gradients
            norm = self._release.gradient_norm().item()
            logs["grad_norm"] = state.log_history[-1]["grad_norm"] = norm

    def _live(self, args, state, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """What the log of a step gets."""
        found = self._speed.figures(state.total_flos, state.num_input_tokens_seen)
        memory = {name: size for name, size in self._memory(args, model, optimizer).items() if name != "adamw_states"}
        found |= {f"{name}_gib": size / GIB for name, size in memory.items() if size is not None}
        if self._rounding is not None:
            layers, self._rounding = self._rounding.by_layer(), None
            self._history.add(state.global_step, layers)
            for kind, measures in by_kind(layers).items():
                found |= {f"{kind}_{name}": value for name, value in measures.items()}
        return found

    def _memory(self, args, model: nn.Module, optimizer: Optimizer | None) -> dict[str, int | None]:
        """Bytes by class that this process holds, as far as they are known."""
        memory = {} if optimizer is None else _bytes_of(model, optimizer)
        if "gradients" in self.record:
            memory["gradients"] = self.record["gradients"]
        return memory | {"peak": torch.cuda.max_memory_allocated(args.device) if args.device.type == "cuda" else None}

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._write(args, state, model, optimizer, args.output_dir, _checkpoint_folder(args, state))
        if self._speed is not None:
            self._speed.pause()

    def on_push_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._write(args, state, model, optimizer, args.output_dir)

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.coat is None:
            return
        if self._release is not None:
            self._release.remove()
            self._release = None
        optimizer = bare(optimizer)
        self._write(args, state, model, optimizer, args.output_dir)
        self.record |= _bytes_of(model, optimizer)
        if isinstance(optimizer, CoatOptimizer) and state.is_world_process_zero:
            coat, adamw = (format_bytes(self.record[key]) for key in ("optimizer_states", "adamw_states"))
            logger.warning(f"COAT: the optimizer's states took {coat}; those of AdamW would have taken {adamw}")
        if self._batch and state.is_world_process_zero:
            logger.warning(f"COAT: {self._savings(args, model, optimizer)}")
            self._batch = None

    def _savings(self, args, model: nn.Module, optimizer: Optimizer) -> str:
        """The table of what was saved: a BF16 run is predicted, and beside the prediction of this one stands the run.

        An estimate that fails, for whatever a model does on tensors without memory, may not end a training.
        """
        batch = {k: v.to(args.device) if isinstance(v, torch.Tensor) else v for k, v in self._batch.items()}
        ours = self.coat.optimizer if isinstance(optimizer, CoatOptimizer) else None
        mixed = AcceleratorState().mixed_precision == "bf16"
        try:
            with torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=mixed):
                without, coat = (
                    predict(model, batch, coat=False, optimizer=None),
                    predict(model, batch, optimizer=ours),
                )
        except Exception as error:
            return f"there is no estimate of the memory without COAT, because it failed: {error!r}"
        table = memory_table(without, coat, self._memory(args, model, optimizer), baseline="AdamW")
        return (
            f"{table}\n'predicted' is an estimate for one forward of this run's first batch; only 'measured' was run"
        )

    def _write(self, args, state, model: nn.Module, optimizer, *folders: str) -> None:
        if self.coat is None or not args.should_save:
            return
        record = self.run_record(args, state, model, bare(optimizer))
        for folder in filter(os.path.isdir, folders):  # a hyperparameter search has its checkpoints elsewhere
            self.coat.save_pretrained(folder)
            write_run(record, folder)

    def run_record(self, args, state, model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
        """What ``coat_run.json`` holds at this moment; see :mod:`hf_coat.record`."""
        return run_record(
            coat=self.record["coat"],
            model=about_model(model),
            conversion=self.record["conversion"],
            hardware=hardware(args.device, args.world_size),
            steps=state.global_step,
            resumed_at=self.resumed_at,
            throughput={key: value for key, value in self.record.items() if key.endswith("_per_second")},
            speedup=self.record.get("speedup"),
            memory=self._memory(args, model, optimizer),
            rounding=self._history.to_dict() if self._history.steps else None,
            skipped_groups=optimizer.skipped_groups() if isinstance(optimizer, CoatOptimizer) else 0,
            log=state.log_history,
        )


class FollowsArguments(CoatCallback):
    """The callback that every Trainer has: its recipe is ``args.coat``. Without one it does nothing, except where PEFT
    put adapters on a model that was loaded with a ``CoatConfig``."""

    def __init__(self):
        self._start(None)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if getattr(args, "coat", None) is not None:
            self.coat = HfCoatConfig.resolve(args.coat)
            self._prepare(args, model)
        elif is_adapted(model) and isinstance(loaded_with(model), CoatConfig):
            # PEFT put its adapters around linears that from_pretrained had converted: they belong to the conversion.
            report = apply_coat(model, loaded_with(model))
            logger.warning(f"COAT: {report.summary()}")


def _bytes_of(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    states = [value for values in optimizer.state.values() for value in values.values()]
    return {
        "weights": sum(local(p).nbytes for p in model.parameters()),
        "optimizer_states": sum(local(value).nbytes for value in states if isinstance(value, torch.Tensor)),
        "adamw_states": sum(2 * local(p).nbytes for group in optimizer.param_groups for p in group["params"]),
    }


def _record_before(args, state) -> dict[str, Any]:
    """The record of the run that is resumed, if it left one."""
    file = _in_checkpoint(args, state, RUN_NAME)
    return {} if file is None else read_run(file)


def _speed(args, state, model: nn.Module) -> Speed:
    """What tells the speed from now on; transformers counts 6 FLOPs for each parameter and token."""
    counted = model.num_parameters(exclude_embeddings=True) if hasattr(model, "num_parameters") else 0
    peak = peak_flops(torch.cuda.get_device_name(args.device)) if args.device.type == "cuda" else None
    gpus = args.world_size * max(args.n_gpu, 1)
    return Speed(state.total_flos, state.num_input_tokens_seen, 6 * counted, None if peak is None else peak * gpus)


def _is_measured(args, state, epoch_begins: bool) -> bool:
    """Whether rounding is measured in the step that begins: one that is logged, or stands for its epoch; a matter of
    its number alone, so that a resumed run measures the same ones."""
    if args.logging_strategy == IntervalStrategy.EPOCH:
        return epoch_begins
    if args.logging_strategy != IntervalStrategy.STEPS:
        return False
    step, interval = state.global_step + 1, state.logging_steps
    if step == 1:
        return interval == 1 or args.logging_first_step
    return step % (interval * -(-EVERY // interval)) == 0


def bare(optimizer) -> Optimizer:
    """The optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _refuse_codes(optimizer: Optimizer) -> None:
    """Other optimizers load the states of ours without a word, and fail at their first step for what they lack."""
    states = getattr(optimizer, "state", {}).values()
    if not isinstance(optimizer, CoatOptimizer) and any(isinstance(s, dict) and "exp_avg_codes" in s for s in states):
        raise ValueError(
            f"{type(optimizer).__name__} was given states of COAT's optimizer, which it cannot read: resume with the "
            "coat= of the checkpoint (its coat_config.json), convert its optimizer.pt to AdamW's with "
            "hf_coat.optim.to_adamw_state_dict, or start a new run from its weights"
        )


def _checkpoint_recipe(args, state) -> tuple[str | None, dict[str, Any] | None]:
    """The file with the recipe of the checkpoint that is resumed from, and what it holds; None where there is none."""
    file = _in_checkpoint(args, state, CONFIG_NAME)
    if file is None:
        return None, None
    with open(file, encoding="utf-8") as stream:
        return file, json.load(stream)


def _in_checkpoint(args, state, name: str) -> str | None:
    """The file of this name in the checkpoint that is resumed from, if it is there.

    Trainer does not tell an event where it resumes from; it is where the arguments say, or in the output folder.
    """
    folders = (str(args.resume_from_checkpoint), _checkpoint_folder(args, state))
    return next((file for file in (os.path.join(folder, name) for folder in folders) if os.path.isfile(file)), None)


def _checkpoint_folder(args, state) -> str:
    return os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

"""``TrainingArguments(coat=...)`` for the stock Trainer: an entry in two of its registries, and a callback.

Trainer looks its optimizer up in ``_OPTIMIZER_HANDLERS`` by ``args.optim``, and makes one of each class that stands in
``DEFAULT_CALLBACKS``. Our entries do nothing unless ``args.coat`` is set. The model is converted in ``on_init_end``,
the last event before the optimizer is made and before ``accelerate`` wraps the model. Without private names:

    Trainer(model, args, callbacks=[CoatCallback("lean")], optimizer_cls_and_kwargs=(CoatAdamW, {"lr": 1e-5}))
"""

import functools
import os
from dataclasses import dataclass, field, fields
from typing import Any

import transformers
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel
from transformers import trainer as hf_trainer
from transformers import trainer_optimizer

from ..config import HfCoatConfig, OptimizerName
from ..functional import write_into_buckets
from ..modules import CoatLinear
from ..optim import OPTIMIZERS, CoatOptimizer, muon_groups
from .callback import CoatCallback, FollowsArguments, convert_model, logger
from .checkpoints import to_resume_from
from .checks import check_release, check_run
from .model_card import keep_section

__all__ = ["CoatCallback", "TrainingArguments", "with_coat"]  # the callback needs what is registered below

COAT_ADAMW = "coat_adamw"


@dataclass
class CoatArgumentsMixin:
    """The field ``coat`` for dataclasses derived from :class:`transformers.TrainingArguments`; see :func:`with_coat`.

    Args:
        coat: The recipe, or what :meth:`hf_coat.HfCoatConfig.resolve` makes one of: one half of it, a dict, a preset's
            name, JSON, a path, a name on the Hub. None trains without COAT.
    """

    coat: dict | str | None = field(
        default=None,
        metadata={"help": "Train with COAT: a preset ('lean', 'paper'), JSON, a path, or a name on the Hub."},
    )

    def __post_init__(self):
        default_optim = next(f.default for f in fields(self) if f.name == "optim")
        if self.coat is not None:
            self.coat = HfCoatConfig.resolve(self.coat)
            launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
            fp16 = self.fp16 or self.fp16_full_eval
            check_run(mixed_precision="fp16" if fp16 else launched, deepspeed=bool(self.deepspeed))
        if self._brings_optimizer():
            self._warn_about_optim(default_optim)
            self.optim = default_optim  # transformers knows no other names than its own
        elif self.optim == COAT_ADAMW:
            raise ValueError(
                f"optim={COAT_ADAMW!r} is what coat= sets, and coat is {self.coat!r} here. To drop COAT's optimizer "
                f"in a copy of other arguments name another: optim={str(default_optim)!r}"
            )
        super().__post_init__()
        if self.coat is not None:
            fsdp = self.fsdp_plugin_args or {}
            check_run(fsdp_version=fsdp.get("fsdp_version"), cpu_offload=fsdp.get("cpu_offload", False))
            check_release(self.coat, self.gradient_accumulation_steps)
        if self._brings_optimizer():
            self.optim = COAT_ADAMW

    def set_optimizer(self, *args, **kwargs):
        """As in transformers, but for the optimizer's name: ``coat`` overrules it, as in the constructor."""
        super().set_optimizer(*args, **kwargs)
        if self._brings_optimizer():
            self._warn_about_optim("adamw_torch")
            self.optim = COAT_ADAMW
        return self

    def _brings_optimizer(self) -> bool:
        return self.coat is not None and self.coat.optimizer is not None

    def _warn_about_optim(self, default: str) -> None:
        if self.optim not in (default, COAT_ADAMW):
            logger.warning(
                f"optim={getattr(self.optim, 'value', self.optim)!r} is not used: coat= brings its own. To keep "
                "your optimizer leave that half out: coat=HfCoatConfig(optimizer=None)"
            )

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with ``coat`` as a plain dict."""
        settings = super().to_dict()
        if self.coat is not None:
            settings["coat"] = self.coat.to_dict()
        return settings

    def __reduce_ex__(self, protocol):
        # pickle finds classes by name, which those of with_coat lack: they are named by what they were made from.
        base = vars(type(self)).get("_made_from")
        return super().__reduce_ex__(protocol) if base is None else (_unpickle, (base,), vars(self))


@dataclass(repr=False)
class TrainingArguments(CoatArgumentsMixin, transformers.TrainingArguments):
    """:class:`transformers.TrainingArguments` with ``coat=``."""


@functools.cache
def with_coat(cls: type) -> type:
    """The arguments class of any trainer, with ``coat=``.

    Args:
        cls: A dataclass derived from :class:`transformers.TrainingArguments`, such as ``trl.DPOConfig``.

    Returns:
        A subclass of ``cls``; always the same one for the same ``cls``.

    Raises:
        TypeError: For anything else.
    """
    if not (isinstance(cls, type) and issubclass(cls, transformers.TrainingArguments)):
        raise TypeError(f"with_coat takes a subclass of transformers.TrainingArguments, got {cls!r}")
    if issubclass(cls, CoatArgumentsMixin):
        return cls
    if cls is transformers.TrainingArguments:
        return TrainingArguments
    namespace = {"__doc__": cls.__doc__, "__module__": __name__, "_made_from": cls}
    return dataclass(repr=False)(type(cls.__name__, (CoatArgumentsMixin, cls), namespace))


def _unpickle(base: type) -> CoatArgumentsMixin:
    cls = with_coat(base)
    return cls.__new__(cls)


def _make_coat_adamw(context: trainer_optimizer.OptimizerContext) -> tuple[type[CoatOptimizer], dict[str, Any]]:
    """What ``optim="coat_adamw"`` is. It converts as well: no event tells of a model that ``model_init`` made."""
    coat = HfCoatConfig.resolve(context.args.coat)
    if context.optim_args:
        raise ValueError(
            f"optim_args={context.args.optim_args!r} is not read by COAT's optimizer, whose settings are in coat=: "
            "coat={'optimizer': {'group_size': 128}}"
        )
    if context.model is not None:
        convert_model(context.model, coat)
    name, settings = coat.optimizer.name, context.optimizer_kwargs | context.adam_kwargs | coat.optimizer.settings
    if name is OptimizerName.LION:  # as transformers' own, with the betas of the arguments
        del settings["eps"]
    if name is OptimizerName.MUON and context.model is not None:
        settings |= {"params": muon_groups(context.model), "weight_decay": context.args.weight_decay}
    return OPTIMIZERS[name], settings


class GradientsInBuckets(DistributedDataParallelKwargs):
    """What accelerate makes DDP with, and what it asks for a communication hook right afterwards."""

    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        super().register_comm_hook(model)
        trained = any(isinstance(m, CoatLinear) and m.weight.requires_grad for m in model.modules())
        if trained and self.comm_hook is DDPCommunicationHookType.NO:  # one that was chosen stays
            write_into_buckets(model)


def _prepare_training(trainer_class: type) -> None:
    """Let ``train`` of runs with COAT resume only from checkpoints that were written to their end.

    Under DDP gradients are views of its buckets, and those of converted linears are made there. Otherwise they would
    be beside them, as large again, and copied into them and back in each step. Trainer has no argument for it.
    """
    own = trainer_class.train
    if getattr(own, "prepared_by_coat", False):
        return

    @functools.wraps(own)
    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if any(isinstance(callback, CoatCallback) and callback.coat for callback in self.callback_handler.callbacks):
            resume_from_checkpoint = to_resume_from(self.args, resume_from_checkpoint, self.is_world_process_zero())
            handler = self.accelerator.ddp_handler
            if handler is not None:
                handler.gradient_as_bucket_view = True
                if type(handler) is DistributedDataParallelKwargs:
                    self.accelerator.ddp_handler = GradientsInBuckets(**vars(handler))
        return own(self, resume_from_checkpoint, *args, **kwargs)

    train.prepared_by_coat = True
    trainer_class.train = train


trainer_optimizer._OPTIMIZER_HANDLERS[COAT_ADAMW] = _make_coat_adamw
if not any(callback.__name__ == FollowsArguments.__name__ for callback in hf_trainer.DEFAULT_CALLBACKS):
    hf_trainer.DEFAULT_CALLBACKS.append(FollowsArguments)
keep_section(hf_trainer.Trainer)
_prepare_training(hf_trainer.Trainer)

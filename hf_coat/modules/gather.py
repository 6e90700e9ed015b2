"""FSDP2 gathers the codes of converted linears' weights, not their values: a byte for each, and four for each row.

    FSDP2       shard -> gathered values -> quantized by every process, in the forward and in the backward
    here        shard -> quantized by its owner -> gathered codes, which the products read as they are

FSDP2 cuts a weight between rows, and a row has a scale of its own, so a process quantizes its rows alone: the codes of
the whole weight, to the bit. From FP32 parameters they are made at once, not by way of BF16.

Parameters, gradients, their reduction, optimizers and checkpoints have nothing to do with this: the sharded parameter
stays the plain DTensor that it is, and the gathered one is a :class:`~hf_coat.functional.GatheredWeight`, whose
gradient is BF16 or FP32 as ever. FSDP2 asks a sharded tensor for ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather``;
here the object that manages the parameter answers in its place, so that nothing is lost when a state dict is loaded.
"""

import functools
import inspect
import logging
from collections import Counter

import torch
from coat_kernels import quantize_each
from torch import nn

from ..functional import GatheredWeight
from .linear import CoatLinear

logger = logging.getLogger(__name__)
WHOLE = "every process has the whole weight"


class Shard:
    """What FSDP2 asks how to gather a weight, in the place of the sharded tensor.

    Args:
        param: The object with which FSDP2 manages the weight.

    Attributes:
        together: Those of all weights that are gathered with this one, in the order in which FSDP2 asks them. The
            first one quantizes for all: one launch instead of many.
        made: Codes and scales for the all-gather that has begun.
    """

    def __init__(self, param):
        self.param = param
        self.together: list[Shard] = [self]
        self.made: tuple[torch.Tensor, torch.Tensor] | None = None

    def size(self) -> torch.Size:
        return self.param.padded_sharded_param_size  # all pieces are gathered at this size

    def to(self, *args, **kwargs) -> "Shard":
        return self  # an offloaded weight is moved below, as it is then

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """Codes as uint8 [rows, K] and scales, float32 [rows, 1], of this process's rows; those that pad are zero."""
        first = self is self.together[0]
        if first or self.made is None:
            _quantize(self.together if first else [self])
        made, self.made = self.made, None
        return made, None

    def fsdp_post_all_gather(self, all_gather_outputs, metadata, param_dtype, *, out=None):
        """The weight, without the rows that pad; nothing to do where it is there, and its memory filled again."""
        if out is None:
            bits, scale = (t[: self.param._orig_size[0]] for t in all_gather_outputs)
            return GatheredWeight(bits, scale, param_dtype), ()
        return None


def _quantize(shards: list[Shard]) -> None:
    """Let each have its codes and scales: one launch for those of a dtype."""
    kinds: dict[torch.dtype, list[Shard]] = {}
    for shard in shards:
        kinds.setdefault(shard.param._sharded_param_data.dtype, []).append(shard)
    for alike in kinds.values():
        params = [shard.param for shard in alike]
        pieces = [
            p._sharded_param_data.to(p.device, non_blocking=True).view(p.padded_sharded_param_size) for p in params
        ]
        for shard, (codes, scale) in zip(alike, quantize_each(pieces), strict=True):
            shard.made = codes.view(torch.uint8), scale


# FSDP2 looks at it each time; this saves it most of the work.
Shard.fsdp_pre_all_gather.__signature__ = inspect.signature(Shard.fsdp_pre_all_gather)


@functools.cache
def _answering(cls: type) -> type:
    """The class of FSDP2's that manages a parameter, with :class:`Shard` as what it asks; always the same one."""
    return type(f"Coat{cls.__name__}", (cls,), {"_sharded_local_tensor": property(lambda self: self.coat_shard)})


def _begin_anew(param) -> None:
    """Let FSDP2 make the gathered parameter again at the next all-gather."""
    vars(param).pop("_unsharded_param", None)
    param.all_gather_outputs = []
    param._init_extensions()


def _has_gradients(param) -> bool:
    """Whether gradients wait in the gathered parameter until they are reduced."""
    there = getattr(param, "_unsharded_param", None)
    return param.unsharded_accumulated_grad is not None or (there is not None and there.grad is not None)


def groups_of(state) -> list:
    """FSDP2's groups of parameters that are gathered together, of one unit."""
    several = getattr(state, "_fsdp_param_groups", None)  # torch 2.13; before, there is one
    found = [state._fsdp_param_group] if several is None else several
    return [group for group in found if group is not None]


def group_of(module: nn.Module):
    """FSDP2's group that gathers the weight of a module, whatever module's unit it belongs to; None without FSDP2.

    A weight that is gathered does not tell, nor does its module know what is around it: all units are asked.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    units = [reference() for reference in _module_state_mapping.values()]
    for group in (group for unit in units if isinstance(unit, FSDPState) for group in groups_of(unit)):
        infos = [p._module_info for p in group.fsdp_params]
        if any(module is owner for info in infos for owner in (info.module, *info.shared_modules)):
            return group
    return None


def _groups(model: nn.Module) -> list:
    """Those of all units in a model."""
    units = [module._get_fsdp_state() for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    return list({id(group): group for unit in units for group in groups_of(unit)}.values())


def _why_not(group, param) -> str | None:
    """Why FSDP2 gathers the values of a weight."""
    mesh = param.mesh_info
    if getattr(mesh, "shard_mesh_size", 1) == 1:
        return WHOLE
    if param.is_dtensor:
        return "split by tensor parallelism too"
    if param.fsdp_placement.dim != 0:
        return "cut along its columns, not between rows"
    if group._use_post_forward_mesh:
        return "kept by fewer processes after the forward (reshard_after_forward is a number)"
    return None


class CodeGather:
    """The forward pre-hook of a converted model that finds out how FSDP2 shards it and lets it gather codes.

    It is there before FSDP2 is. In the first forward it takes over what is not gathered yet, in later ones the rest,
    and comes before FSDP2's own hook from then on.

    Args:
        model: The model.

    Attributes:
        linears: The converted linears.
        kept: Name of a converted linear whose values are gathered -> why.
        gathered: Names of those whose codes are.
    """

    def __init__(self, model: nn.Module):
        self.linears = [module for module in model.modules() if type(module) is CoatLinear]
        self._forget()

    def _forget(self) -> None:
        self.waiting: list | None = None  # groups, and their weights that do not answer yet; None: not looked for
        self.taken: list = []
        self.kept: dict[str, str] = {}
        self.gathered: list[str] = []

    def __getstate__(self):
        return {"linears": self.linears}

    def __setstate__(self, state):
        self.linears = state["linears"]
        self._forget()

    def __call__(self, model: nn.Module, args) -> None:
        if torch.compiler.is_compiling():
            return
        if any(type(module) is not CoatLinear for module in self.linears):  # a part of the model was taken back
            self.release()
            self.linears = [module for module in self.linears if type(module) is CoatLinear]
            if not self.linears:
                return
        if self.waiting is None:
            if not (hasattr(model, "_get_fsdp_state") or hasattr(self.linears[0].weight, "device_mesh")):
                return
            self.waiting = self._find(model)
            hooks = model._forward_pre_hooks
            hooks.move_to_end(next(key for key, hook in hooks.items() if hook is self), last=False)
        early = self._reshard_early()
        if self.waiting:
            self._take()
        for group in early:
            group.unshard()
            group.wait_for_unshard()

    def _reshard_early(self) -> list:
        """Undo the gathering of values that came before this hook, in the very first forward, and return its groups: a
        run that is resumed begins with codes, as it would have gone on."""
        early = [
            group
            for group, shards in self.waiting
            if not group.is_sharded and not any(_has_gradients(shard.param) for shard in shards)
        ]
        for group in early:
            group._to_sharded()  # reshard() does nothing in the forward of the root
        return early

    def _find(self, model: nn.Module) -> list:
        """Groups, and what answers for those of their weights that can be gathered as codes."""
        names = {module: name for name, module in model.named_modules()}
        compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in names)
        found = []
        for group in _groups(model):
            shards = []
            for param in group.fsdp_params:
                module = param._module_info.module
                if (
                    module in self.linears
                    and param._module_info.param_name == "weight"
                    and not hasattr(param, "coat_shard")  # then another hook answers for it
                ):
                    why = "torch.compile does not see through it" if compiled else _why_not(group, param)
                    if why is None:
                        shards.append(Shard(param))
                        self.gathered.append(names[module])
                    else:
                        self.kept[names[module]] = why
            for shard in shards:
                shard.together = shards
            if shards:
                found.append((group, shards))
        reasons = Counter(why for why in self.kept.values() if why != WHOLE)
        if reasons and torch.distributed.get_rank() == 0:
            said = ", ".join(f"{n} x {why}" for why, n in reasons.most_common())
            logger.warning(f"COAT: FSDP2 gathers the values of {reasons.total()} converted weights, not codes: {said}")
        return found

    def _take(self) -> None:
        """Answer for the weights of the groups that are not gathered now."""
        still = []
        for group, shards in self.waiting:
            if (
                not group.is_sharded
                or group._all_gather_result is not None
                or any(_has_gradients(shard.param) for shard in shards)
            ):
                still.append((group, shards))
                continue
            for shard in shards:
                shard.param.coat_shard = shard
                shard.param.__class__ = _answering(type(shard.param))
                _begin_anew(shard.param)
            self.taken.append((group, shards))
        self.waiting = still

    def release(self) -> None:
        """Let FSDP2 gather values again.

        Raises:
            RuntimeError: Where gradients wait to be reduced.
        """
        for _, shards in self.taken:
            for shard in shards:
                if _has_gradients(shard.param):
                    raise RuntimeError(
                        f"gradients of {shard.param._param_fqn} wait to be reduced over the processes, so its linear "
                        "cannot be converted now: end the optimizer step first"
                    )
        for group, shards in self.taken:
            group.reshard()
            for shard in shards:
                shard.param.__class__ = type(shard.param).__mro__[1]
                del shard.param.coat_shard
                _begin_anew(shard.param)
        self._forget()


def gather_values(model: nn.Module) -> None:
    """Undo :func:`gather_codes` in ``model`` and whatever is in it.

    Raises:
        RuntimeError: Where gradients wait to be reduced.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, CodeGather):
                hook.release()
                del module._forward_pre_hooks[key]


def gather_codes(model: nn.Module) -> list[CoatLinear]:
    """Let FSDP2, if it comes to shard this converted model, gather the codes of its linears' weights.

    The model itself or layers in it must be FSDP2's units; of a larger module around it as the only unit the values
    are gathered, before this can be seen.

    Returns:
        The linears. Weights that are stored as FP8 are not among them: codes are all that there is.
    """
    gather = CodeGather(model)
    if gather.linears:
        model.register_forward_pre_hook(gather)
    return list(gather.linears)


def gathered_as_codes(model: nn.Module) -> list[nn.Parameter]:
    """The weights in ``model`` whose codes FSDP2 gathers, if it shards it: a byte a value, and four bytes a row."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [linear.weight for hook in hooks if isinstance(hook, CodeGather) for linear in hook.linears]

"""The high-water mark of a training step, found by running the step on tensors that have no memory.

:func:`estimate_step` runs what a Trainer does in a step (forward, backward, clipping, the optimizer) on a copy of the
model's structure whose tensors are fake, and watches each storage come and go. So every term of

    peak = weights + gradients + optimizer states + activations + working set

is what the modules, autograd and the optimizer really hold at that moment: gradients appear while activations go, the
working set is the logits and their gradient, or a layer's operands in the backward, or what an optimizer makes in its
step. What kernels take inside an operation (a workspace, the sums of an attention's backward) is not seen;
:data:`WORKSPACE` stands for that of the matrix products.

Sharded over N GPUs (FSDP2, each decoder layer a unit, batches of its own) a GPU holds 1/N of weights, gradients and
states, and beside them whole: the weights of the unit that runs, of the next one, which is fetched meanwhile, and the
gradients of one unit, which are not divided before the unit's backward is done. The largest unit counts. FSDP2's mixed
precision gathers FP32 weights as BF16: then no copies of them are among the activations, as autocast makes them.
Of converted linears it gathers FP8 codes (:mod:`hf_coat.modules.gather`). Gradients that are accumulated are reduced
in the last backward: until a unit's turn comes there, a GPU holds its gradients whole.
"""

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .memory import MemoryBreakdown, distinct_bytes, fake_twin, tensors_of
from .modules import gathered_as_codes
from .optim import GradientRelease

ALIGNMENT = 512  # the CUDA allocator rounds every request up to a multiple of this
WORKSPACE = 2 * 32 * 2**20  # of cuBLAS on Hopper: 32 MiB for the forward's thread and as much for the backward's
# What a card has to hold beside the allocator's peak: the CUDA context with its kernels, and what the allocator
# cannot use because it is in pieces. Planning margins, on the safe side; no measurement.
CONTEXT = 2**30
FRAGMENTATION = 0.03
# What CUDA reports of a card's memory, in GiB, by its label in GB.
CARDS = {24: 23.6, 40: 39.4, 48: 44.4, 80: 79.1, 141: 139.8}
SHARDED = ("weights", "gradients", "optimizer_states")


@dataclass(frozen=True)
class StepEstimate:
    """Bytes of a training step on each GPU, predicted.

    Args:
        weights, optimizer_states: What the whole step holds.
        gradients: The most that are there at once.
        activations: What autograd holds between forward and backward.
        logits: The most that tensors of the logits' size take at once; they are among the activations too.
        peak: What ``torch.cuda.max_memory_allocated`` is expected to say.
        phase: Where the peak is: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        at_peak: The peak by class; ``working set`` is what belongs to none.
    """

    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    logits: int
    peak: int
    phase: str
    at_peak: dict[str, int]

    def breakdown(self) -> MemoryBreakdown:
        return MemoryBreakdown(self.weights, self.gradients, self.optimizer_states, self.activations, self.peak)

    def needed(self) -> int:
        """Bytes that a card must have."""
        return int(self.peak * (1 + FRAGMENTATION)) + CONTEXT

    def fits(self, card: int) -> bool:
        """Whether a card of :data:`CARDS` holds it."""
        return self.needed() <= CARDS[card] * 2**30


class _Watch(TorchDispatchMode):
    """Counts the bytes of live storages by class, at each moment at which there is one more."""

    def __init__(self, logits_width: int | None):
        super().__init__()
        self.logits_width = logits_width
        self.known: dict[int, tuple[weakref.ref, int, str]] = {}
        self.now, self.phase = Counter(), ""
        self.moments: list[tuple[Counter, str]] = []
        self.logits = self.most_logits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.see(value)
        return result

    def see(self, tensor: torch.Tensor, kind: str | None = None, times: int = 1) -> None:
        """Count the storage under ``tensor``, or, where ``kind`` is given, count it as that from now on, ``times``."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self.known.get(key)
        if found is not None and found[0]() is storage:
            if kind is not None and kind != found[2]:
                self._forget(key)
                self._count(key, storage, kind, tensor, times)
            return
        self._count(key, storage, kind or "working set", tensor, times)
        self.moments.append((self.now.copy(), self.phase))

    def _count(self, key: int, storage: torch.UntypedStorage, kind: str, tensor: torch.Tensor, times: int) -> None:
        size = times * -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        self.known[key] = weakref.ref(storage, lambda _: self._forget(key)), size, kind
        self.now[kind] += size
        if self.logits_width is not None and kind == "working set" and tensor.dim() > 1:
            if tensor.shape[-1] == self.logits_width and tensor.is_floating_point():
                self.logits += size
                self.most_logits = max(self.most_logits, self.logits)
                weakref.finalize(storage, self._logits_gone, size)

    def _logits_gone(self, size: int) -> None:
        self.logits -= size

    def _forget(self, key: int) -> None:
        _, size, kind = self.known.pop(key)
        self.now[kind] -= size

    def peak(self, gpus: int) -> tuple[dict[str, int], str]:
        """What each of so many GPUs held when that was most, and the phase of the step."""
        held, phase = max(self.moments, key=lambda moment: sum(_share(moment[0], gpus).values()))
        return _share({kind: size for kind, size in held.items() if size}, gpus), phase


def _share(held: Mapping[str, int], gpus: int) -> dict[str, int]:
    """What one of ``gpus`` holds of it."""
    return {kind: -(-size // gpus) if kind in SHARDED else size for kind, size in held.items()}


class _AutocastOfCuda(TorchFunctionMode):
    """The fake tensors are on the CPU, whose autocast leaves to a layer norm the dtype that CUDA's turns into FP32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.layer_norm, F.group_norm) and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def estimate_step(
    model: nn.Module,
    batch: Mapping[str, object] | tuple[int, int],
    make_optimizer: Callable[[nn.Module], Optimizer],
    *,
    gpus: Iterable[int] = (1,),
    units: tuple[str, ...] = (),
    gather: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    accumulate: bool = False,
    max_grad_norm: float = 1.0,
    gradient_release: bool = False,
) -> dict[int, StepEstimate]:
    """Predict the memory of a training step as the stock Trainer makes it, for each of several numbers of GPUs.

    Args:
        model: Converted or not, with adapters or not, on any device, the meta device included.
        batch: As in :func:`hf_coat.memory.predict`.
        make_optimizer: Makes the optimizer of the model it is given.
        gpus: Over how many GPUs FSDP2 shards it, or would; ``batch`` is that of one of them.
        units: Class names of the modules that FSDP2 shards one by one.
        gather: As what FSDP2's mixed precision gathers FP32 weights; None where it gathers them as they are. The
            gradients are FP32 once they are sharded.
        autocast: Dtype of the autocast that the training runs in, if any.
        accumulate: Whether gradients of earlier microbatches are there already.
        max_grad_norm: As in ``TrainingArguments``; 0 clips nothing.
        gradient_release: Whether :class:`hf_coat.GradientRelease` steps each parameter inside the backward.

    Raises:
        RuntimeError: As :func:`hf_coat.memory.predict`.
        ValueError: For a model that gives no loss for this batch.
    """
    with fake_twin(model, batch) as (model, batch), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # it tells them apart
        model.train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(model)
        _take_a_step(trainable, optimizer)  # states are made in the first one
        width = getattr(getattr(model.config, "get_text_config", lambda: model.config)(), "vocab_size", None)
        watch = _Watch(width)
        for kind, tensors in (("weights", tensors_of(model)), ("optimizer_states", _states(optimizer))):
            for tensor in tensors:
                watch.see(tensor, kind)
        batch_tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        most_gradients = 0
        sharded = {p: p.data for p in model.parameters() if gather is not None and p.dtype == torch.float32}
        for p in sharded:  # what is gathered is counted by units, below
            p.data = p.data.to(gather)
            watch.see(p.data, "gathered", times=0)

        def count(p: torch.Tensor) -> None:
            nonlocal most_gradients
            watch.see(p.grad, "gradients", times=4 // p.element_size() if p in sharded else 1)
            most_gradients = max(most_gradients, watch.now["gradients"])

        hooks = [p.register_post_accumulate_grad_hook(count) for p in trainable]
        if gradient_release:  # its hooks come after those
            GradientRelease(optimizer, max_norm=max_grad_norm or math.inf)
        if accumulate:
            for p in trainable:
                p.grad = torch.zeros_like(p)
                watch.see(p.grad, "whole gradients")  # until they are complete
        context = nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
        with watch:
            watch.phase = "forward"
            with context, _AutocastOfCuda():
                loss = _loss(model, batch)
            activations = watch.now["working set"]
            watch.phase = "backward"
            loss.backward()
            del loss
            for p, shard in sharded.items():
                gradient, p.grad = p.grad, None
                p.data = shard
                if gradient is not None:
                    del gradient
                    p.grad = torch.zeros_like(p)
                    watch.see(p.grad, "gradients")
            watch.phase = "optimizer"
            if max_grad_norm and not gradient_release:
                nn.utils.clip_grad_norm_(trainable, max_grad_norm)
            optimizer.step()
        for hook in hooks:
            hook.remove()
        held = {"weights": watch.now["weights"], "optimizer_states": watch.now["optimizer_states"]}
        held["gradients"] = most_gradients
        beside = {"workspace": WORKSPACE, "batch": distinct_bytes(batch_tensors)}
        found = {}
        for n in gpus:
            at_peak, phase = watch.peak(n)
            at_peak = {"working set": 0} | at_peak | beside
            if n == 1 and accumulate:
                at_peak["gradients"] = at_peak.get("gradients", 0) + at_peak.pop("whole gradients", 0)
            if n > 1:
                at_peak["whole units"] = _whole_units(model, units, gather)
            found[n] = StepEstimate(
                **_share(held, n),
                activations=activations,
                logits=watch.most_logits,
                peak=sum(at_peak.values()),
                phase=phase,
                at_peak=at_peak,
            )
    return found


def _loss(model: nn.Module, batch: Mapping[str, object]) -> torch.Tensor:
    loss = getattr(model(**batch), "loss", None)  # the output goes here, as in Trainer, and its logits with it
    if loss is None:
        raise ValueError(f"{type(model).__name__} gave no loss for a batch of {sorted(batch)}: put labels into it")
    return loss


def _take_a_step(trainable: list[nn.Parameter], optimizer: Optimizer) -> None:
    for p in trainable:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()


def _states(optimizer: Optimizer) -> list[torch.Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]


def _whole_units(model: nn.Module, units: tuple[str, ...], gather: torch.dtype | None) -> int:
    """What a GPU holds unsharded: two units' weights and one unit's gradients; the root is a unit of its own."""

    codes = set(gathered_as_codes(model))

    def values(params: list[nn.Parameter]) -> int:
        return sum(p.numel() * (gather if gather and p.dtype == torch.float32 else p.dtype).itemsize for p in params)

    def gathered(params: list[nn.Parameter]) -> int:
        scales = torch.float32.itemsize
        coded = [p for p in params if p in codes]
        return values([p for p in params if p not in codes]) + sum(p.numel() + scales * p.shape[0] for p in coded)

    wrapped = [module for module in model.modules() if type(module).__name__ in units]
    inside = {id(p) for module in wrapped for p in module.parameters()}
    groups = [list(module.parameters()) for module in wrapped]
    groups.append([p for p in model.parameters() if id(p) not in inside])
    weights = sorted(map(gathered, groups), reverse=True)
    return sum(weights[:2]) + max(values([p for p in group if p.requires_grad]) for group in groups)

"""Where the bytes of a training step are: weights, gradients, optimizer states, activations saved for the backward.

:func:`predict` runs the model's own forward on fake tensors, which have shapes and dtypes but no memory: it needs
neither room for the step nor a copy of the weights. :func:`measure` counts the same classes on the live model and
optimizer. Both watch the forward through ``torch.autograd.graph.saved_tensors_hooks`` and count, once each, the
storages that autograd still holds when the loss is there. So what a gradient checkpoint drops is not counted, and what
two layers share counts once.
"""

import copy
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from coat_kernels.states import Weights, group_shape
from torch import nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from .config import CoatOptimizerConfig, OptimizerName
from .convert import remove_coat
from .optim import muon_groups
from .optim.release import BATCH_BYTES
from .optim.sharding import rows_shape

STEP_BYTES = 4
CODES = (torch.uint8, torch.int8)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
MUON_GROUP_BYTES = 1  # the scale of a group of CoatMuon's momentum


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes of one training step, by class.

    Args:
        weights: Parameters and buffers, tied ones once.
        gradients: Gradients of the trainable parameters; the largest of them where each is released by itself.
        optimizer_states: Tensors in the optimizer's state.
        activations: What autograd holds between forward and backward, without parameters, buffers and batch.
        peak: The CUDA allocator's high-water mark since the process began or its last reset; None elsewhere.
    """

    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    peak: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_states + self.activations

    def to_dict(self) -> dict[str, int | None]:
        return asdict(self)


def predict(
    model: nn.Module,
    batch: Mapping[str, object] | tuple[int, int],
    *,
    coat: bool = True,
    optimizer: CoatOptimizerConfig | None = CoatOptimizerConfig(),  # noqa: B008  # it is frozen
) -> MemoryBreakdown:
    """Bytes that one training step of ``model`` takes, found without running it.

    Call it in the autocast context of the training, if that has one. What runs on fake tensors is a copy of the
    model's structure: with ``coat=False`` its linears are turned back first, which gives the model's twin without
    COAT. Integer tensors (token ids, masks, positions) stay real, because models look into them to choose how to mask
    the attention; and so do the batch's floats for those that look which images are padding.

    Args:
        model: Any model whose output has a ``loss``, converted or not, on any device, the meta device included.
        batch: The arguments of one forward by name; or ``(batch size, length)`` for a language model, which stands for
            ``input_ids`` and ``labels`` of that shape and no padding.
        coat: False predicts the model as :func:`hf_coat.remove_coat` leaves it.
        optimizer: COAT's optimizer; None for ``torch.optim.AdamW``.

    Raises:
        RuntimeError: Where the forward's course depends on computed values (the routing of some mixtures of experts)
            or PyTorch knows no fake twin of an operation; its message names the operation. Then only :func:`measure`
            can tell.
    """
    with fake_twin(model, batch) as (model, batch):
        if not coat:
            remove_coat(model)
        activations, _ = _saved_by_forward(model.train(), batch)
    trainable = [p for p in model.parameters() if p.requires_grad]
    muon = optimizer is not None and optimizer.name is OptimizerName.MUON
    matrices = {p for group in muon_groups(model) if group["use_muon"] for _, p in group["params"]} if muon else ()
    gradients = distinct_bytes(trainable)
    if optimizer is not None and optimizer.gradient_release:  # those that wait, and the last of a batch
        gradients = min(gradients, BATCH_BYTES + max((p.nbytes for p in trainable), default=0))
    return MemoryBreakdown(
        weights=distinct_bytes(tensors_of(model)),
        gradients=gradients,
        optimizer_states=sum(_state_bytes(p, optimizer, p in matrices) for p in trainable),
        activations=activations,
    )


@contextmanager
def fake_twin(
    model: nn.Module, batch: Mapping[str, object] | tuple[int, int]
) -> Iterator[tuple[nn.Module, dict[str, object]]]:
    """A copy of a model's structure and of a batch whose floats are fake tensors, in the mode in which it can run.

    A batch ``(batch size, length)`` becomes ``input_ids`` and ``labels`` of that shape. What is on the meta device is
    taken to be on the CPU.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if isinstance(batch, tuple):
        batch = {name: torch.zeros(batch, dtype=torch.long, device=device) for name in ("input_ids", "labels")}

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(t: object) -> object:
        if not isinstance(t, torch.Tensor):
            return t
        if not (isinstance(t, nn.Parameter) or t.is_floating_point() or t.is_meta):
            return t.clone()
        with mode:
            like = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device if t.is_meta else t.device)
        return nn.Parameter(like, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else like

    model = copy.deepcopy(model, {id(t): fake(t) for t in tensors_of(model)})
    vars(model).pop("forward", None)  # accelerate's, which calls the live model; its autocast is the caller's
    fakes = {name: fake(value) for name, value in batch.items()}
    real = _RealIntegers()
    for name, value in fakes.items():
        if isinstance(value, FakeTensor) and not batch[name].is_meta:
            real.values[value] = functools.partial(batch.get, name)
    with mode, real:
        yield model, fakes


def measure(model: nn.Module, batch: Mapping[str, object], optimizer: Optimizer) -> MemoryBreakdown:
    """Bytes that a training step of the live ``model`` takes, measured by one forward and backward.

    Call it after the first optimizer step, for there are no states before it, and in the autocast context of the
    training, if that has one. Weights, gradients, training flags and random state are left as they were; ``peak`` is
    read first.

    Args:
        model: The model in training, whose output has a ``loss``.
        batch: The arguments of one forward by name, on the model's device.
        optimizer: The optimizer whose state is counted.
    """
    on_cuda = {p.device for p in model.parameters() if p.is_cuda}
    peak = sum(map(torch.cuda.max_memory_allocated, on_cuda)) if on_cuda else None
    gradients = {p: p.grad for p in model.parameters()}
    try:
        for p in gradients:
            p.grad = None
        with _training(model), torch.random.fork_rng(devices=[device.index for device in on_cuda]):
            activations, loss = _saved_by_forward(model, batch)
            loss.backward()
        gradient_bytes = distinct_bytes(p.grad for p in gradients if p.grad is not None)
    finally:
        for p, gradient in gradients.items():
            p.grad = gradient
    states = (value for state in optimizer.state.values() for value in state.values())
    state_bytes = distinct_bytes(value for value in states if isinstance(value, torch.Tensor))
    return MemoryBreakdown(distinct_bytes(tensors_of(model)), gradient_bytes, state_bytes, activations, peak)


class _RealIntegers(TorchDispatchMode):
    """Inside FakeTensorMode: an operation on no fake tensor whose results are no floats is done for real.

    Bytes are none of the integers that models look into: they are codes, as many as there are parameters. So is an
    operation on floats of the batch, as they are or viewed or cast, whose result is boolean: models that ask which of
    the images are nothing but padding leave those out.

    Attributes:
        values: Fake tensor that holds floats of the batch -> what makes the real one.
    """

    def __init__(self):
        super().__init__()
        self.values: MutableMapping[torch.Tensor, Callable[[], torch.Tensor]] = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fakes = [value for value in tree_leaves((args, kwargs)) if isinstance(value, FakeTensor)]
        if fakes:
            result = func(*_with_positions(func, args), **kwargs)
            known = [value in self.values for value in fakes]
            if any(known) and func._schema.is_mutable:  # what shares the memory is not followed
                self.values.clear()
            elif all(known) and isinstance(result, FakeTensor):
                # makers in the place of tensors: these are not to live longer for it
                inputs = tree_map_only(FakeTensor, self.values.get, (args, kwargs))
                if result.dtype == torch.bool:
                    with unset_fake_temporarily():
                        return _make(func, inputs)
                if func.is_view or func in COPIES:
                    self.values[result] = functools.partial(_make, func, inputs)
            return result
        if func is not torch.ops.aten._local_scalar_dense.default:  # tensor.item(), which a fake tensor has not
            try:
                result = func(*args, **kwargs)
            except DynamicOutputShapeException:  # the values say how long the result is: they are there
                result = None
            made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
            if any(value.is_floating_point() or value.dtype in CODES for value in made):
                return result
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _make(func, inputs: tuple) -> torch.Tensor:
    """What ``func`` gives for these arguments, of which some are what makes a tensor."""
    args, kwargs = tree_map_only(functools.partial, lambda make: make(), inputs)
    return func(*args, **kwargs)


def _with_positions(func, args: tuple) -> tuple:
    """The arguments of ``fake[mask]``, where the mask is real, with the positions that it marks."""
    if func is not torch.ops.aten.index.Tensor:
        return args
    positions = []
    for index in args[1]:
        if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
            positions.append(index)
        else:
            with unset_fake_temporarily():
                positions.extend(index.nonzero(as_tuple=True))
    return args[0], positions


class _Saved:
    """A tensor as the autograd graph holds it; when the graph lets go of it, it is gone."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def _saved_by_forward(model: nn.Module, batch: Mapping[str, object]) -> tuple[int, torch.Tensor]:
    """Bytes that autograd holds once the loss is there, and the loss."""
    saved = weakref.WeakSet()

    def pack(tensor):
        holder = _Saved(tensor)
        saved.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} gave no loss for a batch of {sorted(batch)}; memory is counted up to the loss: "
            "put labels into the batch"
        )
    given = [*tensors_of(model), *(value for value in batch.values() if isinstance(value, torch.Tensor))]
    return distinct_bytes([holder.tensor for holder in saved], without=given), loss


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers and tensors in plain attributes of the model's modules."""
    return [
        t
        for module in model.modules()
        for held in (module._parameters, module._buffers, vars(module))
        for t in held.values()
        if isinstance(t, torch.Tensor)
    ]


def distinct_bytes(tensors: Iterable[torch.Tensor], without: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the distinct storages under ``tensors`` that are not under ``without``."""
    known = {t.untyped_storage()._cdata for t in without}
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for storage, size in sizes.items() if storage not in known)


def _state_bytes(p: torch.Tensor, optimizer: CoatOptimizerConfig | None, by_muon: bool) -> int:
    """Bytes of one parameter's optimizer state: its moments, the step in a float32 scalar, a master's residual."""
    if optimizer is None:
        return 2 * p.nbytes + STEP_BYTES
    groups = math.prod(group_shape(rows_shape(p.shape), optimizer.group_size))
    moments = 1 if by_muon or optimizer.name is OptimizerName.LION else 2
    residual = p.numel() if optimizer.weights is Weights.MASTER and p.dtype == torch.bfloat16 else 0
    side_data = MUON_GROUP_BYTES if by_muon else optimizer.format.group_bytes
    return moments * (p.numel() + groups * side_data) + STEP_BYTES + residual


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model in training mode, for as long as the context lasts."""
    flags = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag

"""A language model's head and its loss in one: a training step that keeps no logits.

The logits [T, V] and their gradient are often the largest tensors of a step. :func:`fuse_loss` changes no forward of a
model. Its head returns a :class:`DeferredLogits` in training: a tensor with the logits' shape, dtype and place in the
graph whose values are computed when somebody asks for them. transformers' loss function is replaced by one that does
not ask: it gives hidden states, weight and labels to a library that computes loss and gradients piece by piece. The
positions without a label are dropped before, so nothing is multiplied for them. Whatever else is done with the logits,
a scale, a cap or a mask before the loss, another loss, a metric, gives what it always gave.

Under FSDP2 the head may belong to a unit of its own, whose weight is gathered when the head is called. Where it stays
gathered after the forward (accelerate has it so for final norm and head, with which the backward begins) the loss
finds it, and announces the backward to the unit as the logits would have. Where not, the logits are computed.

The libraries, in this order:

- on CUDA Liger's kernel (``pip install liger-kernel``). It returns the loss in FP32 and sums the weight's gradient
  over the pieces in FP32, inside the GEMM;
- ``torch.nn.functional.linear_cross_entropy`` (torch 2.13 or newer). For BF16 it returns loss and gradients in BF16
  and sums them over the pieces in BF16. So on CUDA it is called once per piece, and the sums are made in FP32 here;
  what stays is that the loss of a piece is rounded to BF16. On the CPU, where it multiplies in FP32 anyway, it is
  given FP32.
"""

import copy
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from .gather import group_of

aten = torch.ops.aten

DTYPES = (torch.bfloat16, torch.float32)
IGNORED = -100  # the label of a position without one, as transformers has it
FEWEST_ROWS = 1024  # tokens of a piece, if there are as many: fewer, and the GPU waits for the host or the weight
SIZE = "chunk_mem_const"  # how many times N * H the logits of a piece may take: Liger 0.8.5 has it, 0.8.0 has not
REMEDY = "pip install liger-kernel, or torch 2.13 or newer"
# What models call the factor or the bound that they apply to the logits. It only decides whether the head is fused:
# if the logits are changed before the loss, they are computed, fused or not.
SCALES = re.compile(r"soft_?cap|logits?_(scal|cap|multiplier)|(lm_head|output)_multiplier|unpadded_vocab")
# Arguments that transformers' loss ignores today; one that would not could not be fused.
LOSS_ARGUMENTS = {"label_smoothing", "reduction", "weight"}

Gradients = list[torch.Tensor | None]  # of hidden states [N, H], weight [V, H], bias [V]


class _Product:
    """``hidden @ weight.T + bias`` that has not been asked for; what a tensor of logits shares with its aliases.

    Args:
        hidden, weight, bias: ``[..., H]``, ``[V, H]``, ``[V]`` or None; BF16 or FP32.
        unit: FSDP2's state of the unit that the head belongs to, if it is one's module.
        group: FSDP2's group that gathers the weight, of that unit or of a larger one.

    Attributes:
        dtypes: What the product is cast to, one after the other.
        value: The product, once it was asked for.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, unit=None, group=None):
        self.operands, self.unit = (hidden, weight, bias), unit
        self.dtypes: tuple[torch.dtype, ...] = ()
        # A gathered weight is filled again without a trace: what was changed is the piece of it, or what is in that.
        params = [] if group is None else [p.sharded_param for p in group.fsdp_params]
        pieces = [t for p in params for t in (p, p.to_local())]
        self.watched = [t for t in (*self.operands, *pieces) if t is not None]
        self.versions = [t._version for t in self.watched]
        self.value: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return (self.operands[0].dtype, *self.dtypes)[-1]

    def to(self, *dtypes: torch.dtype) -> "_Product":
        other = copy.copy(self)
        other.dtypes = (*self.dtypes, *dtypes)
        return other

    def can_be_computed(self) -> bool:
        """Whether the operands are what they were, and the weight is there: FSDP2 empties its storage."""
        return self.versions == [t._version for t in self.watched] and self.operands[1].untyped_storage().size() > 0

    def compute(self) -> torch.Tensor:
        """The values, the first time by the product; they have no graph, that is the :class:`DeferredLogits`'."""
        if self.value is None:
            if not self.can_be_computed():
                raise RuntimeError(
                    "the logits of a training step were asked for after the head's weight or its input had changed, "
                    "or after FSDP2 had taken the gathered weight away, so they cannot be computed any more: read "
                    "outputs.logits before optimizer.step(), under FSDP2 before loss.backward(), or compute them in "
                    "evaluation mode"
                )
            with torch.no_grad(), _without_autocast(self.operands[0].device):
                self.value = F.linear(*self.operands)
                for dtype in self.dtypes:
                    self.value = self.value.to(dtype)
        return self.value


class DeferredLogits(torch.Tensor):
    """Logits ``[..., V]`` of a training step, computed when their values are needed.

    Shape, dtype, device and graph are there at once. Detaching, copying and casting give deferred logits again. Every
    other operation computes the product ``hidden @ weight.T + bias`` first, once, and works on that; its gradient
    takes the way that it takes through ``nn.Linear``.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # all is below, where autograd has done its part

    @staticmethod
    def __new__(cls, product: _Product):
        hidden, weight, _ = product.operands
        shape = (*hidden.shape[:-1], weight.shape[0])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=product.dtype, device=hidden.device)

    def __init__(self, product: _Product):
        self.product = product

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        product = args[0].product if args and isinstance(args[0], cls) else None
        if product is not None and product.value is None:
            if func in (aten.detach.default, aten.alias.default):
                return cls(product)
            if func is aten.clone.default and kwargs.get("memory_format", torch.preserve_format) in _ROW_MAJOR:
                return cls(product.to())
            if func in (aten.mul.Tensor, aten.div.Tensor) and isinstance(args[1], (int, float)) and args[1] == 1:
                return cls(product.to())  # models that scale their logits do so by 1 too
            if func is aten._to_copy.default and kwargs.keys() == {"dtype"}:
                return cls(product.to(kwargs["dtype"]))
        results = func(*tree_map(_computed, args), **tree_map(_computed, kwargs))
        if func._schema.is_mutable:  # who changes a tensor gets that tensor back
            owners = {id(t.product.value): t for t in tree_leaves((args, kwargs)) if isinstance(t, cls)}
            results = tree_map(lambda t: owners.get(id(t), t), results)
        return results

    # What reads memory without asking the dispatcher: Triton's launcher, NumPy, copy, pickle.

    def data_ptr(self) -> int:
        return self.product.compute().data_ptr()

    def numpy(self, **kwargs):
        if self.requires_grad and not kwargs.get("force"):
            raise RuntimeError("these logits require grad: call .detach().numpy()")
        return self.product.compute().numpy(**kwargs)

    def tolist(self) -> list:
        return self.product.compute().tolist()

    def __deepcopy__(self, memo):
        return super().__deepcopy__(memo) if self.requires_grad else self.clone()

    def __reduce_ex__(self, protocol):
        return self.product.compute().__reduce_ex__(protocol)

    def __repr__(self, **kwargs):
        if self.product.value is None:
            return f"DeferredLogits({tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"
        return repr(self.product.value)


_ROW_MAJOR = (torch.preserve_format, torch.contiguous_format)


def _computed(value: object) -> object:
    return value.product.compute() if isinstance(value, DeferredLogits) else value


class _Defer(torch.autograd.Function):
    """``nn.Linear`` in the graph, with its values deferred."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, unit, group):
        ctx.save_for_backward(hidden, weight)
        return DeferredLogits(_Product(hidden, weight, bias, unit, group))

    @staticmethod
    def backward(ctx, dlogits):
        hidden, weight = ctx.saved_tensors
        needs, rows = ctx.needs_input_grad, dlogits.flatten(0, -2)
        with _without_autocast(dlogits.device):
            return (
                dlogits @ weight if needs[0] else None,
                rows.t() @ hidden.flatten(0, -2) if needs[1] else None,
                rows.sum(0) if needs[2] else None,
                None,
                None,
            )


class _Count:
    """How many positions of labels [..., S] on a GPU have one, behind the first: asked for now, and known to the host
    when the loss needs it, without waiting for what was queued in between."""

    def __init__(self, labels: torch.Tensor):
        self.labels, self.version = labels, labels._version
        self.number = torch.empty((), dtype=torch.int64, pin_memory=True)
        self.number.copy_((labels[..., 1:] != IGNORED).sum(), non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record(torch.cuda.current_stream(labels.device))

    def of(self, labels: torch.Tensor, ignore_index: int) -> int | None:
        """The count, if these are the labels that were counted."""
        if labels is not self.labels or labels._version != self.version or ignore_index != IGNORED:
            return None
        self.copied.synchronize()
        return int(self.number)


class _LabelsSeen:
    """Forward pre-hook of a model that tells its head whether this call has labels; without, nothing is deferred. For
    the loss it has them counted.

    Some wrappers call a model's ``forward`` past its hooks. Then the head does not know, and defers.
    """

    def __init__(self, position: int):
        self.position = position
        self.seen = self.count = None

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            return
        labels = args[self.position] if len(args) > self.position else kwargs.get("labels")
        self.seen, self.count = labels is not None, None
        real = type(labels) is torch.Tensor and labels.is_cuda and not torch.cuda.is_current_stream_capturing()
        if real and not labels.is_inference() and model.training and torch.is_grad_enabled():
            self.count = _Count(labels)

    def take(self) -> bool:
        seen, self.seen = self.seen, None  # the next call of the head may be one of another kind
        return seen is not False

    def counted(self, labels: torch.Tensor | None, ignore_index: int) -> int | None:
        count, self.count = self.count, None
        return None if count is None else count.of(labels, ignore_index)

    def __getstate__(self):
        return {"position": self.position, "seen": None, "count": None}


class CoatHead(nn.Linear):
    """The head of a language model, whose logits are deferred in training; see :func:`fuse_loss`.

    It is never constructed: the class of the live ``nn.Linear`` is changed, and changed back.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self._defers(input):
            return super().forward(input)
        operands = (input, self.weight, self.bias)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):  # as autocast does for every linear
            dtype = torch.get_autocast_dtype(kind)
            operands = tuple(t if t is None else t.to(dtype) for t in operands)
        dtypes = {t.dtype for t in operands if t is not None}
        group = group_of(self)
        given_back = group is not None and group._reshard_after_forward  # FSDP2 takes it: the loss would not find it
        if len(dtypes) > 1 or not dtypes.issubset(DTYPES) or given_back:
            return super().forward(input)
        unit = self._get_fsdp_state() if hasattr(self, "_get_fsdp_state") else None
        return _Defer.apply(*operands, unit, group)

    def _defers(self, hidden: torch.Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()
            and self.coat_labels.take()
            and self.training
            and torch.is_grad_enabled()
            and not is_traceable_wrapper_subclass(self.weight)  # a DTensor's product is one too
            and isinstance(hidden, torch.Tensor)
            and hidden.dim() > 1
            and (hidden.requires_grad or self.weight.requires_grad)
            and not (torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())
            and self._has_library(hidden)
        )

    def _has_library(self, hidden: torch.Tensor) -> bool:
        """A prediction, whose tensors are fake, asks for the device that the training will be on."""
        return (_library_name(self) if isinstance(hidden, FakeTensor) else library(hidden.device.type)) is not None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fused with the loss"


class CoatLoss:
    """transformers' ``ForCausalLMLoss``, for :class:`DeferredLogits` without computing them.

    Loss of the N positions that have a label, ``sum_i log(sum_v exp(z_iv)) - z_i,label``, over N or
    ``num_items_in_batch``; in FP32.

    Args:
        original: The loss function that stood here; it gets whatever cannot be fused.
        replaced: What the model held in its own ``_loss_function``; None if nothing.
        seen: What has seen the labels before the forward.
    """

    def __init__(self, original: Callable, replaced: Callable | None, seen: _LabelsSeen):
        self.original, self.replaced, self.seen = original, replaced, seen

    def __call__(
        self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
    ) -> torch.Tensor:
        count = self.seen.counted(labels if shift_labels is None else None, ignore_index)
        if not LOSS_ARGUMENTS.isdisjoint(kwargs) or not _can_fuse(logits, labels, vocab_size, shift_labels):
            return self.original(
                logits=logits,
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        hidden, weight, bias = logits.product.operands
        target = shift_labels.reshape(-1).to(hidden.device)
        kept = _kept(target, ignore_index, count)
        hidden, target = hidden.flatten(0, -2).index_select(0, kept), target.index_select(0, kept)
        loss = _FusedLoss.apply(hidden, weight, bias, target)
        for announce in _announcements(logits):
            loss.register_hook(announce)
        if num_items_in_batch is None:
            return loss if kept.numel() else loss * torch.nan  # as the mean over nothing
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss * kept.numel() / num_items_in_batch


def _kept(target: torch.Tensor, ignore_index: int, count: int | None) -> torch.Tensor:
    """Where there is a label. How many there are sizes what follows: on CUDA the host waits here for the GPU, unless
    it has the count."""
    if isinstance(target, FakeTensor):
        return torch.arange(len(target), device=target.device)  # the most there can be
    with unset_fake_temporarily():  # a prediction's labels are real, see hf_coat.memory
        there = target != ignore_index
        return (there.nonzero() if count is None else torch.nonzero_static(there, size=count)).squeeze(1)


def _can_fuse(logits, labels, vocab_size, shift_labels) -> bool:
    """Whether these are untouched logits of a head, with labels that transformers would take."""
    if not isinstance(logits, DeferredLogits) or logits.product.value is not None:
        return False
    if not (torch.is_grad_enabled() and logits.requires_grad) or logits.retains_grad:
        return False  # detached, or somebody wants their gradient
    if any(hook not in _announcements(logits) for hook in (logits._backward_hooks or {}).values()):
        return False
    target = labels if shift_labels is None else shift_labels
    return (
        isinstance(target, torch.Tensor)
        and target.dtype == torch.int64
        and not (target.is_meta or logits.is_meta)
        and target.numel() == logits.shape[:-1].numel()
        and vocab_size == logits.shape[-1]
        and all(dtype == torch.float32 for dtype in logits.product.dtypes)
    )


def _announcements(logits: DeferredLogits) -> list[Callable]:
    """The hooks by which FSDP2 learns that the backward comes to the head's unit; they leave gradients as they are."""
    unit = logits.product.unit
    return [] if unit is None else [unit._pre_backward]


class _FusedLoss(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T + bias`` ``[N, V]``, piece by piece; 0 without a row.

    The gradients are computed in the forward. Unlike the libraries' own functions this one saves them as autograd
    knows it, so that hooks see and count them, and a graph that is retained stays right.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target):
        needs = ctx.needs_input_grad[:3]
        ctx.empty = not len(target)
        if ctx.empty or isinstance(hidden, FakeTensor):
            loss = hidden.new_zeros((), dtype=torch.float32)
            gradients = _predicted((hidden, weight, bias), needs)
        else:
            with _without_autocast(hidden.device):
                operands = [t if t is None else t.detach() for t in (hidden, weight, bias)]
                loss, gradients = library(hidden.device.type)(*operands, target, needs)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        gradients = ctx.saved_tensors
        if not ctx.empty:
            # In place, but for a graph that is retained: the weight's gradient is too large to have it twice.
            if torch._C._autograd._get_current_graph_task_keep_graph():
                gradients = [g if g is None else g.clone() for g in gradients]
            for g in gradients:
                if g is not None:
                    multiply(g, dloss)
        return *gradients, None


def _without_autocast(device: torch.device):
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _predicted(operands, needs) -> Gradients:
    """Gradients for :mod:`hf_coat.peak`, and on the way what else is held while they are computed: the logits of a
    piece, beside the gradients or beside the FP32 sum from which that of the weight is made at the end."""
    hidden, weight, _ = operands

    def gradients():
        return [torch.zeros_like(t) if need else None for t, need in zip(operands, needs, strict=True)]

    if not len(hidden):
        return gradients()
    liger = _expected_library(hidden.device.type) is _by_liger
    pieces = _pieces_by_liger(hidden, weight, needs) if liger else _pieces(*hidden.shape, len(weight))
    summed = pieces > 1 and _summed(weight, needs)
    beside = torch.zeros_like(weight, dtype=torch.float32) if summed else gradients()
    hidden.new_empty(-(-len(hidden) // pieces), len(weight))
    return gradients() if summed else beside


# --- the libraries ---


@functools.cache
def library(device_type: str) -> Callable | None:
    """What computes the mean loss on a kind of device; None where nothing does.

    Returns:
        A function of ``hidden [N, H], weight [V, H], bias [V] | None, target [N]``, all detached, and of which three
        gradients are needed; it returns the loss, FP32, and the gradients, None for those not needed.
    """
    if device_type == "cuda" and _liger() is not None:
        return _by_liger
    if device_type in ("cuda", "cpu") and hasattr(nn, "LinearCrossEntropyOptions"):
        return _by_torch
    return None


@functools.cache
def _liger() -> tuple[Callable, frozenset[str]] | None:
    """Liger's kernel and its arguments, if it is installed and sums in FP32. Not imported before it is needed."""
    try:
        module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    except ImportError:
        return None
    kernel = module.fused_linear_cross_entropy_forward
    arguments = frozenset(inspect.signature(kernel).parameters)
    return (kernel, arguments) if "accum_dtype" in arguments else None


@functools.cache
def _liger_multiply() -> Callable | None:
    """Liger's kernel ``[rows](values, distance of rows, factor, columns, BLOCK_SIZE=, num_warps=)``, where it is."""
    try:
        return importlib.import_module("liger_kernel.ops.utils").element_mul_kernel
    except (ImportError, AttributeError):
        return None


def multiply(values: torch.Tensor, factor: torch.Tensor) -> None:
    """``values *= factor`` in place, in float32; ``factor`` is one float32 number on the device of the values.

    torch multiplies BF16 by float32 one value at a time, and takes three times as long as the memory needs.
    """
    mixed = values.is_cuda and values.dtype != factor.dtype and not isinstance(values, FakeTensor)
    kernel = _liger_multiply() if mixed else None
    if kernel is None or not values.is_contiguous() or not values.numel():
        values.mul_(factor)
        return
    rows = values.view(-1, values.shape[-1])
    kernel[(len(rows),)](rows, rows.stride(0), factor, rows.shape[1], BLOCK_SIZE=4096, num_warps=8)


def _pieces(n: int, width: int, vocabulary: int) -> int:
    """Into how many pieces N rows are cut.

    The logits of a piece are no larger than the hidden states of all rows or half of the weight, whichever is more,
    except that a piece is never cut below ``FEWEST_ROWS``: each adds its part to the whole gradient of the weight.
    """
    return -(-n // max(FEWEST_ROWS, width // 2, n * width // vocabulary))


def _summed(weight: torch.Tensor, needs) -> bool:
    """Whether the pieces' gradients of the weight add up in memory of their own, of four bytes for a value."""
    return needs[1] and weight.dtype != torch.float32


def _pieces_by_liger(hidden: torch.Tensor, weight: torch.Tensor, needs) -> int:
    """The same of ``hidden`` [N, H], but one piece where the sum of the parts would take more memory than all logits,
    two bytes each: Liger makes their gradient in their place. Versions that are not told so cut as they like."""
    n, width = hidden.shape
    if SIZE in _liger()[1] and _summed(weight, needs) and n <= 2 * width:
        return 1
    return _pieces(n, width, len(weight))


class _AllThere(torch.Tensor):
    """Labels of which none is to be ignored. Liger asks how many those are, and waits until the GPU has done all that
    was queued; of these the host knows it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.ne:
            return torch.ones(args[0].shape, dtype=torch.bool)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _by_liger(hidden, weight, bias, target, needs) -> tuple[torch.Tensor, Gradients]:
    (kernel, arguments), pieces = _liger(), _pieces_by_liger(hidden, weight, needs)
    told = SIZE in arguments
    options = {SIZE: -(-len(weight) // (hidden.shape[1] * pieces))} if told else {}
    if pieces > 1 or not told:  # one piece is rounded once in any case
        options["accum_dtype"] = torch.float32
    loss, *_, dhidden, dweight, dbias = kernel(
        _input=hidden.requires_grad_(),  # without it Liger computes no gradient at all
        weight=weight.requires_grad_(needs[1]),
        target=target.as_subclass(_AllThere),
        bias=bias,
        reduction="mean",
        **options,
    )
    return loss.float(), [g if need else None for g, need in zip((dhidden, dweight, dbias), needs, strict=True)]


def _by_torch(hidden, weight, bias, target, needs) -> tuple[torch.Tensor, Gradients]:
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return _by_torch_in_pieces(hidden, weight, bias, target, needs)
    operands = [t if t is None else t.float() for t in (hidden, weight, bias)]
    rows = -(-len(target) // _pieces(*hidden.shape, len(weight)))
    loss, gradients = _torch_piece(*operands, target, needs, "mean", rows)
    return loss, [g if g is None else g.to(hidden.dtype) for g in gradients]


def _by_torch_in_pieces(hidden, weight, bias, target, needs) -> tuple[torch.Tensor, Gradients]:
    n, pieces = len(target), _pieces(*hidden.shape, len(weight))
    loss, dhidden, (dweight, dbias) = hidden.new_zeros((), dtype=torch.float32), [], (None, None)
    for part, labels in zip(hidden.tensor_split(pieces), target.tensor_split(pieces), strict=True):
        part_loss, (dpart, dw, db) = _torch_piece(part, weight, bias, labels, needs, "sum", len(labels))
        loss += part_loss
        dhidden.append(dpart)
        dweight, dbias = (
            now if total is None else total.float().add_(now) for total, now in ((dweight, dw), (dbias, db))
        )
    gradients = [torch.cat(dhidden) if needs[0] else None, dweight, dbias]
    return loss / n, [g if g is None else g.div_(n).to(hidden.dtype) for g in gradients]


def _torch_piece(hidden, weight, bias, target, needs, reduction: str, rows: int) -> tuple[torch.Tensor, Gradients]:
    """Loss and gradients by PyTorch's function, which multiplies ``rows`` rows at a time."""
    options = nn.LinearCrossEntropyOptions(
        batch_chunk_size=rows, chunking_method=None, acc_policy="compact", acc_dtype=torch.float32
    )
    operands = [
        t if t is None else t.requires_grad_(need) for t, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    with torch.enable_grad():
        loss = F.linear_cross_entropy(
            operands[0], operands[1], target, linear_bias=operands[2], reduction=reduction, options=options
        )
    wanted = iter(torch.autograd.grad(loss, [t for t, need in zip(operands, needs, strict=True) if need]))
    return loss.detach(), [next(wanted) if need else None for need in needs]


# --- into a model and out again ---


def fuse_loss(model: nn.Module) -> dict[str, str]:
    """Fuse the heads of the language models in ``model`` with their losses, in place. Doing it again changes nothing.

    Args:
        model: A model of transformers, or something around one; also on the meta device.

    Returns:
        By the name of a head what became of it, or why it was left alone. Empty for a model without such a head.
    """
    outcome = {}
    for name, head, owner in heads(model):
        if owner is not None and not isinstance(head, CoatHead):
            _unfuse(owner)  # the head it was fused with is gone: resize_token_embeddings makes another one
        reason = None if isinstance(head, CoatHead) else _why_not(head, owner)
        if reason is None:
            _fuse(head, owner)
            outcome[name] = f"fused linear cross-entropy, {_library_name(head)}"
        else:
            outcome[name] = f"loss not fused: {reason}"
    return outcome


def unfuse_loss(model: nn.Module) -> dict[str, str]:
    """Undo :func:`fuse_loss` in place, exactly.

    Returns:
        By the names of the heads that were fused what they are now.
    """
    outcome = {}
    for name, module in model.named_modules():
        _unfuse(module)
        if isinstance(module, CoatHead):
            del module.coat_labels
            cls, plain = type(module), nn.Linear
            if hasattr(cls, "_get_fsdp_state"):  # of a unit of FSDP2's: one of its own, derived from this one
                own = {name: value for name, value in vars(cls).items() if name == "__deepcopy__"}
                plain = type("FSDPLinear", (cls.__bases__[0], nn.Linear), own)
            module.__class__ = plain
            outcome[name] = "nn.Linear"
    return outcome


def _unfuse(owner: nn.Module) -> None:
    """Take our loss, and the hook that sees its labels, from a model."""
    loss = vars(owner).get("_loss_function")
    if isinstance(loss, CoatLoss):
        if loss.replaced is None:
            del owner._loss_function
        else:
            owner._loss_function = loss.replaced
    for key, hook in list(owner._forward_pre_hooks.items()):
        if isinstance(hook, _LabelsSeen):
            del owner._forward_pre_hooks[key]
            owner._forward_pre_hooks_with_kwargs.pop(key, None)


def heads(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Name and module of each head of a language model (output embedding) in ``model``, and the model that calls it:
    the one whose child it is, if any."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[int, tuple] = {}
    for module in model.modules():
        if callable(getattr(type(module), "get_output_embeddings", None)):  # not what a wrapper passes on
            head = module.get_output_embeddings()
            if isinstance(head, nn.Module) and id(head) in names:
                owns = any(child is head for child in module._modules.values())
                if owns or id(head) not in found:
                    found[id(head)] = names[id(head)], head, module if owns else None
    return iter(found.values())


def _why_not(head: nn.Module, owner: nn.Module | None) -> str | None:
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, not a plain nn.Linear"
    if "forward" in vars(head):
        return "the head's forward was replaced (an offloading hook?)"
    if owner is None:
        return "the head is no child of the model that computes the loss"
    loss = getattr(owner, "loss_function", None)
    if not isinstance(getattr(type(owner), "loss_function", None), property) or not _is_causal_lm_loss(loss):
        return f"the loss is {getattr(loss, '__name__', type(loss).__name__)}, not transformers' ForCausalLMLoss"
    names = _names_in(inspect.unwrap(type(owner).forward).__code__)
    if "loss_function" not in names:
        return f"{type(owner).__name__}.forward computes a loss of its own"
    scale = _scale_of_logits(owner, names)
    if scale is not None:
        return f"the logits are changed before the loss: {scale}"
    if _library_name(head) is None:
        return f"no library for it: {REMEDY}"
    return None


def _expected_library(kind: str) -> Callable | None:
    if library(kind) is None:  # where it will be moved to, as far as one can tell
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return library(kind)


def _library_name(head: nn.Linear) -> str | None:
    names = {_by_liger: "liger_kernel", _by_torch: "torch.nn.functional.linear_cross_entropy"}
    return names.get(_expected_library(head.weight.device.type))


def _names_in(code) -> set[str]:
    """Attributes, and strings that may be names of attributes, in a function's code."""
    return {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}


def _scale_of_logits(owner: nn.Module, names: set[str]) -> str | None:
    """A factor or bound that the model's forward reads and that is in force."""
    config = getattr(owner, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    for name in sorted(filter(SCALES.search, names)):
        for holder in (config, text, owner):
            value = getattr(holder, name, None)
            if isinstance(value, (int, float)) and value != 1:
                return f"{name}={value}"
    return None


def _is_causal_lm_loss(loss: object) -> bool:
    """Whether this is transformers' ``ForCausalLMLoss``, and computes what :class:`CoatLoss` says."""
    module, name = getattr(loss, "__module__", ""), getattr(loss, "__name__", "")
    if not module.startswith("transformers.") or name != "ForCausalLMLoss":
        return False
    with torch.device("cpu"):  # a model that is being loaded may be on meta
        logits = torch.arange(20, dtype=torch.float32).sin().reshape(1, 4, 5)  # 4 tokens, 5 words
        labels, shifted = torch.tensor([[0, 1, -100, 3]]), torch.tensor([[1, 9, 3, 9]])
        each = F.cross_entropy(logits[0, [0, 2]], shifted[0, [0, 2]], reduction="none")
        mean = loss(logits, labels, 5)
        part = loss(logits, None, 5, num_items_in_batch=torch.tensor(7), ignore_index=9, shift_labels=shifted)
        return torch.allclose(mean, each.mean()) and torch.allclose(part, each.sum() / 7)


def _fuse(head: nn.Linear, owner: nn.Module) -> None:
    if not isinstance(head, CoatHead):
        parameters = list(inspect.signature(type(owner).forward).parameters)
        position = parameters.index("labels") - 1 if "labels" in parameters else len(parameters)
        head.coat_labels = _LabelsSeen(position)
        owner.register_forward_pre_hook(head.coat_labels, with_kwargs=True)
        head.__class__ = CoatHead
    if not isinstance(owner.loss_function, CoatLoss):
        owner.loss_function = CoatLoss(owner.loss_function, vars(owner).get("_loss_function"), head.coat_labels)

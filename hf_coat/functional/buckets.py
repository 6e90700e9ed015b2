"""Weight gradients that are computed where DDP averages them.

DDP averages gradients in buckets, and copies those that lie elsewhere into them. A matrix product can as well write
its result there: the gradient of a converted linear is then written once, and averaged where it lies.
"""

import weakref
from collections.abc import MutableMapping, Sequence

import torch
import torch.distributed as dist
from coat_kernels.scaled_mm import ALIGN
from torch.autograd.graph import Node
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

# A parameter -> its part of a bucket, of its shape and dtype, from when that was averaged until it is written to. The
# bucket is DDP's: it is not kept when DDP is gone.
_places: MutableMapping[torch.Tensor, weakref.ref[torch.Tensor]] = WeakTensorKeyDictionary()


def _place(weight: torch.Tensor) -> torch.Tensor | None:
    found = _places.get(weight)
    return None if found is None else found()


def take_places(ctx: Node, first: int, many: int) -> list[torch.Tensor] | None:
    """Where the gradients of weights [N_i, K] belong, each [N_i, K], to be written at once; None if not all of them
    have a place.

    A place is given away once in a backward, and only to a weight without a gradient: what is added to a gradient,
    where a weight is used twice or gradients accumulate, has to lie elsewhere. So has what ``torch.autograd.grad``
    returns.

    Args:
        ctx: The function whose backward runs. Where autograd passes its gradients on tells the parameters, also in a
            backward that computes its forward again.
        first, many: Which of its tensors the weights are.
    """
    if torch.compiler.is_compiling() or not _places:
        return None
    nodes = [node for node, _ in ctx.next_functions[first : first + many]]
    weights = [getattr(node, "variable", None) for node in nodes]
    places = [None if w is None else _place(w) for w in weights]
    if any(place is None for place in places) or any(w.grad is not None for w in weights):
        return None
    try:
        if not all(map(torch._C._will_engine_execute_node, nodes)):
            return None
    except RuntimeError:  # it returns them
        return None
    for w in weights:
        del _places[w]
    return [place.detach() for place in places]  # tensors of their own, which autograd takes for gradients as they are


def runs(places: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same memory as matrices [N, K], of as many places each as lie one behind the other in a bucket."""
    found = []
    for place in places:
        last = found[-1] if found else None
        if last is not None and last.untyped_storage().data_ptr() == place.untyped_storage().data_ptr():
            if last.data_ptr() + last.nbytes == place.data_ptr():
                found[-1] = last.as_strided((len(last) + len(place), place.shape[1]), place.stride())
                continue
        found.append(place)
    return found


class _Buckets:
    """What DDP's communication hook knows of its buckets, by index: where the last one began, and its parts."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, size = group, group.size()
        # gloo cannot average, and NCCL rounds the divisor to BF16 first.
        self.averages = group._get_backend(device).name() == "nccl" and size & (size - 1) == 0
        self.addresses: dict[int, int] = {}
        self.parts: dict[int, list[torch.Tensor]] = {}

    def __reduce__(self):  # a copy of DDP has no hook, and nothing of this one
        return type(None), ()


def _average(buckets: _Buckets, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """DDP's communication hook: a bucket's average; and its parts become places for the next backward.

    DDP makes new buckets after the first backward. Places are in buckets that came a second time, so that none of them
    keeps the memory of a bucket that is gone.
    """
    values, index = bucket.buffer(), bucket.index()
    if buckets.addresses.get(index) == values.data_ptr():
        parts = buckets.parts[index] = bucket.gradients()
        for parameter, part in zip(bucket.parameters(), parts, strict=True):
            if parameter.dim() == 2 and parameter.is_contiguous() and part.data_ptr() % ALIGN == 0:
                _places[parameter] = weakref.ref(part)
    buckets.addresses[index] = values.data_ptr()
    if not buckets.averages:
        values.mul_(1 / buckets.group.size())
    op = dist.ReduceOp.AVG if buckets.averages else dist.ReduceOp.SUM
    work = dist.all_reduce(values, op=op, group=buckets.group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def write_into_buckets(model: DistributedDataParallel) -> None:
    """Let the converted linears of a DDP model write their weights' gradients into its buckets.

    The gradients are those that DDP would have copied there. Trainer's runs with ``coat=`` do it by themselves; in a
    loop of your own:

        model = DistributedDataParallel(model, device_ids=[rank], gradient_as_bucket_view=True)
        write_into_buckets(model)

    The next backward writes over them, also one under ``no_sync``: to keep a gradient beyond ``zero_grad``, clone it.
    In ``model.join`` the divisor is always the number of processes.

    Args:
        model: As ``DistributedDataParallel`` made it, before its first backward.

    Raises:
        ValueError: If gradients are not views of the buckets.
        RuntimeError: From torch, if the model has a communication hook already.
    """
    if not model.gradient_as_bucket_view:
        raise ValueError(
            "gradients of this DistributedDataParallel are copies of its buckets, which nothing can be written into: "
            "make it with gradient_as_bucket_view=True"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        _places.pop(parameter, None)  # in the buckets of an earlier wrapper
    model.register_comm_hook(_Buckets(model.process_group, parameters[0].device), _average)

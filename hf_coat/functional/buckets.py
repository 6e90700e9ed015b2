"""Weight gradients that are computed where DDP averages them.

DDP averages gradients in buckets, and copies those that lie elsewhere into them. A matrix product can as well write
its result there: the gradient of a converted linear is then written once, and averaged where it lies.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from coat_kernels.scaled_mm import ALIGN
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

# A parameter -> its part of a bucket, of its shape and dtype, from when that was averaged until it is written to.
_places = WeakTensorKeyDictionary()


def take_places(weights: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Where the gradients of these weights [N_i, K] belong, each [N_i, K], to be written at once; None if not all of
    them have a place.

    A place is given away once in a backward, and only to a weight without a gradient: what is added to a gradient,
    where a weight is used twice or gradients accumulate, has to lie elsewhere.
    """
    if torch.compiler.is_compiling() or not _places:
        return None
    places = [_places.get(w) for w in weights]
    if any(place is None for place in places) or any(w.grad is not None for w in weights):
        return None
    for w in weights:
        del _places[w]
    return places


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


class _Averaging:
    """DDP's communication hook: a bucket's average, and its parts as places for the next backward.

    DDP makes new buckets after the first backward. Places are in buckets that came a second time, so that none of them
    keeps the memory of a bucket that is gone.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group = group
        self.averages = type(group._get_backend(device)).__name__ == "ProcessGroupNCCL"  # gloo cannot
        self.addresses: dict[int, int] = {}

    def __call__(self, bucket: dist.GradBucket) -> Future[torch.Tensor]:
        values, index = bucket.buffer(), bucket.index()
        if self.addresses.get(index) == values.data_ptr():
            for parameter, place in zip(bucket.parameters(), bucket.gradients(), strict=True):
                if parameter.dim() == 2 and parameter.is_contiguous() and place.data_ptr() % ALIGN == 0:
                    _places[parameter] = place
        self.addresses[index] = values.data_ptr()
        if not self.averages:
            values.div_(self.group.size())
        op = dist.ReduceOp.AVG if self.averages else dist.ReduceOp.SUM
        work = dist.all_reduce(values, op=op, group=self.group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])


def _average(state: _Averaging, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    return state(bucket)


def write_into_buckets(model: DistributedDataParallel) -> None:
    """Let the converted linears of a DDP model write their weights' gradients into its buckets.

    The gradients are the same bit for bit. Trainer's runs with ``coat=`` do it by themselves; in a loop of your own:

        model = DistributedDataParallel(model, device_ids=[rank], gradient_as_bucket_view=True)
        write_into_buckets(model)

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
    for parameter in parameters:  # of buckets of an earlier wrapper
        _places.pop(parameter, None)
    model.register_comm_hook(_Averaging(model.process_group, parameters[0].device), _average)

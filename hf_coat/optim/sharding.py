"""Parameters that are DTensors (FSDP2, tensor parallelism): each process steps the piece that it holds.

A step needs nothing from other processes as long as no group is cut: groups run along the last dimension, and FSDP2
cuts the first. Of a vector these are the same, so a vector is seen as a column: rows of one value, and groups of one.
That holds for plain tensors too; otherwise states could not move to another number of processes.

Stochastic rounding hashes a value's index in the whole parameter, so that its result is the same for every number of
processes among which the first dimension is cut. Where another one is (tensor parallelism), indices count on from the
first value of a piece, and chance depends on how it was cut.
"""

import math

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor; told without importing them, which takes more than a second."""
    return hasattr(tensor, "device_mesh")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The values of ``tensor`` that this process holds, not copied."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_rows(tensor: torch.Tensor) -> torch.Tensor:
    """As :func:`local`; of a vector as a column."""
    return local(tensor).unsqueeze(-1) if tensor.dim() == 1 else local(tensor)


def state_rows(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A state of ``param`` as :func:`local_rows` has the parameter: side data of a vector has that shape already."""
    return local_rows(value) if param.dim() == 1 else local(value)


def local_gradient(param: torch.Tensor) -> torch.Tensor:
    """The gradient of :func:`local_rows` of ``param``; reduced first, where the processes hold parts of a sum."""
    grad = param.grad
    if is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_rows(grad)


def rows_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the whole of a parameter of ``shape``, of a vector as a column."""
    return (*shape, 1) if len(shape) == 1 else tuple(shape)


def first_index(param: torch.Tensor) -> int:
    """The index of the first value that this process holds in the whole parameter, counted row by row.

    Where the first dimension alone is cut, as FSDP2 does, the process holds the values from there on.
    """
    if not is_sharded(param):
        return 0
    starts, lengths = [0] * param.dim(), list(param.shape)
    for i, placement in enumerate(param.placements):
        dim = getattr(placement, "dim", None)  # Shard and its kin
        if dim is None:
            continue
        piece = -(-lengths[dim] // param.device_mesh.size(i))  # as torch.chunk cuts
        before = min(piece * param.device_mesh.get_coordinate()[i], lengths[dim])
        starts[dim] += before
        lengths[dim] = min(piece, lengths[dim] - before)
    return sum(start * math.prod(param.shape[dim + 1 :]) for dim, start in enumerate(starts))


def placed_as(param: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``values``, this process's piece of a tensor of ``shape``, as a tensor that is distributed as ``param`` is."""
    if not is_sharded(param):
        return values
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(values, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride)


def check_sharding(param: torch.Tensor, group_size: int) -> None:
    """Refuse a DTensor whose groups are cut between processes, or that is a sum of what they hold.

    Raises:
        ValueError: With the shape, the placements and the remedy.
    """
    if not is_sharded(param):
        return
    last = len(rows_shape(param.shape)) - 1
    pieces = 1
    for i, placement in enumerate(param.placements):
        if placement.is_partial():
            raise ValueError(f"a parameter of shape {list(param.shape)} is a sum over processes: {param.placements}")
        if getattr(placement, "dim", None) == last:  # Shard and its kin
            pieces *= param.device_mesh.size(i)
    if pieces > 1 and param.shape[-1] % (pieces * group_size):
        raise ValueError(
            f"a parameter of shape {list(param.shape)} is cut into {pieces} pieces along its last dimension "
            f"({param.placements}), which cuts groups of {group_size}: shard another dimension, as FSDP2 does, or "
            f"choose a group_size that divides {param.shape[-1]} / {pieces}"
        )


def check_placement(name: str, value: torch.Tensor, param: torch.Tensor) -> None:
    """Refuse a saved state that is not distributed as its parameter is.

    Raises:
        ValueError: With both placements and the remedy.
    """
    have = value.placements if is_sharded(value) else None
    want = param.placements if is_sharded(param) else None
    if have != want:
        raise ValueError(
            f"{name} is {'one whole tensor' if have is None else f'distributed as {have}'}, its parameter "
            f"{'one whole tensor' if want is None else f'distributed as {want}'}: load it with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, and where the states are whole tensors "
            "with its StateDictOptions(full_state_dict=True)"
        )

"""The average of what several processes hold, where the one that owns it has received the others' values.

    own = (own + others[0] + others[1] + ...) * (1 / count)        in float32, rounded once

It is the arithmetic of an all-reduce whose traffic is copies alone: each value is averaged in one place, so that all
processes end with the same bits.
"""

import torch

from ._registry import register

DTYPES = (torch.bfloat16, torch.float32)


def _check_average(own, others):
    if own.dtype not in DTYPES or others.dtype != own.dtype:
        raise TypeError(
            f"average: own is {own.dtype} and others is {others.dtype}, expected both of one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    if own.dim() != 1 or others.dim() != 2 or others.shape[1] != own.shape[0]:
        raise ValueError(f"average: own is {list(own.shape)} and others {list(others.shape)}, expected [n] and [r, n]")
    if own.numel() and (own.stride(0) != 1 or others.stride(1) != 1):
        raise ValueError(
            f"average: own has stride {own.stride(0)} and others {others.stride(1)} from value to value, expected 1: "
            "call contiguous() first"
        )


def average_ref(own, others):
    total = own.float()
    for row in others:
        total = total + row.float()
    own.copy_(total * (1.0 / (1 + others.shape[0])))


_average = register(
    "average(Tensor(a!) own, Tensor others) -> ()", average_ref, lambda own, others: None, "average_triton:average"
)


def average(own: torch.Tensor, others: torch.Tensor) -> None:
    """Average own values with those of others, in place.

    Args:
        own: BF16 or FP32 [n], contiguous; the average afterwards.
        others: As own, [r, n]: a row for each of the r others. Rows may lie apart.

    Raises:
        TypeError, ValueError: For dtypes and shapes that do not fit; the message names them.
    """
    _check_average(own, others)
    _average(own, others)

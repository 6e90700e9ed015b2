"""One launch for many tensors: a table on the device tells each program which tensor it works on, and where that is.

A row is a tensor: addresses, sizes, and in its last column the first program of the grid that works on it.
"""

from collections import OrderedDict

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float16: tl.float16}
MOST_TABLES = 256  # an optimizer has a few, FSDP2 one for each layer
_tables: OrderedDict[tuple, torch.Tensor] = OrderedDict()  # the last ones, by what they hold
_captured: list[torch.Tensor] = []  # those that CUDA graphs read


@triton.jit
def find_row(table, rows, pid, WIDTH: tl.constexpr):
    """The row of program ``pid`` in a table [rows, WIDTH]: the last one whose first program is not behind it."""
    low = 0
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        behind = tl.load(table + middle * WIDTH + WIDTH - 1) > pid
        low = tl.where(behind, low, middle)
        high = tl.where(behind, middle, high)
    return low


def on_device(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """Numbers as int64 [rows, columns] on the device. Most are those of the step before: then they are there already.

    Gradients often come back to where they were.
    """
    key = (device, rows)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _tables.get(key)
    if table is None and capturing:  # a graph cannot copy from the host's memory; it can fill with numbers
        table = torch.stack([torch.full((), x, dtype=torch.int64, device=device) for row in rows for x in row])
        table = table.view(len(rows), -1)
    elif table is None:
        host = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        table = _tables[key] = host.to(device, non_blocking=True)
        if len(_tables) > MOST_TABLES:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    if capturing:
        _captured.append(table)
    return table

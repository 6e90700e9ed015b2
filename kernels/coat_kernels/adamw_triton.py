"""The Triton twin of adamw.py: one launch steps all parameters of equal dtypes.

The groups of a parameter are numbered row by row; a tile is [GROUPS, LANES] values, a program takes up to TILES
successive tiles of one parameter, and the programs of all parameters make one grid. Where a program's parameter lies,
how large it is, and what changes from step to step, the program reads from a table with one row per parameter.

With BF16 parameters and gradients ten bytes move per value (the gradient in; the parameter and two codes in and out).
At the speed of an H200's memory that leaves time for some 75 instructions per value, ten of them of the slow kind
(log2, exp2, roots, quotients). Hence nine slow ones: a log2 and an exp2 to decode and to encode each moment, and a
square root.
"""

from collections import defaultdict

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .tiles_triton import INTERPRETED, to_float, to_fp8

# The columns of the table: int64, the last ones holding two float32 each.
POINTERS = tl.constexpr(0)  # param, grad; codes, scales, expansions of exp_avg; the same of exp_avg_sq
GROUP_COUNT = tl.constexpr(8)
COLUMNS = tl.constexpr(9)  # values in a row of the parameter
GROUPS_PER_ROW = tl.constexpr(10)
FIRST_PROGRAM = tl.constexpr(11)
SCALARS = tl.constexpr(12)  # lr, 1 / (1 - beta1**step), 1 / sqrt(1 - beta2**step), unused
WIDTH = tl.constexpr(14)

TILE = 512  # values: 16 for each thread of the one warp, so that one group lies in eight neighbouring threads
MOST_GROUPS = 64  # in a tile of short groups: each thread keeps side data of its groups
TILES = 16
STAGES = 3  # tiles in flight: one at work, two on their way
WARPS = 1
VECTOR = 16  # bytes of the widest memory access

NORMAL = tl.constexpr(0x00800000)  # bits of 2**-126
INFINITE = tl.constexpr(0x7F800000)
SIGN = tl.constexpr(0x80000000)
LARGEST = tl.constexpr(448.0)
LOG2_LARGEST = tl.constexpr(8.807354922057604)


@triton.jit
def _log2(x):
    """log2 of float32 ``x >= 0``, -inf below 2**-126. One instruction; tl.log2 is some twenty, for one bit more."""
    if INTERPRETED:
        smallest: tl.constexpr = 2.0**-126
        return tl.where(x < smallest, float("-inf"), tl.log2(tl.maximum(x, smallest)))
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _reciprocal(x):
    """1 / x of normal float32 ``x > 0`` without a slow instruction: a guess from the bits, 13 % off, refined twice."""
    y = (0x7EF311C7 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    error = 1.0 - x * y
    y += y * (error + error * error)
    error = 1.0 - x * y
    return y + y * (error + error * error)


@triton.jit
def _with_sign(x, y):
    """``x >= 0`` with the sign of ``y``."""
    return (x.to(tl.uint32, bitcast=True) | (y.to(tl.uint32, bitcast=True) & SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _decode(codes, scale, expansion, EXPAND: tl.constexpr, POSITIVE: tl.constexpr):
    """``scale * sign(q) * (|q| / 448)**(16 / expansion)`` of codes [GROUPS, LANES]; scale and expansion [GROUPS]."""
    q = codes.to(tl.float32)
    if EXPAND:
        half = 8.0 / expansion.to(tl.float32)
        root = tl.exp2(
            _log2(tl.abs(q)) * half[:, None] - (half * LOG2_LARGEST)[:, None]
        )  # its square may be below 2**-126
        return root * scale[:, None] * (root if POSITIVE else _with_sign(root, q))
    else:
        return q * (1.0 / LARGEST) * scale[:, None]


@triton.jit
def _encode(x, bits, amax_bits, EXPAND: tl.constexpr, POSITIVE: tl.constexpr):
    """Codes [GROUPS, LANES], scale and expansion [GROUPS] of finite ``x``, given the bits of |x| and their maxima."""
    empty = amax_bits < NORMAL
    scale = tl.where(empty, 0, amax_bits).to(tl.float32, bitcast=True)
    magnitude = bits.to(tl.float32, bitcast=True)
    expansion = tl.full(scale.shape, 16.0, tl.float32)
    if EXPAND:
        # Counted from NORMAL, the bits of smaller numbers wrap around to the top, out of the way of the minimum.
        smallest = (tl.min(bits - NORMAL, axis=1) + NORMAL).to(tl.float32, bitcast=True)
        log_scale = tl.where(empty, 0.0, _log2(scale))
        bits_of_range = tl.maximum(log_scale - _log2(smallest), 1.0)  # 1.04 gives 255 already
        chosen = tl.floor(265.83535750584334 / bits_of_range)  # 16 * log2(448**2 / 2)
        expansion = tl.where(empty, expansion, tl.minimum(tl.maximum(chosen, 1.0), 255.0))
        power = expansion * 0.0625
        y = tl.exp2(_log2(magnitude) * power[:, None] + (power * -log_scale + LOG2_LARGEST)[:, None])
    else:
        y = magnitude * (1.0 / tl.where(empty, 1.0, scale))[:, None] * LARGEST
        y = tl.where(bits < NORMAL, 0.0, tl.maximum(y, 2.0**-9) if POSITIVE else y)
    if not POSITIVE:
        y = _with_sign(y, x)
    if INTERPRETED:
        codes = to_fp8(y, 8)
    else:  # at most 448.1, which rounds to 448: no clamp
        codes = y.to(tl.float8e4nv)
    return codes, scale, expansion.to(tl.int32).to(tl.uint8)


@triton.jit(do_not_specialize=["parameters"])
def _adamw_kernel(
    table, scalars, parameters, skipped,  # int64 [parameters, WIDTH]; the same memory as float32; its rows; int64 [1]
    beta1, rest1, beta2, rest2, eps, weight_decay,  # rest = 1 - beta
    PARAM: tl.constexpr, GRAD: tl.constexpr, GROUP_SIZE: tl.constexpr, EXPAND: tl.constexpr, RAGGED: tl.constexpr,
    ALIGNMENT: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: the AdamW step of up to TILES * GROUPS groups of a parameter. Grid: programs of all parameters.

    RAGGED: some groups have fewer than LANES values. ALIGNMENT divides the addresses of values and codes, and where
    RAGGED also the length of a row.
    """
    pid = tl.program_id(0)
    low = 0  # the program's parameter: the last one whose first program is not behind this one
    high = parameters
    while high - low > 1:
        middle = (low + high) // 2
        behind = tl.load(table + middle * WIDTH + FIRST_PROGRAM) > pid
        low = tl.where(behind, low, middle)
        high = tl.where(behind, middle, high)
    row = table + low * WIDTH
    param_ptr = tl.multiple_of(tl.load(row + POINTERS).to(tl.pointer_type(PARAM)), ALIGNMENT)
    grad_ptr = tl.multiple_of(tl.load(row + POINTERS + 1).to(tl.pointer_type(GRAD)), ALIGNMENT)
    m_ptr = tl.multiple_of(tl.load(row + POINTERS + 2).to(tl.pointer_type(tl.float8e4nv)), ALIGNMENT)
    m_scale_ptr = tl.load(row + POINTERS + 3).to(tl.pointer_type(tl.float32))
    m_expansion_ptr = tl.load(row + POINTERS + 4).to(tl.pointer_type(tl.uint8))
    v_ptr = tl.multiple_of(tl.load(row + POINTERS + 5).to(tl.pointer_type(tl.float8e4nv)), ALIGNMENT)
    v_scale_ptr = tl.load(row + POINTERS + 6).to(tl.pointer_type(tl.float32))
    v_expansion_ptr = tl.load(row + POINTERS + 7).to(tl.pointer_type(tl.uint8))
    group_count = tl.load(row + GROUP_COUNT).to(tl.int32)
    columns = tl.multiple_of(tl.load(row + COLUMNS), ALIGNMENT)
    groups_per_row = tl.load(row + GROUPS_PER_ROW).to(tl.int32)
    first = (pid - tl.load(row + FIRST_PROGRAM).to(tl.int32)) * (TILES * GROUPS)
    scalar = scalars + (low * WIDTH + SCALARS) * 2
    lr = tl.load(scalar)
    step_size = lr * tl.load(scalar + 1)
    inverse_correction = tl.load(scalar + 2)
    decay = 1.0 - lr * weight_decay

    lane = tl.arange(0, LANES)[None, :]
    broken = tl.zeros((GROUPS,), tl.int32)
    stop = tl.minimum(first + TILES * GROUPS, group_count)
    group = first + tl.arange(0, GROUPS)
    m_expansion = tl.load(m_expansion_ptr + group, group < stop, other=16)
    v_expansion = tl.load(v_expansion_ptr + group, group < stop, other=16)
    for start in tl.range(first, stop, GROUPS, num_stages=STAGES):
        group = start + tl.arange(0, GROUPS)
        inside = group < stop
        # Triton fetches the other operands of later tiles ahead of time, but cannot do that for single bytes.
        ahead = group + GROUPS
        next_m_expansion = tl.load(m_expansion_ptr + ahead, ahead < stop, other=16)
        next_v_expansion = tl.load(v_expansion_ptr + ahead, ahead < stop, other=16)
        if RAGGED:
            line = group // groups_per_row
            column = (group - line * groups_per_row).to(tl.int64) * GROUP_SIZE
            offset = (line.to(tl.int64) * columns + column)[:, None] + lane
            mask = inside[:, None] & (lane < tl.minimum(columns - column, GROUP_SIZE)[:, None])
        else:
            offset = (group.to(tl.int64) * LANES)[:, None] + lane
            mask = inside[:, None]

        p = tl.load(param_ptr + offset, mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + offset, mask, other=0.0).to(tl.float32)
        m_codes = tl.load(m_ptr + offset, mask, other=0.0)
        m_scale = tl.load(m_scale_ptr + group, inside, other=0.0)
        v_codes = tl.load(v_ptr + offset, mask, other=0.0)
        v_scale = tl.load(v_scale_ptr + group, inside, other=0.0)

        m = _decode(m_codes, beta1 * m_scale, m_expansion, EXPAND, False) + rest1 * g
        v = _decode(v_codes, beta2 * v_scale, v_expansion, EXPAND, True) + rest2 * g * g
        # As uint32 magnitudes are ordered, with inf and NaN on top. (A NaN may have a sign, also in v.)
        m_bits = m.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        v_bits = v.to(tl.uint32, bitcast=True)
        m_amax = tl.max(m_bits, axis=1)
        v_amax = tl.max(v_bits, axis=1)
        finite = tl.maximum(m_amax, v_amax) < INFINITE
        broken += (inside & (finite == 0)).to(tl.int32)
        inside = inside & finite
        mask = mask & finite[:, None]

        p = p * decay - step_size * m * _reciprocal(tl.sqrt(v) * inverse_correction + eps)
        tl.store(param_ptr + offset, to_float(p, PARAM), mask)
        m_codes, m_scale, m_expansion = _encode(m, m_bits, m_amax, EXPAND, False)
        tl.store(m_ptr + offset, m_codes, mask)
        tl.store(m_scale_ptr + group, m_scale, inside)
        tl.store(m_expansion_ptr + group, m_expansion, inside)
        v_codes, v_scale, v_expansion = _encode(v, v_bits, v_amax, EXPAND, True)
        tl.store(v_ptr + offset, v_codes, mask)
        tl.store(v_scale_ptr + group, v_scale, inside)
        tl.store(v_expansion_ptr + group, v_expansion, inside)
        m_expansion, v_expansion = next_m_expansion, next_v_expansion
    count = tl.sum(broken)
    if count > 0:
        tl.atomic_add(skipped, count.to(tl.int64))


_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _launch(rows, skipped, lr, steps, beta1, beta2, eps, weight_decay, group_size, expand, kind):
    """Step parameters of one ``kind``; ``rows`` is their part of the table up to GROUPS_PER_ROW, as lists."""
    param_dtype, grad_dtype, lanes, ragged, aligned = kind
    groups = min(max(1, TILE // lanes), MOST_GROUPS)
    programs = 0
    for row in rows:
        row.append(programs)
        programs += -(-row[GROUP_COUNT.value] // (groups * TILES))
        row += [0] * (WIDTH.value - SCALARS.value)
    host = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=skipped.is_cuda)
    scalars = host.view(torch.float32)[:, 2 * SCALARS.value :]
    steps = torch.stack(steps).flatten().double()
    if not lr.is_cuda:
        scalars[:, 0] = lr.item()
    scalars[:, 1] = 1 / (1 - beta1**steps)
    scalars[:, 2] = (1 - beta2**steps).rsqrt()
    table = host.to(skipped.device, non_blocking=True)
    scalars = table.view(torch.float32)
    if lr.is_cuda:
        scalars[:, 2 * SCALARS.value] = lr
    _adamw_kernel[(programs,)](
        table, scalars, len(rows), skipped, beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay,
        PARAM=_TRITON_DTYPES[param_dtype], GRAD=_TRITON_DTYPES[grad_dtype], GROUP_SIZE=group_size, EXPAND=expand,
        RAGGED=ragged, ALIGNMENT=VECTOR if aligned else 1, GROUPS=groups, LANES=lanes, TILES=TILES, STAGES=STAGES,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def adamw_step(
    params, grads, exp_avgs, exp_avg_scales, exp_avg_expansions, exp_avg_sqs, exp_avg_sq_scales, exp_avg_sq_expansions,
    steps, skipped, lr, beta1, beta2, eps, weight_decay, group_size, expand,
):  # fmt: skip
    kinds = defaultdict(lambda: ([], []))
    kept = []  # copies of what is not contiguous, alive until the launches are queued
    moments = (exp_avgs, exp_avg_scales, exp_avg_expansions, exp_avg_sqs, exp_avg_sq_scales, exp_avg_sq_expansions)
    for param, grad, step, *state in zip(params, grads, steps, *moments, strict=True):
        count = param.numel()
        if count == 0:
            continue
        dense, grad = param.contiguous(), grad.contiguous()
        kept.append((param, dense, grad))
        columns = param.shape[-1] if param.dim() else 1
        groups_per_row = -(-columns // group_size)
        lanes = 1 << (min(columns, group_size) - 1).bit_length()
        ragged = bool(columns % lanes) or (groups_per_row > 1 and lanes != group_size)
        pointers = [tensor.data_ptr() for tensor in (dense, grad, *state)]
        values = pointers[0] | pointers[1] | pointers[2] | pointers[5]
        aligned = values % VECTOR == 0 and (not ragged or columns % VECTOR == 0)
        rows, row_steps = kinds[param.dtype, grad.dtype, lanes, ragged, aligned]
        rows.append([*pointers, count // columns * groups_per_row, columns, groups_per_row])
        row_steps.append(step)
    with torch.cuda.device_of(skipped):
        for kind, (rows, row_steps) in kinds.items():
            _launch(rows, skipped, lr, row_steps, beta1, beta2, eps, weight_decay, group_size, expand, kind)
    for param, dense, _ in kept:
        if dense is param:
            torch.autograd.graph.increment_version(param)  # a kernel's writes are invisible to autograd
        else:
            param.copy_(dense)

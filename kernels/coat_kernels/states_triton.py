"""What the Triton optimizer steps share: states.py's formats on a tile, BF16 weights, and one launch for many tensors.

The groups of a parameter are numbered row by row; a tile is [GROUPS, LANES] values, a program takes up to TILES
successive tiles of one parameter, and the programs of all parameters make one grid. Where a program's parameter lies
and how large it is, the program reads from a table with one row per parameter, which is kept from step to step; from
a second one what changes with the step.

With BF16 parameters and gradients ten bytes move per value (the gradient in; the parameter and two codes in and out).
At the speed of an H200's memory that leaves time for some 75 instructions per value, nine of them of the slow kind
(log2, exp2, roots, quotients). ``lean`` needs 47 and three slow ones, nine to twelve more where weights are rounded by
chance or have a master. Expansion needs a log2 and an exp2 to decode each moment and a log2 to encode it, and the step
two more: eight of the slow kind, with what a group needs, and 57 in all. The exp2 of the encoding is none: only the
code counts, and that comes from a table in the registers of a warp.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .states import StateFormat, Weights, hashed, mixed
from .tables_triton import TRITON_DTYPES, on_device
from .tiles_triton import INTERPRETED, amax_bits, fast_reciprocal, to_float, to_fp8

# The columns of the table, int64; the last one is what tables_triton.find_row reads.
POINTERS = tl.constexpr(0)  # param, grad, residual; codes, scales, expansions of each moment
GROUP_COUNT = tl.constexpr(9)
COLUMNS = tl.constexpr(10)  # values in a row of the parameter
GROUPS_PER_ROW = tl.constexpr(11)
NUMBER = tl.constexpr(12)  # of the parameter among those that are stepped
FIRST_PROGRAM = tl.constexpr(13)
WIDTH = tl.constexpr(14)
# The columns of the scalars, float32: lr, 1 / (1 - beta1**step), 1 / sqrt(1 - beta2**step), the bits of the key.
SCALARS = tl.constexpr(4)


class Cut(NamedTuple):
    """How a program takes its groups.

    Args:
        tile: Values of a tile, at least a group.
        stages: Tiles in flight in one program.
        halves: Load the halves of a group apart, so that 16 values of it come to one thread, in two pieces of 16 bytes
            of BF16, and none changes its thread. What concerns a group (maxima, logarithms, quotients) is then
            computed half as often.
        registers: That a thread may have, fewer for more programs at once; None for what the compiler takes.
    """

    tile: int
    stages: int
    halves: bool
    registers: int | None = None


# The fastest on an H200: expansion, which does most for each group, gains by halves; the others wait for memory alone.
CUTS = {
    StateFormat.LEAN: Cut(256, 1, False),
    StateFormat.PAPER: Cut(512, 3, True, 96),
    StateFormat.E4M3: Cut(256, 1, False),
}
LEAST_HALVED = 16  # a group of fewer values is left whole
WARPS = 1  # needs no barriers, and so many programs fit that some compute while others load
MOST_GROUPS = 64  # in a tile of short groups: each thread keeps side data of its groups
TILES = 16
VECTOR = 16  # bytes of the widest memory access

NORMAL = tl.constexpr(0x00800000)  # bits of 2**-126
INFINITE = tl.constexpr(0x7F800000)
SIGN = tl.constexpr(0x80000000)
LARGEST = tl.constexpr(448.0)
LOG2_LARGEST = tl.constexpr(8.807354922057604)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: added to a small number, leaves its nearest integer in the low bits

LEAN = tl.constexpr(0)
PAPER = tl.constexpr(1)
E4M3 = tl.constexpr(2)
FORMATS = {StateFormat.LEAN: LEAN.value, StateFormat.PAPER: PAPER.value, StateFormat.E4M3: E4M3.value}
NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
MASTER = tl.constexpr(2)
WEIGHTS = {Weights.NEAREST: NEAREST.value, Weights.STOCHASTIC: STOCHASTIC.value, Weights.MASTER: MASTER.value}


# --- arithmetic: one instruction each on the GPU, where the ordinary functions are several


@triton.jit
def fast_log2(x):
    """log2 of float32 ``x >= 0``, -inf below 2**-126. One instruction; tl.log2 is some twenty, for one bit more."""
    if INTERPRETED:
        smallest: tl.constexpr = 2.0**-126
        return tl.where(x < smallest, float("-inf"), tl.log2(tl.maximum(x, smallest)))
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def fast_sqrt(x):
    """Root of float32 ``x >= 0``, zero below 2**-126."""
    if INTERPRETED:
        smallest: tl.constexpr = 2.0**-126
        return tl.where(x < smallest, 0.0, tl.sqrt(x))
    else:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def fast_rsqrt(x):
    """1 / root of normal float32 ``x > 0``."""
    if INTERPRETED:
        return 1.0 / tl.sqrt(tl.maximum(x, 1.1754943508222875e-38))
    else:
        return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _one_or_zero(x):
    """1 for ``x`` of 2**-64 and more, 0 for zero: without a predicate, of which a thread has few."""
    if INTERPRETED:
        return tl.minimum(x * 1.8446744073709552e19, 1.0)
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.ftz.sat.f32 $0, $1, 0f5F800000;", "=r,r", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _bend(part):
    """What makes exponents and mantissas of a logarithm, for one of the 32 parts of a binade; see :func:`code_exp2`.

    E4M3 parts numbers at ``2**n * (1 + k/16)``, 0 < k < 16 (its subnormal ones at some of these). No part of a binade
    has two of these. Numbers of a part move by as much as puts its own, or else the nearest, exactly where it is.
    """
    middle = part.to(tl.float32) * (1.0 / 32) + 1.0 / 64
    k = (tl.exp2(middle) * 16.0 + (ROUND - 16.0)) - ROUND
    moved = k * (1.0 / 16) - fast_log2(k * (1.0 / 16) + 1.0)
    # Beside it what turns the exponent field of code_exp2's number, 5 bits to the left, into that of its result.
    return (moved * 8388608.0 + ROUND).to(tl.int32, bitcast=True) + (0x44000000 - 0x4B400000)


@triton.jit
def bends():
    """:func:`_bend` of the part that has the number of this thread among its 32; a scalar."""
    if INTERPRETED:
        return 0
    else:
        lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], tl.int32, is_pure=True, pack=1)
        return _bend(lane)


@triton.jit
def code_exp2(x, factor, summand, table):
    """A number that rounds to the E4M3 code of ``2**(x * factor + summand)``, an exponent between -23 and 9; zero for
    ``x`` of -inf. ``table``: :func:`bends`.

    The bits of 1 + (exponent + 23) / 32, 5 to the left, are those of a float whose exponent is right, and whose
    mantissa is the fraction f of the exponent in place of 2**f - 1. That differs by up to 0.09; but it is right at the
    bounds between codes, after the other threads have told how much to add in which 32nd of the binade.
    """
    u = (x * (factor * (1.0 / 32)) + (summand * (1.0 / 32) + (1.0 + 23.0 / 32))).to(tl.uint32, bitcast=True)
    part = (u >> 13).to(tl.int32, bitcast=True)
    if INTERPRETED:
        bend = _bend(part & 31)
    else:  # which reads the lowest five bits
        bend = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [table, part], tl.int32, is_pure=True, pack=1
        )
    return ((u << 5) + bend.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _with_sign(x, y):
    """``x >= 0`` with the sign of ``y``."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True) | (y.to(tl.uint32, bitcast=True) & SIGN)
        return bits.to(tl.float32, bitcast=True)
    else:  # which the compiler would at times make a comparison, a negation and a choice of
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0x80000000, 0xF8;", "=r,r,r", [x, y], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _unsigned(codes):
    """Float32 values of uint8 codes: the bits of 2**23 + code, less 2**23."""
    return (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _signed(codes):
    """Float32 values, 2**24 times too large, of the int8 numbers whose bits are uint8 codes."""
    return (codes.to(tl.uint32) << 24).to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def _to_byte(x):
    """Float32 ``x`` rounded to the nearest integer, which lies within 2**22, in the low byte of an int32."""
    return (x + ROUND).to(tl.int32, bitcast=True)


# --- E4M3, with and without expansion


@triton.jit
def decode_e4m3(codes, scale, expansion, EXPAND: tl.constexpr, POSITIVE: tl.constexpr):
    """``scale * sign(q) * (|q| / 448)**(16 / expansion)`` of codes [GROUPS, LANES]; scale and expansion [GROUPS]."""
    q = codes.to(tl.float32)
    if EXPAND:
        inverse = 16.0 * fast_reciprocal(_unsigned(expansion))
        x = tl.exp2(fast_log2(tl.abs(q)) * inverse[:, None] - (inverse * LOG2_LARGEST)[:, None])
        return scale[:, None] * (x if POSITIVE else _with_sign(x, q))
    else:
        return q * (scale * (1.0 / LARGEST))[:, None]


@triton.jit
def encode_e4m3(x, bits, amax_bits, table, EXPAND: tl.constexpr, POSITIVE: tl.constexpr):
    """What to round to codes [GROUPS, LANES], scale and expansion [GROUPS] of finite ``x``, given the bits of |x| and
    their maxima; ``table``: :func:`bends`."""
    empty = amax_bits < NORMAL
    scale = tl.where(empty, 0, amax_bits).to(tl.float32, bitcast=True)
    magnitude = bits.to(tl.float32, bitcast=True)
    expansion = tl.full(scale.shape, 16.0, tl.float32)
    if EXPAND:
        # Counted from NORMAL, the bits of smaller numbers wrap around to the top, out of the way of the minimum.
        smallest = (tl.min(bits - NORMAL, axis=1) + NORMAL).to(tl.float32, bitcast=True)
        log_scale = tl.where(empty, 0.0, fast_log2(scale))
        bits_of_range = tl.maximum(log_scale - fast_log2(smallest), 1.0)  # 1.04 gives 255 already
        chosen = 265.83535750584334 * fast_reciprocal(bits_of_range)  # 16 * log2(448**2 / 2)
        chosen = (chosen - 0.49999 + ROUND) - ROUND  # rounded down, where it is not 1e-5 below the next integer
        expansion = tl.where(empty, expansion, tl.minimum(tl.maximum(chosen, 1.0), 255.0))
        power = expansion * 0.0625
        summand = (power * -log_scale + LOG2_LARGEST)[:, None]
        y = code_exp2(fast_log2(magnitude), power[:, None], summand, table)
    else:
        y = magnitude * (fast_reciprocal(tl.where(empty, 1.0, scale)) * LARGEST)[:, None]
        y = tl.where(bits < NORMAL, 0.0, tl.maximum(y, 2.0**-9) if POSITIVE else y)
    if not POSITIVE:
        y = _with_sign(y, x)
    return y, scale, _to_byte(expansion)


# --- lean


@triton.jit
def decode_roots(codes, scale):
    """``scale * (c / 255)**2``: roots of second moments [GROUPS, LANES]; scale [GROUPS]."""
    c = _unsigned(codes)
    return c * c * (scale * (1.0 / 65025.0))[:, None]


@triton.jit
def decode_ratios(codes, scale):
    """``scale * q / 127``: first moments [GROUPS, LANES] over the decoded roots of the second ones; scale [GROUPS]."""
    return _signed(codes) * (scale * (2.0**-24 / 127.0))[:, None]


@triton.jit
def encode_roots(roots, scale):
    """Codes [GROUPS, LANES] of second moments, given their roots, 2**-64 or more or zero, and the largest [GROUPS]."""
    inverse = 65025.0 * fast_reciprocal(tl.where(scale > 0.0, scale, 1.0))
    return _to_byte(tl.maximum(fast_sqrt(roots * inverse[:, None]), _one_or_zero(roots)))


@triton.jit
def encode_ratios(ratios, amax_bits):
    """Codes [GROUPS, LANES] and scale [GROUPS] of first moments over roots of second ones; bits of maxima."""
    scale = tl.where(amax_bits < NORMAL, 0, amax_bits).to(tl.float32, bitcast=True)
    inverse = 127.0 * fast_reciprocal(tl.where(amax_bits < NORMAL, 1.0, scale))
    return _to_byte(ratios * inverse[:, None]), scale


@triton.jit
def decode_companded(codes, scale):
    """``scale * q |q| / 127**2`` of codes [GROUPS, LANES]; scale [GROUPS]."""
    q = _signed(codes) * 2.0**-24
    return q * tl.abs(q) * (scale * (1.0 / 16129.0))[:, None]


@triton.jit
def encode_companded(x, bits, amax_bits):
    """Codes [GROUPS, LANES] and scale [GROUPS] of finite ``x``, given the bits of |x| and their maxima."""
    empty = amax_bits < NORMAL
    scale = tl.where(empty, 0, amax_bits).to(tl.float32, bitcast=True)
    inverse = 16129.0 * fast_reciprocal(tl.where(empty, 1.0, scale))
    return _to_byte(_with_sign(fast_sqrt(bits.to(tl.float32, bitcast=True) * inverse[:, None]), x)), scale


# --- weights


@triton.jit
def read_weights(param, residual, MODE: tl.constexpr):
    """Float32 weights of a tile of a parameter; ``residual``, int32 from int8, counts with MASTER alone."""
    p = param.to(tl.float32)
    if MODE == MASTER:
        magnitude = tl.maximum((p.to(tl.int32, bitcast=True) & 0x7FFFFFFF) + (residual << 8), 0)
        p = _with_sign(magnitude.to(tl.float32, bitcast=True), p)
    return p


@triton.jit
def _mixed(offset, key):
    return offset.to(tl.uint32) * 0x9E3779B1 + (offset >> 32).to(tl.uint32) * 0x85EBCA77 + key


@triton.jit
def chances(key, group, offset, RAGGED: tl.constexpr, LANES: tl.constexpr, HALVES: tl.constexpr):
    """What STOCHASTIC rounding of a tile hashes, uint32: ``mixed`` of each value's index in its parameter, plus key.

    ``offset`` is of :func:`locate`. If no group is RAGGED, no 2**32 lies inside of one.
    """
    HALF: tl.constexpr = offset.shape[1]
    if RAGGED:
        x = _mixed(offset, key)
        return both(x, _mixed(offset + HALF, key)) if HALVES else x
    else:
        lane = tl.arange(0, HALF)[None, :].to(tl.uint32)
        first = _mixed(group.to(tl.int64) * LANES, key)[:, None]
        x = first + lane * 0x9E3779B1
        return both(x, first + (lane + HALF) * 0x9E3779B1) if HALVES else x


@triton.jit
def round_weights(p, chance, MODE: tl.constexpr):
    """Float32 weights as a parameter keeps them: float32, to be rounded to nearest, or else BF16 with the residuals in
    the low byte of an int32. ``chance``: :func:`chances`, which count with STOCHASTIC."""
    residual = 0
    # A GPU's NaN has all bits but the sign, to which nothing can be added.
    bits = tl.minimum(p.to(tl.int32, bitcast=True), 0x7FC00000).to(tl.uint32, bitcast=True)
    if MODE == STOCHASTIC:
        x = (chance ^ (chance >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        p = _upper_half(bits + ((x ^ (x >> 16)) >> 16))
    elif MODE == MASTER:
        bits += 0x80  # also of a negative number: it is the magnitude that grows
        residual = (bits >> 8).to(tl.int32, bitcast=True)
        p = _upper_half(bits + 0x8000)
    return p, residual


@triton.jit
def _upper_half(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def largest_bits(rounded, param, finite):
    """Bits of the largest magnitude in each group of a tile: of what :func:`round_weights` gave, or, where a group is
    not finite, of ``param``, which stays. What is masked is zero in both."""
    return amax_bits(tl.where(finite[:, None], rounded.to(tl.float32), param), 1)


@triton.jit
def raise_amax(pointer, largest, PARAM: tl.constexpr):
    """Raise the bits at ``pointer`` to the largest of :func:`largest_bits`. A maximum of integers has no order, and
    rounding to PARAM keeps theirs: where weights are rounded to nearest that is still to be done."""
    bits = tl.max(largest)
    if PARAM == tl.bfloat16:  # by hand: to_float takes two numbers or more
        bits = tl.where(bits > INFINITE, bits, (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)
    tl.atomic_max(pointer, bits, sem="relaxed")


# --- one launch for many parameters


@triton.jit
def locate(
    group, inside, columns, groups_per_row, GROUP_SIZE: tl.constexpr, RAGGED: tl.constexpr, LANES: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Offsets, int64, of the first half of each group in a tile, and the masks of both; the second half is
    LANES / 2 further. Without HALVES of the whole group, twice. RAGGED: some groups have fewer than LANES values."""
    HALF: tl.constexpr = LANES // 2 if HALVES else LANES
    lane = tl.arange(0, HALF)[None, :]
    if RAGGED:
        line = group // groups_per_row
        column = (group - line * groups_per_row).to(tl.int64) * GROUP_SIZE
        offset = (line.to(tl.int64) * columns + column)[:, None] + lane
        end = tl.minimum(columns - column, GROUP_SIZE)[:, None]
        mask = inside[:, None] & (lane < end)
        second = inside[:, None] & (lane + HALF < end)
    else:
        offset = (group.to(tl.int64) * LANES)[:, None] + lane
        mask = inside[:, None]
        second = mask
    return offset, mask, second


@triton.jit
def both(x, y):
    """A tile [GROUPS, LANES] of the first halves ``x`` of groups and the second ones ``y``, value by value in turns.

    What one thread has of both is of one group, so that it computes what concerns a group half as often.
    """
    return tl.join(x, y).reshape(x.shape[0], 2 * x.shape[1])


@triton.jit
def load(pointer, offset, mask, second, other, WIDE: tl.constexpr, HALVES: tl.constexpr):
    """A tile [GROUPS, LANES] as WIDE from what :func:`locate` returned; ``other`` is what is masked."""
    x = tl.load(pointer + offset, mask, other=other).to(WIDE)
    if HALVES:
        x = both(x, tl.load(pointer + offset.shape[1] + offset, second, other=other).to(WIDE))
    return x


@triton.jit
def store(pointer, offset, x, mask, second, HALVES: tl.constexpr):
    """The inverse of :func:`load`: integers lose their high bytes, and numbers are rounded to nearest."""
    if HALVES:
        x, y = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
        tl.store(pointer + offset.shape[1] + offset, _narrow(y, pointer.dtype.element_ty), second)
    tl.store(pointer + offset, _narrow(x, pointer.dtype.element_ty), mask)


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    if x.dtype == tl.int32:
        narrow = x.to(DTYPE)
    elif x.dtype == DTYPE:
        narrow = x
    elif DTYPE == tl.float8e4nv:
        if INTERPRETED:
            narrow = to_fp8(x, 8)
        else:  # at most 448.1, which rounds to 448: no clamp
            narrow = x.to(DTYPE)
    else:
        narrow = to_float(x, DTYPE)
    return narrow


def _scalars(lr, steps, places, betas, weights, seed, device) -> torch.Tensor:
    """What changes with the step, float32 [parameters, SCALARS]: made where the steps are."""
    where = steps[0].device
    steps = torch.stack(steps).flatten()
    host = torch.zeros(len(steps), SCALARS.value, device=where, pin_memory=where != device)
    beta1, beta2 = betas
    if lr.device in (where, torch.device("cpu")):
        host[:, 0] = lr.item() if lr.device.type == "cpu" else lr
    host[:, 1] = 1 / (1 - beta1 ** steps.double())
    host[:, 2] = (1 - beta2 ** steps.double()).rsqrt()
    if weights is Weights.STOCHASTIC:
        # The kernel counts from the first value that is here. What that one adds to the key makes up for it, in
        # parameters of up to 2**32 values.
        rows = (hashed(n, hashed(seed, 1)) for n, _ in places), (mixed(first) & 0xFFFFFFFF for _, first in places)
        keys, moved = on_device(tuple(map(tuple, rows)), where)
        keys = (hashed(steps.long(), keys) + moved) & 0xFFFFFFFF
        host[:, 3] = (keys - ((keys >> 31) << 32)).int().view(torch.float32)
    scalars = host.to(device, non_blocking=True)
    if lr.device not in (where, torch.device("cpu")):
        scalars[:, 0] = lr
    return scalars


def launch(
    kernel, params, grads, moments, residuals, steps, skipped, lr, betas, constants, group_size, format, weights,
    seed, numbers, firsts, amax,
):  # fmt: skip
    """Step all parameters with one launch of ``kernel`` for those of equal dtypes, width of groups and alignment.

    Args:
        moments: ``(codes, scales, expansions)`` of each moment, the last one empty where the format has none.
        constants: The kernel's float arguments.
        amax: Float32 [parameters] for the largest magnitudes of their new values, or None.
    """
    cut = CUTS[format]
    kinds = defaultdict(lambda: ([], [], []))
    kept = []  # copies of what is not contiguous, alive until the launches are queued
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        count = param.numel()
        if count == 0:
            continue
        mode = Weights.NEAREST if param.dtype == torch.float32 else weights
        dense, grad = param.contiguous(), grad.contiguous()
        kept.append((param, dense, grad))
        columns = param.shape[-1] if param.dim() else 1
        groups_per_row = -(-columns // group_size)
        lanes = 1 << (min(columns, group_size) - 1).bit_length()
        ragged = bool(columns % lanes) or (groups_per_row > 1 and lanes != group_size)
        pointers = [dense.data_ptr(), grad.data_ptr(), residuals[i].data_ptr() if mode is Weights.MASTER else 0]
        for part in moments:
            pointers += [tensors[i].data_ptr() if tensors else 0 for tensors in part]
        values = pointers[0] | pointers[1] | pointers[2] | pointers[3] | (pointers[6] if len(moments) > 1 else 0)
        pointers += [0] * (GROUP_COUNT.value - len(pointers))
        aligned = values % VECTOR == 0 and (not ragged or columns % VECTOR == 0)
        rows, of_rows, places = kinds[param.dtype, grad.dtype, mode, lanes, ragged, aligned]
        rows.append([*pointers, count // columns * groups_per_row, columns, groups_per_row, i])
        of_rows.append(steps[i])
        places.append((numbers[i], firsts[i]))
    bits = None if amax is None else amax.zero_().view(torch.int32)
    with torch.cuda.device_of(skipped):
        for (param_dtype, grad_dtype, mode, lanes, ragged, aligned), (rows, of_rows, places) in kinds.items():
            groups, programs = min(max(1, cut.tile // lanes), MOST_GROUPS), 0
            for row in rows:
                row.append(programs)
                programs += -(-row[GROUP_COUNT.value] // (groups * TILES))
            table = on_device(tuple(map(tuple, rows)), skipped.device)
            scalars = _scalars(lr, of_rows, places, betas, mode, seed, skipped.device)
            kernel[(programs,)](
                table, scalars, len(rows), skipped, bits, *constants,
                PARAM=TRITON_DTYPES[param_dtype], GRAD=TRITON_DTYPES[grad_dtype], GROUP_SIZE=group_size,
                FORMAT=FORMATS[format], MODE=WEIGHTS[mode], RAGGED=ragged, ALIGNMENT=VECTOR if aligned else 1,
                GROUPS=groups, LANES=lanes, TILES=TILES, STAGES=cut.stages,
                HALVES=cut.halves and lanes >= LEAST_HALVED, num_warps=WARPS,
                maxnreg=cut.registers if groups * lanes <= cut.tile else None,
                enable_fp_fusion=True,
            )  # fmt: skip
    for param, dense, _ in kept:
        if dense is param:
            torch.autograd.graph.increment_version(param)  # a kernel's writes are invisible to autograd
        else:
            param.copy_(dense)

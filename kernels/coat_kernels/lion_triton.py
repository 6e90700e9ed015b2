"""The Triton twin of lion.py: one launch steps all parameters of equal dtypes, see states_triton.py."""

import triton
import triton.language as tl

from . import states_triton as shared
from .states import StateFormat, Weights
from .states_triton import (
    COLUMNS,
    FIRST_PROGRAM,
    GROUP_COUNT,
    GROUPS_PER_ROW,
    INFINITE,
    LEAN,
    MASTER,
    NUMBER,
    PAPER,
    POINTERS,
    SCALARS,
    STOCHASTIC,
    WIDTH,
    bends,
    chances,
    decode_companded,
    decode_e4m3,
    encode_companded,
    encode_e4m3,
    largest_bits,
    load,
    locate,
    raise_amax,
    read_weights,
    round_weights,
    store,
)
from .tables_triton import find_row


@triton.jit(do_not_specialize=["parameters"])
def _lion_kernel(
    table, scalars, parameters, skipped,  # int64 [parameters, WIDTH]; float32 [parameters, SCALARS]; int64 [1]
    amax_ptr,  # int32 [of all parameters], or None
    beta1, rest1, beta2, rest2, weight_decay,  # rest = 1 - beta
    PARAM: tl.constexpr, GRAD: tl.constexpr, GROUP_SIZE: tl.constexpr, FORMAT: tl.constexpr, MODE: tl.constexpr,
    RAGGED: tl.constexpr, ALIGNMENT: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One program: the Lion step of up to TILES * GROUPS groups of a parameter. Grid: programs of all parameters."""
    CODES: tl.constexpr = tl.uint8 if FORMAT == LEAN else tl.float8e4nv
    NOTHING: tl.constexpr = 0 if FORMAT == LEAN else 0.0
    WIDE: tl.constexpr = tl.uint32 if FORMAT == LEAN else tl.float32
    pid = tl.program_id(0)
    place = find_row(table, parameters, pid, WIDTH)
    row = table + place * WIDTH
    param_ptr = tl.multiple_of(tl.load(row + POINTERS).to(tl.pointer_type(PARAM)), ALIGNMENT)
    grad_ptr = tl.multiple_of(tl.load(row + POINTERS + 1).to(tl.pointer_type(GRAD)), ALIGNMENT)
    residual_ptr = tl.multiple_of(tl.load(row + POINTERS + 2).to(tl.pointer_type(tl.int8)), ALIGNMENT)
    m_ptr = tl.multiple_of(tl.load(row + POINTERS + 3).to(tl.pointer_type(CODES)), ALIGNMENT)
    scale_ptr = tl.load(row + POINTERS + 4).to(tl.pointer_type(tl.float32))
    expansion_ptr = tl.load(row + POINTERS + 5).to(tl.pointer_type(tl.uint8))
    group_count = tl.load(row + GROUP_COUNT).to(tl.int32)
    columns = tl.multiple_of(tl.load(row + COLUMNS), ALIGNMENT)
    groups_per_row = tl.load(row + GROUPS_PER_ROW).to(tl.int32)
    first = (pid - tl.load(row + FIRST_PROGRAM).to(tl.int32)) * (TILES * GROUPS)
    lr = tl.load(scalars + place * SCALARS)
    key = tl.load(scalars + place * SCALARS + 3).to(tl.uint32, bitcast=True)
    decay = 1.0 - lr * weight_decay

    broken = tl.zeros((GROUPS,), tl.int32)
    largest = tl.zeros((GROUPS,), tl.int32)
    table = bends() if FORMAT == PAPER else 0
    stop = tl.minimum(first + TILES * GROUPS, group_count)
    for start in tl.range(first, stop, GROUPS, num_stages=STAGES):
        group = start + tl.arange(0, GROUPS)
        inside = group < stop
        offset, mask, second = locate(group, inside, columns, groups_per_row, GROUP_SIZE, RAGGED, LANES, HALVES)
        param = load(param_ptr, offset, mask, second, 0.0, tl.float32, HALVES)
        residual = load(residual_ptr, offset, mask, second, 0, tl.int32, HALVES) if MODE == MASTER else 0
        g = load(grad_ptr, offset, mask, second, 0.0, tl.float32, HALVES)
        codes = load(m_ptr, offset, mask, second, NOTHING, WIDE, HALVES)
        scale = tl.load(scale_ptr + group, inside, other=0.0)
        if FORMAT == LEAN:
            m = decode_companded(codes, scale)
        else:
            expansion = tl.full((GROUPS,), 16, tl.uint8)
            if FORMAT == PAPER:
                expansion = tl.load(expansion_ptr + group, inside, other=16)
            m = decode_e4m3(codes, scale, expansion, FORMAT == PAPER, False)
        direction = beta1 * m + rest1 * g
        m = beta2 * m + rest2 * g
        bits = m.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        amax = tl.max(bits, axis=1)
        finite = amax < INFINITE
        broken += (inside & (finite == 0)).to(tl.int32)
        inside = inside & finite
        mask = mask & finite[:, None]
        second = second & finite[:, None]

        p = read_weights(param, residual, MODE) * decay
        p -= tl.where(direction > 0.0, lr, tl.where(direction < 0.0, -lr, 0.0))
        chance = chances(key, group, offset, RAGGED, LANES, HALVES) if MODE == STOCHASTIC else 0
        rounded, residual = round_weights(p, chance, MODE)
        if amax_ptr is not None:
            largest = tl.maximum(largest, largest_bits(rounded, param, finite))
        store(param_ptr, offset, rounded, mask, second, HALVES)
        if MODE == MASTER:
            store(residual_ptr, offset, residual, mask, second, HALVES)
        if FORMAT == LEAN:
            codes, scale = encode_companded(m, bits, amax)
        else:
            codes, scale, expansion = encode_e4m3(m, bits, amax, table, FORMAT == PAPER, False)
            if FORMAT == PAPER:
                tl.store(expansion_ptr + group, expansion, inside)
        store(m_ptr, offset, codes, mask, second, HALVES)
        tl.store(scale_ptr + group, scale, inside)
    count = tl.sum(broken)
    if count > 0:
        tl.atomic_add(skipped, count.to(tl.int64))
    if amax_ptr is not None:
        raise_amax(amax_ptr + tl.load(row + NUMBER), largest, PARAM)


def lion_step(
    params, grads, exp_avgs, exp_avg_scales, exp_avg_expansions, residuals, steps, skipped, lr, beta1, beta2,
    weight_decay, group_size, format, weights, seed, numbers, firsts, amax=None,
):  # fmt: skip
    shared.launch(
        _lion_kernel, params, grads, [(exp_avgs, exp_avg_scales, exp_avg_expansions)], residuals, steps, skipped, lr,
        (beta1, beta2), (beta1, 1 - beta1, beta2, 1 - beta2, weight_decay), group_size, StateFormat(format),
        Weights(weights), seed, numbers, firsts, amax,
    )  # fmt: skip

"""The Triton twin of adamw.py: one launch steps all parameters of equal dtypes, see states_triton.py."""

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
    decode_e4m3,
    decode_ratios,
    decode_roots,
    encode_e4m3,
    encode_ratios,
    encode_roots,
    fast_rsqrt,
    fast_sqrt,
    largest_bits,
    load,
    locate,
    raise_amax,
    read_weights,
    round_weights,
    store,
)
from .tables_triton import find_row
from .tiles_triton import fast_reciprocal


@triton.jit(do_not_specialize=["parameters"])
def _adamw_kernel(
    table, scalars, parameters, skipped,  # int64 [parameters, WIDTH]; float32 [parameters, SCALARS]; int64 [1]
    amax_ptr,  # int32 [of all parameters], or None
    kept1, unit1, kept2, unit2, unit_root, eps, weight_decay,  # unit = 1 - beta, its root; kept = beta / unit, or beta
    PARAM: tl.constexpr, GRAD: tl.constexpr, GROUP_SIZE: tl.constexpr, FORMAT: tl.constexpr, MODE: tl.constexpr,
    RAGGED: tl.constexpr, ALIGNMENT: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One program: the AdamW step of up to TILES * GROUPS groups of a parameter. Grid: programs of all parameters.

    Inside v is in units of 1 - beta2, and so are scales until they are stored: that saves two products for each value.
    In the format "lean" m is in units of 1 - beta1 too; an expansion also counts what is left where m cancels, which
    the other unit would leave elsewhere.

    RAGGED: some groups have fewer than LANES values. ALIGNMENT divides the addresses of values and codes, and where
    RAGGED also the length of a row. HALVES: see :func:`both`.
    """
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
    m_scale_ptr = tl.load(row + POINTERS + 4).to(tl.pointer_type(tl.float32))
    m_expansion_ptr = tl.load(row + POINTERS + 5).to(tl.pointer_type(tl.uint8))
    v_ptr = tl.multiple_of(tl.load(row + POINTERS + 6).to(tl.pointer_type(CODES)), ALIGNMENT)
    v_scale_ptr = tl.load(row + POINTERS + 7).to(tl.pointer_type(tl.float32))
    v_expansion_ptr = tl.load(row + POINTERS + 8).to(tl.pointer_type(tl.uint8))
    group_count = tl.load(row + GROUP_COUNT).to(tl.int32)
    columns = tl.multiple_of(tl.load(row + COLUMNS), ALIGNMENT)
    groups_per_row = tl.load(row + GROUPS_PER_ROW).to(tl.int32)
    first = (pid - tl.load(row + FIRST_PROGRAM).to(tl.int32)) * (TILES * GROUPS)
    scalar = scalars + place * SCALARS
    lr = tl.load(scalar)
    # step_size * m / (root * inverse_correction + eps) is m, in its unit, over slope times the root plus an offset.
    inverse_step = 1.0 / (lr * tl.load(scalar + 1) * (unit1 if FORMAT == LEAN else 1.0))
    moves = lr != 0.0
    slope = tl.where(moves, tl.load(scalar + 2) * unit_root * inverse_step, 0.0)
    least = tl.where(moves, eps * inverse_step, float("inf"))
    key = tl.load(scalar + 3).to(tl.uint32, bitcast=True)
    decay = 1.0 - lr * weight_decay
    smallest = 1.1754943508222875e-38 / unit2  # 2**-126; in LEAN second moments below are zero
    ratio_unit = unit1 / unit_root

    broken = tl.zeros((GROUPS,), tl.int32)
    largest = tl.zeros((GROUPS,), tl.int32)
    table = bends() if FORMAT == PAPER else 0
    stop = tl.minimum(first + TILES * GROUPS, group_count)
    group = first + tl.arange(0, GROUPS)
    m_expansion = tl.full((GROUPS,), 16, tl.uint8)
    v_expansion = m_expansion
    if FORMAT == PAPER:
        m_expansion = tl.load(m_expansion_ptr + group, group < stop, other=16)
        v_expansion = tl.load(v_expansion_ptr + group, group < stop, other=16)
    for start in tl.range(first, stop, GROUPS, num_stages=STAGES):
        group = start + tl.arange(0, GROUPS)
        inside = group < stop
        next_m_expansion = m_expansion
        next_v_expansion = v_expansion
        if FORMAT == PAPER:
            # Triton fetches the other operands of later tiles ahead of time, but cannot do that for single bytes.
            ahead = group + GROUPS
            next_m_expansion = tl.load(m_expansion_ptr + ahead, ahead < stop, other=16)
            next_v_expansion = tl.load(v_expansion_ptr + ahead, ahead < stop, other=16)
        offset, mask, second = locate(group, inside, columns, groups_per_row, GROUP_SIZE, RAGGED, LANES, HALVES)

        param = load(param_ptr, offset, mask, second, 0.0, tl.float32, HALVES)
        residual = load(residual_ptr, offset, mask, second, 0, tl.int32, HALVES) if MODE == MASTER else 0
        g = load(grad_ptr, offset, mask, second, 0.0, tl.float32, HALVES)
        m_codes = load(m_ptr, offset, mask, second, NOTHING, WIDE, HALVES)
        m_scale = tl.load(m_scale_ptr + group, inside, other=0.0)
        v_codes = load(v_ptr, offset, mask, second, NOTHING, WIDE, HALVES)
        v_scale = tl.load(v_scale_ptr + group, inside, other=0.0)

        if FORMAT == LEAN:
            root = decode_roots(v_codes, v_scale)
            m = decode_ratios(m_codes, kept1 * m_scale) * root + g
            v = root * kept2 * root + g * g
            inverse_root = tl.where(v >= smallest, fast_rsqrt(v), 0.0)
            root = v * inverse_root
            ratio = m * inverse_root
            m_amax = tl.max(ratio.to(tl.uint32, bitcast=True) & 0x7FFFFFFF, axis=1)
            v_amax = tl.max(v.to(tl.uint32, bitcast=True), axis=1)  # a NaN may have a sign, and be larger still
        else:
            m = decode_e4m3(m_codes, kept1 * m_scale, m_expansion, FORMAT == PAPER, False) + unit1 * g
            v = decode_e4m3(v_codes, kept2 * v_scale, v_expansion, FORMAT == PAPER, True) + g * g
            # As uint32 magnitudes are ordered, with inf and NaN on top. (A NaN may have a sign, also in v.)
            m_bits = m.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
            v_bits = v.to(tl.uint32, bitcast=True)
            m_amax = tl.max(m_bits, axis=1)
            v_amax = tl.max(v_bits, axis=1)
            root = fast_sqrt(v)
        finite = tl.maximum(m_amax, v_amax) < INFINITE
        broken += (inside & (finite == 0)).to(tl.int32)
        inside = inside & finite
        mask = mask & finite[:, None]
        second = second & finite[:, None]

        p = read_weights(param, residual, MODE)
        p = p * decay - m * fast_reciprocal(root * slope + least)
        chance = chances(key, group, offset, RAGGED, LANES, HALVES) if MODE == STOCHASTIC else 0
        rounded, residual = round_weights(p, chance, MODE)
        if amax_ptr is not None:
            largest = tl.maximum(largest, largest_bits(rounded, param, finite))
        store(param_ptr, offset, rounded, mask, second, HALVES)
        if MODE == MASTER:
            store(residual_ptr, offset, residual, mask, second, HALVES)
        if FORMAT == LEAN:
            m_codes, m_scale = encode_ratios(ratio, m_amax)
            store(m_ptr, offset, m_codes, mask, second, HALVES)
            tl.store(m_scale_ptr + group, m_scale * ratio_unit, inside)
            top = v_amax.to(tl.float32, bitcast=True)
            v_scale = tl.where(top >= smallest, top * fast_rsqrt(top), 0.0)
            v_codes = encode_roots(root, v_scale)
            store(v_ptr, offset, v_codes, mask, second, HALVES)
            tl.store(v_scale_ptr + group, v_scale * unit_root, inside)
        else:
            m_codes, m_scale, m_new = encode_e4m3(m, m_bits, m_amax, table, FORMAT == PAPER, False)
            store(m_ptr, offset, m_codes, mask, second, HALVES)
            tl.store(m_scale_ptr + group, m_scale, inside)
            v_codes, v_scale, v_new = encode_e4m3(v, v_bits, v_amax, table, FORMAT == PAPER, True)
            store(v_ptr, offset, v_codes, mask, second, HALVES)
            tl.store(v_scale_ptr + group, v_scale * unit2, inside)
            if FORMAT == PAPER:
                tl.store(m_expansion_ptr + group, m_new, inside)
                tl.store(v_expansion_ptr + group, v_new, inside)
        m_expansion, v_expansion = next_m_expansion, next_v_expansion
    count = tl.sum(broken)
    if count > 0:
        tl.atomic_add(skipped, count.to(tl.int64))
    if amax_ptr is not None:
        raise_amax(amax_ptr + tl.load(row + NUMBER), largest, PARAM)


def adamw_step(
    params, grads, exp_avgs, exp_avg_scales, exp_avg_expansions, exp_avg_sqs, exp_avg_sq_scales, exp_avg_sq_expansions,
    residuals, steps, skipped, lr, beta1, beta2, eps, weight_decay, group_size, format, weights, seed, numbers, firsts,
    amax=None,
):  # fmt: skip
    moments = (exp_avgs, exp_avg_scales, exp_avg_expansions), (exp_avg_sqs, exp_avg_sq_scales, exp_avg_sq_expansions)
    unit1, unit2 = 1 - beta1, 1 - beta2
    kept1 = beta1 / unit1 if StateFormat(format) is StateFormat.LEAN else beta1
    shared.launch(
        _adamw_kernel, params, grads, moments, residuals, steps, skipped, lr, (beta1, beta2),
        (kept1, unit1, beta2 / unit2, unit2, unit2**0.5, eps, weight_decay), group_size, StateFormat(format),
        Weights(weights), seed, numbers, firsts, amax,
    )  # fmt: skip

"""Estimated mass of blocks for tiles of queries: what to read, and what the rest amounts to.

Owns the second-order estimate of `select/centroid.py` by tiles of rows, the greatest share that any
query of a tile gives a block, and the terms of blocks that are not read: those leave the spread
out, which over a hundred keys of a real model overstates them (`docs/log.md`), and are never above
the mass of the block. Scores are computed again in each pass and never stored. Masses of a choice
are relative to a full block: the log of its size leaves no trace in a share.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LN_2, LOG2_E, LOWEST
from sparse_attn.kernels.prefill_dense import load_rows, softmax_step


@triton.jit
def squares_of(x, scale):
    """(scale x)^2 in the type of x; what float16 cannot hold is cut to what it can."""
    scaled = x.to(tl.float32) * scale
    squares = scaled * scaled
    if x.dtype == tl.float16:
        squares = tl.minimum(squares, 65504.0)
    return squares.to(x.dtype)


@triton.jit
def choice_rows(q, block, g, num_tokens, stride_t, scale, P, P_PADDED, D, BLOCK_M: tl.constexpr):
    """Numbers [BLOCK_M] of a block's rows, which exist, the rows [BLOCK_M, D] and their squares;
    row r is (token r // P_PADDED, head r % P_PADDED).
    """
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // P_PADDED
    head = row % P_PADDED
    is_row = (token < num_tokens) & (head < P)
    offsets = tl.where(is_row, token, 0).to(tl.int64) * stride_t
    x = load_rows(q, offsets + (g * P + tl.where(is_row, head, 0)) * D, is_row, D)
    return row, is_row, x, squares_of(x, scale)


@triton.jit
def load_units(table, first, num_units, D: tl.constexpr, BLOCK_U: tl.constexpr, ALL: tl.constexpr):
    """Rows [BLOCK_U, D] of a table of units from `first`, ALL of which exist, or zeros."""
    unit = first + tl.arange(0, BLOCK_U)
    place = table + unit[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(place) if ALL else tl.load(place, mask=(unit < num_units)[:, None], other=0.0)


@triton.jit
def size_terms(unit, num_slots, BLOCK: tl.constexpr):
    """(log(n / BLOCK), -inf where there is none; sqrt(2 log n)) of units of n slots."""
    size = tl.minimum(num_slots - unit * BLOCK, BLOCK)
    log_size = tl.log(tl.maximum(size, 1).to(tl.float32))
    whole = tl.log(tl.full(unit.shape, BLOCK, tl.float32))
    return tl.where(size > 0, log_size - whole, -float("inf")), tl.sqrt(2.0 * log_size)


@triton.jit
def spread_of(variance, critical):
    """m (sigma - m / 2), m = min(sigma, critical), of what is not negative: variances of scores are
    products of squares.
    """
    sigma = tl.sqrt(variance)
    knee = tl.minimum(sigma, critical)
    return knee * (sigma - 0.5 * knee)


@triton.jit
def add_masses(mass, high, total, LANES: tl.constexpr):
    """Log masses [R, U] taken into running sums total exp2(high), [R, LANES] each.

    Columns 2 l and 2 l + 1 of every 2 LANES go to lane l: where LANES threads share a row of a
    product, as on NVIDIA, each keeps its own sum and nothing is exchanged.
    """
    rows: tl.constexpr = mass.shape[0]
    apart = tl.reshape(mass, (rows, mass.shape[1] // (2 * LANES), LANES, 2))
    new_high = tl.maximum(high, tl.max(tl.max(apart, 3), 1) * LOG2_E)
    weights = tl.exp2(apart * LOG2_E - new_high[:, None, :, None])
    return new_high, total * tl.exp2(high - new_high) + tl.sum(tl.sum(weights, 3), 1)


@triton.jit
def attend_unread_units(
    x, keys, values, flags, num_units, num_slots, scale, high, total, out,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """One term for each unit of a KV head whose flag is 0: n exp(s q.c), with its mean value."""
    log2_whole = tl.log2(tl.full((), BLOCK, tl.float32))
    short = tl.cast(num_slots - (num_units - 1) * BLOCK, tl.float32)
    log2_last = tl.log2(tl.maximum(short, 1.0))
    for first in tl.range(0, num_units, BLOCK_U, num_stages=2):
        unit = first + tl.arange(0, BLOCK_U)
        is_unit = unit < num_units
        is_read = tl.load(flags + unit, mask=is_unit, other=1) != 0
        place = unit[:, None] * D + tl.arange(0, D)[None, :]
        c = tl.load(keys + place, mask=is_unit[:, None], other=0.0)
        value = tl.load(values + place, mask=is_unit[:, None], other=0.0)
        mass = tl.dot(x, tl.trans(c), input_precision="ieee") * (scale * LOG2_E)
        mass += tl.where(unit == num_units - 1, log2_last, log2_whole)[None, :]
        mass = tl.where(is_read[None, :], -float("inf"), mass)
        high, total, out = softmax_step(mass, 1.0, value, high, total, out)
    return high, total, out


@triton.jit
def log_sums_kernel(
    q,
    unit_keys,
    unit_variances,
    log_sums,
    scale,
    num_tokens,
    num_slots,
    num_units,
    stride_qt,
    P: tl.constexpr,
    P_PADDED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """log of the sum over units of n / BLOCK exp(s q.c + m (sigma - m / 2)), for every row, with
    sigma^2 = sum (s q_i)^2 var_i, m = min(sigma, sqrt(2 log n)).

    Grid: (blocks of BLOCK_M rows, G), rows as in `choice_rows`. Only the last units are masked.
    Writes log_sums [G, num_tokens * P_PADDED]. Reads 2 D elements of each unit.
    """
    block = tl.program_id(0)
    g = tl.program_id(1)
    row, _, x, squares = choice_rows(
        q, block, g, num_tokens, stride_qt, scale, P, P_PADDED, D, BLOCK_M
    )
    keys = unit_keys + g.to(tl.int64) * num_units * D
    variances = unit_variances + g.to(tl.int64) * num_units * D
    high = tl.full((BLOCK_M, LANES), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M, LANES), tl.float32)
    whole = num_slots // BLOCK // BLOCK_U * BLOCK_U
    _, critical = size_terms(tl.zeros((1, 1), tl.int32), BLOCK, BLOCK)
    for first in tl.range(0, whole, BLOCK_U, num_stages=STAGES):
        c = load_units(keys, first, num_units, D, BLOCK_U, True)
        var = load_units(variances, first, num_units, D, BLOCK_U, True)
        mass = spread_of(tl.dot(squares, tl.trans(var), input_precision="ieee"), critical)
        mass += tl.dot(x, tl.trans(c), input_precision="ieee") * scale
        high, total = add_masses(mass, high, total, LANES)
    for first in tl.range(whole, num_units, BLOCK_U, num_stages=1):
        c = load_units(keys, first, num_units, D, BLOCK_U, False)
        var = load_units(variances, first, num_units, D, BLOCK_U, False)
        less, knees = size_terms((first + tl.arange(0, BLOCK_U))[None, :], num_slots, BLOCK)
        mass = spread_of(tl.dot(squares, tl.trans(var), input_precision="ieee"), knees)
        mass += tl.dot(x, tl.trans(c), input_precision="ieee") * scale + less
        high, total = add_masses(mass, high, total, LANES)
    top = tl.max(high, 1)
    total = tl.sum(total * tl.exp2(high - top[:, None]), 1)
    own = log_sums + g.to(tl.int64) * num_tokens * P_PADDED
    tl.store(own + row, (top + tl.log2(total)) * LN_2, mask=row < num_tokens * P_PADDED)


@triton.jit
def greatest_shares_kernel(
    q,
    unit_keys,
    unit_variances,
    log_sums,
    log_shares,
    scale,
    num_tokens,
    num_slots,
    num_units,
    num_runs,
    stride_qt,
    G: tl.constexpr,
    P: tl.constexpr,
    P_PADDED: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    STAGES: tl.constexpr,
):
    """log of the greatest share of a unit over runs of ROWS rows: max_r mass[r, u] - log_sum[r],
    masses as in `log_sums_kernel`.

    Grid: (blocks of BLOCK_M rows, G), rows as in `choice_rows`, so that runs do not straddle
    blocks; rows of no head or token never win. Units are the rows of the products: what is compared
    lies along them, mostly within a thread. Writes log_shares [num_runs, G, num_units], -inf for a
    run without rows. Reads 2 D elements of each unit.
    """
    block = tl.program_id(0)
    g = tl.program_id(1)
    row, is_row, x, squares = choice_rows(
        q, block, g, num_tokens, stride_qt, scale, P, P_PADDED, D, BLOCK_M
    )
    keys = unit_keys + g.to(tl.int64) * num_units * D
    variances = unit_variances + g.to(tl.int64) * num_units * D
    own = log_sums + g.to(tl.int64) * num_tokens * P_PADDED
    sums = tl.load(own + row, mask=is_row, other=float("inf"))[None, :]
    run = block * (BLOCK_M // ROWS) + tl.arange(0, BLOCK_M // ROWS)
    is_run = (run < num_runs)[None, :]
    at = log_shares + (run[None, :].to(tl.int64) * G + g) * num_units
    by_run: tl.constexpr = (BLOCK_U, BLOCK_M // ROWS, ROWS)
    whole = num_slots // BLOCK // BLOCK_U * BLOCK_U
    _, critical = size_terms(tl.zeros((1, 1), tl.int32), BLOCK, BLOCK)
    for first in tl.range(0, whole, BLOCK_U, num_stages=STAGES):
        c = load_units(keys, first, num_units, D, BLOCK_U, True)
        var = load_units(variances, first, num_units, D, BLOCK_U, True)
        share = spread_of(tl.dot(var, tl.trans(squares), input_precision="ieee"), critical) - sums
        share += tl.dot(c, tl.trans(x), input_precision="ieee") * scale
        unit = first + tl.arange(0, BLOCK_U)[:, None]
        tl.store(at + unit, tl.max(tl.reshape(share, by_run), 2), mask=is_run)
    for first in tl.range(whole, num_units, BLOCK_U, num_stages=1):
        c = load_units(keys, first, num_units, D, BLOCK_U, False)
        var = load_units(variances, first, num_units, D, BLOCK_U, False)
        unit = first + tl.arange(0, BLOCK_U)[:, None]
        less, knees = size_terms(unit, num_slots, BLOCK)
        share = spread_of(tl.dot(var, tl.trans(squares), input_precision="ieee"), knees) - sums
        share += tl.dot(c, tl.trans(x), input_precision="ieee") * scale + less
        most = tl.max(tl.reshape(share, by_run), 2)
        tl.store(at + unit, most, mask=is_run & (unit < num_units))

"""Estimated mass of blocks for tiles of queries: what to read, and what the rest amounts to.

Owns the second-order estimate of `select/centroid.py` by tiles of rows, the greatest share that any
query of a tile gives a block, and the terms of blocks that are not read: those leave the spread
out, which over a hundred keys of a real model overstates them (`docs/log.md`), and are never above
the mass of the block. Scores are computed again in each pass and never stored.
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
def log2_sizes(unit, num_slots, BLOCK: tl.constexpr):
    """log2 of the slots of each unit, 0 where there is none."""
    return tl.log2(tl.minimum(BLOCK, tl.maximum(num_slots - unit * BLOCK, 1)).to(tl.float32))


@triton.jit
def score_units_tile(
    x, squares, keys, variances, first, num_units, num_slots, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Estimated log2 mass [R, BLOCK_U] of units from `first`, -inf where there is none:
    log n + s q.c + m (sigma - m / 2), sigma^2 = sum (s q_i)^2 var_i, m = min(sigma, sqrt(2 log n)).
    """
    unit = first + tl.arange(0, BLOCK_U)
    is_unit = unit < num_units
    place = unit[:, None] * D + tl.arange(0, D)[None, :]
    c = tl.load(keys + place, mask=is_unit[:, None], other=0.0)
    var = tl.load(variances + place, mask=is_unit[:, None], other=0.0)
    log2_size = log2_sizes(unit, num_slots, BLOCK)
    critical = tl.sqrt(log2_size * (2.0 * LN_2))
    # Products of what is not negative: nothing below zero reaches the root.
    sigma = tl.sqrt(tl.dot(squares, tl.trans(var), input_precision="ieee"))
    linear = tl.dot(x, tl.trans(c), input_precision="ieee")
    knee = tl.minimum(sigma, critical[None, :])
    mass = log2_size[None, :] + linear * (scale * LOG2_E)
    mass += knee * (sigma - 0.5 * knee) * LOG2_E
    return tl.where(is_unit[None, :], mass, -float("inf"))


@triton.jit
def attend_unread_units(
    x, keys, values, flags, num_units, num_slots, scale, high, total, out,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """One term for each unit of a KV head whose flag is 0: n exp(s q.c), with its mean value."""
    for first in tl.range(0, num_units, BLOCK_U, num_stages=2):
        unit = first + tl.arange(0, BLOCK_U)
        is_unit = unit < num_units
        is_read = tl.load(flags + unit, mask=is_unit, other=1) != 0
        place = unit[:, None] * D + tl.arange(0, D)[None, :]
        c = tl.load(keys + place, mask=is_unit[:, None], other=0.0)
        value = tl.load(values + place, mask=is_unit[:, None], other=0.0)
        mass = tl.dot(x, tl.trans(c), input_precision="ieee") * (scale * LOG2_E)
        mass += log2_sizes(unit, num_slots, BLOCK)[None, :]
        mass = tl.where(is_read[None, :], -float("inf"), mass)
        high, total, out = softmax_step(mass, 1.0, value, high, total, out)
    return high, total, out


@triton.jit
def greatest_shares_kernel(
    q,
    unit_keys,
    unit_variances,
    log_shares,
    scale,
    num_tokens,
    num_slots,
    num_units,
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
    """log2 of the greatest share of a unit over runs of ROWS rows: max_r mass[r, u] - lse[r].

    Grid: (blocks of BLOCK_M rows, G); row r is (token r // P_PADDED, head r % P_PADDED), so that
    runs do not straddle blocks; rows of no head or token never win. Two passes over the units: the
    log-sum-exp of each row, then the shares. Writes log_shares [rows / ROWS, G, num_units]. Reads
    4 D elements of each unit.
    """
    block = tl.program_id(0)
    g = tl.program_id(1)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // P_PADDED
    head = row % P_PADDED
    is_row = (token < num_tokens) & (head < P)
    offsets = tl.where(is_row, token, 0).to(tl.int64) * stride_qt
    x = load_rows(q, offsets + (g * P + tl.where(is_row, head, 0)) * D, is_row, D)
    squares = squares_of(x, scale)
    keys = unit_keys + g.to(tl.int64) * num_units * D
    variances = unit_variances + g.to(tl.int64) * num_units * D
    high = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, num_units, BLOCK_U, num_stages=STAGES):
        mass = score_units_tile(
            x, squares, keys, variances, first, num_units, num_slots, scale, D, BLOCK, BLOCK_U
        )
        new_high = tl.maximum(high, tl.max(mass, 1))
        total = total * tl.exp2(high - new_high) + tl.sum(tl.exp2(mass - new_high[:, None]), 1)
        high = new_high
    lse = tl.where(is_row, high + tl.log2(total), float("inf"))
    run = block * (BLOCK_M // ROWS) + tl.arange(0, BLOCK_M // ROWS)
    at = log_shares + (run[:, None].to(tl.int64) * G + g) * num_units
    for first in tl.range(0, num_units, BLOCK_U, num_stages=STAGES):
        mass = score_units_tile(
            x, squares, keys, variances, first, num_units, num_slots, scale, D, BLOCK, BLOCK_U
        )
        shares = tl.reshape(mass - lse[:, None], (BLOCK_M // ROWS, ROWS, BLOCK_U))
        unit = first + tl.arange(0, BLOCK_U)
        is_stored = (unit < num_units)[None, :] & (run * ROWS < num_tokens * P_PADDED)[:, None]
        tl.store(at + unit[None, :], tl.max(shares, 1), mask=is_stored)

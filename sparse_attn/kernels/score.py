"""The look-up: estimated mass of units (clusters, groups of clusters) for the queries of a step.

Owns scoring of whole tables by tiles, and of the clusters of opened groups; the formula is the one
of `select/centroid.py`. Queries are scaled by a power of two so that they and their squares fit
half precision, which the tables have; the scale is taken back exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import address, log_sum, rows_at
from sparse_attn.kernels.early import take_turn

TILE_UNITS = 128
TILE_MEMBERS = 64  # of opened groups
LOW = tl.constexpr(2048.0)  # what the low part of a half is multiplied by


@triton.jit
def split_half(x):
    """x [R, D] float32 as two halves: the nearest, and 2^11 times what it leaves."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * LOW).to(tl.float16)


@triton.jit
def load_queries(q, q_rows, is_row, scale, D: tl.constexpr):
    """Rows of q and their squares in half precision, each in two parts, and what to multiply
    products by: [R].
    """
    columns = tl.arange(0, D)[None, :]
    x = tl.load(q + q_rows[:, None] * D + columns, mask=is_row[:, None], other=0.0).to(tl.float32)
    greatest = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    # The power of two above the greatest element.
    exponent = tl.floor(tl.log2(greatest)) + 1.0
    power = tl.exp2(exponent)
    x = x * tl.exp2(-exponent)[:, None]
    x_high, x_low = split_half(x)
    square_high, square_low = split_half(x * x)
    return x_high, x_low, square_high, square_low, power * scale


@triton.jit
def product(table, high, low):
    """table [N, D] half times rows [R, D] in two parts, [N, R] float32."""
    rest = tl.dot(table, tl.trans(low), input_precision="ieee")
    return tl.dot(table, tl.trans(high), input_precision="ieee") + rest * (1.0 / LOW)


@triton.jit
def score_rows(
    x_high, x_low, square_high, square_low, factor, centroids, variances, sizes, is_unit
):  # fmt: skip
    """Estimated log mass [N, R] of units [N, D] for query rows: log n + s q.c + m (sigma - m / 2),
    sigma^2 = s^2 sum q_i^2 var_i, m = min(sigma, sqrt(2 log n)).
    """
    log_size = tl.log(tl.maximum(sizes, 1).to(tl.float32))
    critical = tl.sqrt(2.0 * log_size)
    linear = product(centroids, x_high, x_low) * factor[None, :]
    square = product(variances, square_high, square_low)
    sigma = tl.sqrt(tl.maximum(square, 0.0)) * factor[None, :]
    knee = tl.minimum(sigma, critical[:, None])
    mass = log_size[:, None] + linear + knee * (sigma - 0.5 * knee)
    return tl.where(is_unit[:, None] & (sizes > 0)[:, None], mass, -float("inf"))


@triton.jit
def score_tile(
    q, tile, tables, log_mass, tile_lse, scale, num_queries, width, num_tiles, block,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of units for a block of rows (query, head of the group), and their sum.

    tile: int32 [4], document * G + KV head, first unit, units, index among the head's; tables:
    int64 [documents, 6], addresses of centroids, variances [G, U, D] half, sizes [G, U] int32, then
    U, and addresses of first slots [G, U] int32 and value sums [G, U, D] half. Writes log_mass [Z,
    P, width] and tile_lse [Z, num_tiles, P]. Reads 4 D bytes of each unit.
    """
    head = tl.load(tile)
    first = tl.load(tile + 1)
    count = tl.load(tile + 2)
    place = tl.load(tile + 3)
    document = head // G
    table = tables + document * 6
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = row // P < num_queries
    problem = (document * num_queries + row // P) * G + head % G
    q_rows = problem * P + row % P
    unit = tl.arange(0, TILE)
    is_unit = unit < count
    at = (head % G) * tl.load(table + 3) + first + unit
    is_loaded = is_unit[:, None]
    c = tl.load(rows_at(address(table, tl.float16), at, D), mask=is_loaded, other=0.0)
    var = tl.load(rows_at(address(table + 1, tl.float16), at, D), mask=is_loaded, other=0.0)
    sizes = tl.load(address(table + 2, tl.int32) + at, mask=is_unit, other=0)
    take_turn(EARLY)
    x, x_low, squares, squares_low, factor = load_queries(q, q_rows, is_row, scale, D)
    mass = score_rows(x, x_low, squares, squares_low, factor, c, var, sizes, is_unit)
    where = q_rows[None, :].to(tl.int64) * width + (first + unit)[:, None]
    tl.store(log_mass + where, mass, mask=is_loaded & is_row[None, :])
    tl.store(tile_lse + (problem * num_tiles + place) * P + row % P, log_sum(mass, 0), mask=is_row)


@triton.jit
def score_members(
    z, tile, first, count, x, x_low, squares, squares_low, factor, centroids, variances, sizes_at,
    starts_at, log_mass, members, tile_lse, num_problems, width, max_tiles,
    P: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Scores of clusters of opened groups, `count` from place `first` on, for one problem's rows.

    members [3, Z, width]: columns of the clusters; writes their sizes and first slots behind,
    log_mass [Z, P, width], and tile_lse [Z, max_tiles, P]. Reads 4 D bytes of each cluster.
    """
    row = tl.arange(0, BLOCK_R)
    is_row = row < P
    unit = first + tl.arange(0, TILE)
    is_unit = tl.arange(0, TILE) < count
    plane = num_problems.to(tl.int64) * width
    member = members + z.to(tl.int64) * width + unit
    at = tl.load(member, mask=is_unit, other=0)
    is_loaded = is_unit[:, None]
    c = tl.load(rows_at(centroids, at, D), mask=is_loaded, other=0.0)
    var = tl.load(rows_at(variances, at, D), mask=is_loaded, other=0.0)
    sizes = tl.load(sizes_at + at, mask=is_unit, other=0)
    starts = tl.load(starts_at + at, mask=is_unit, other=0)
    mass = score_rows(x, x_low, squares, squares_low, factor, c, var, sizes, is_unit)
    where = (z * P + row[None, :]).to(tl.int64) * width + unit[:, None]
    tl.store(log_mass + where, mass, mask=is_loaded & is_row[None, :])
    tl.store(member + plane, sizes, mask=is_unit)
    tl.store(member + 2 * plane, starts, mask=is_unit)
    tl.store(tile_lse + (z * max_tiles + tile) * P + row, log_sum(mass, 0), mask=is_row)

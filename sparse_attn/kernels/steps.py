"""The launches of a `centroid` step that are made of tiles of different kinds: look, open, read.

What they need of each other is one launch apart: between look, open and read the kernel of
`take.py` chooses, and after them that of `merge.py` merges.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import address, fit_queries, span_of, tiles_of_folds
from sparse_attn.kernels.dense import attend_run
from sparse_attn.kernels.early import take_turn
from sparse_attn.kernels.read import estimate_members, estimate_tile, read_tile
from sparse_attn.kernels.score import load_queries, score_members, score_tile


@triton.jit
def look_kernel(
    q, runs, num_runs, visible, tiles, tables, log_mass, tile_lse, part_out, part_lse,
    scale, num_queries, num_parts, width, num_tiles,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attend to the steady keys and score the units that are looked at first.

    Grid: (steady runs and tiles of units, blocks of rows). Everything as in `dense.attend_run` and
    `score.score_tile`.
    """
    item = tl.program_id(0)
    if item < num_runs:
        attend_run(
            q, runs + item * 8, visible, part_out, part_lse, log_mass, scale, num_queries,
            num_parts, 0, tl.program_id(1), G, P, D, KV, BLOCK_R, BLOCK_N, 1, 0, False,
            KV, EARLY,
        )  # fmt: skip
    else:
        score_tile(
            q, tiles + (item - num_runs) * 4, tables, log_mass, tile_lse, scale, num_queries, width,
            num_tiles, tl.program_id(1), G, P, D, BLOCK_R, TILE, EARLY,
        )  # fmt: skip


@triton.jit
def open_kernel(
    q, tiles, tile_first, group_tables, group_mass, tables, packed_bounds, log_mass, members,
    opened_lse, part_out, part_lse,
    scale, num_queries, num_parts, group_width, width, max_opened, base,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE_MEMBERS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Estimate groups that stay closed, and score the clusters of those that are opened.

    Grid: (programs that share a problem, Z). tile_first: int32 [heads + 1], where each head's tiles
    of groups begin. members [Z, width]: the clusters to be opened, cut by packed_bounds [Z, 9].
    """
    z = tl.program_id(1)
    g = z % G
    document = z // (G * num_queries)
    first_tile = tl.load(tile_first + document * G + g)
    num_tiles = tl.load(tile_first + document * G + g + 1) - first_tile
    table = tables + document * 6
    at = g * tl.load(table + 3)
    row = tl.arange(0, BLOCK_R)
    x, x_low, squares, squares_low, factor = load_queries(q, z * P + row, row < P, scale, D)
    centroids = address(table, tl.float16) + at * D
    variances = address(table + 1, tl.float16) + at * D
    take_turn(EARLY)
    from_, to, before, opened = tiles_of_folds(packed_bounds + z * 9, TILE_MEMBERS)
    num_items = num_tiles + tl.sum(opened, 0)
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), num_stages=1):
        if item < num_tiles:
            estimate_tile(
                tiles + (first_tile + item) * 4, z // G % num_queries, group_tables, group_mass,
                part_out, part_lse, num_queries, group_width, base, num_parts, G, P, D, BLOCK_R,
                BLOCK_N, 1,
            )  # fmt: skip
        else:
            tile = item - num_tiles
            first, count = span_of(from_, to, before, opened, tile, TILE_MEMBERS)
            score_members(
                z, tile, first, count, x, x_low, squares, squares_low, factor, centroids, variances,
                address(table + 2, tl.int32) + at, address(table + 4, tl.int32) + at,
                log_mass, members, opened_lse, tl.num_programs(1), width, max_opened,
                P, D, BLOCK_R, TILE_MEMBERS,
            )  # fmt: skip


@triton.jit
def read_kernel(
    q, documents, slots, slot_bounds, scores, tiles, tile_first, tables, members, packed_bounds,
    log_mass, part_out, part_lse,
    scale, num_queries, num_parts, capacity, width, base_read, base_tiles, base_members,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE_READ: tl.constexpr, STAGES: tl.constexpr, TILE: tl.constexpr,
    IS_DEEP: tl.constexpr, KEEPS: tl.constexpr, STORED: tl.constexpr, ESTIMATES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Read the slots that were chosen, and, where ESTIMATES, estimate the clusters that were not.

    Grid: (programs that share a problem, Z). documents: int64 [documents, 3], addresses of k and v
    [N, D] of type STORED (`dense.attend_run`), and of their scales [G, 2]. IS_DEEP: the clusters
    are `members` of opened groups, else those of `tiles`.
    """
    z = tl.program_id(1)
    g = z % G
    document = z // (G * num_queries)
    head = document * G + g
    table = tables + document * 6
    row = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, D)
    at = q + (z * P + row)[:, None] * D + columns[None, :]
    x = tl.load(at, mask=(row < P)[:, None], other=0.0)
    keys = address(documents + document * 3, STORED)
    values = address(documents + document * 3 + 1, STORED)
    value_scale = 1.0
    if STORED == KV:
        x = x.to(KV)
    else:
        x, power = fit_queries(x, KV, STORED)
        scales = address(documents + document * 3 + 2, tl.float32) + 2 * g
        scale *= tl.load(scales) * tl.expand_dims(power, 0 if STAGES == 1 else 1)
        value_scale = tl.load(scales + 1)
    if STAGES == 1:
        x = tl.trans(x)
    take_turn(EARLY)
    read_from, read_to, read_before, reads = tiles_of_folds(slot_bounds + z * 9, TILE_READ)
    num_reads = tl.sum(reads, 0)
    num_tiles = num_reads
    if ESTIMATES:
        if IS_DEEP:
            from_, to, units_before, units = tiles_of_folds(packed_bounds + z * 9, TILE)
            num_tiles = num_reads + tl.sum(units, 0)
        else:
            first_tile = tl.load(tile_first + head)
            num_tiles = num_reads + tl.load(tile_first + head + 1) - first_tile
    for item in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
        tile = item - num_reads
        if item < num_reads:
            first, count = span_of(read_from, read_to, read_before, reads, item, TILE_READ)
            read_tile(
                z, x, keys, values, slots + z.to(tl.int64) * capacity, first, count,
                base_read + item, part_out, part_lse, scores, scale, value_scale, capacity,
                num_parts, P, D, KV, STORED, BLOCK_R, BLOCK_N, STAGES, KEEPS,
            )  # fmt: skip
        elif ESTIMATES:
            if IS_DEEP:
                first, count = span_of(from_, to, units_before, units, tile, TILE)
                value_sums = address(table + 5, tl.float16) + g * tl.load(table + 3) * D
                estimate_members(
                    z, first, count, base_members + tile, members, value_sums, log_mass, part_out,
                    part_lse, tl.num_programs(1), width, num_parts, P, D, BLOCK_R, BLOCK_N, STAGES,
                )  # fmt: skip
            else:
                estimate_tile(
                    tiles + (first_tile + tile) * 4, z // G % num_queries, tables, log_mass,
                    part_out, part_lse, num_queries, width, base_tiles, num_parts, G, P, D, BLOCK_R,
                    BLOCK_N, STAGES,
                )  # fmt: skip

"""Reading a selection, and estimating what was not read: the parts of one problem.

A problem is one query and KV head of one document. Its selection is a list of slots cut by fold;
tiles (`read_options`) never cross a fold, and each gives one part. Units that were not read stand
for their keys by (log mass, value sum, size), tile by tile in the same way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LN_2, LOG2_E, LOWEST, address, load_stored, rows_at
from sparse_attn.kernels.dense import softmax_step, store_part

LONG = 4096  # a selection of more slots is read in longer tiles


def read_options(limit: int | None, head_dim: int) -> dict[str, int]:
    """How a selection of at most `limit` slots (None: any number) is divided: one piece a tile
    where few are read and a program waits, else many, several of which are asked for ahead. Goes by
    nothing but the limit, so that a query's bits do not.
    """
    if limit is not None and limit <= LONG:
        tile = 64 if head_dim > 128 else 128
        return {"TILE_READ": tile, "BLOCK_N": tile, "STAGES": 1, "num_warps": 4}
    stages = 3 if head_dim > 128 else 5
    return {"TILE_READ": 1024, "BLOCK_N": 32, "STAGES": stages, "num_warps": 2}


def read_launch(
    options: dict[str, int], head_dim: int, per_group: int, early: dict[str, bool]
) -> dict[str, int]:
    """Keywords of a launch of `read_kernel` with these `read_options` and those of `early.py`.

    Queries are on the right of a product in short tiles, and there filled up to 8. Registers are
    limited so that three programs of short tiles run on a multiprocessor, not two (an option of
    NVIDIA's compiler).
    """
    is_short = options["STAGES"] == 1
    rows = max(8 if is_short else 16, triton.next_power_of_2(per_group))
    limits = {"maxnreg": 168} if early["EARLY"] and is_short and head_dim <= 128 else {}
    return {**options, **limits, **early, "BLOCK_R": rows}


@triton.jit
def store_columns(out_ptr, lse_ptr, rows, is_row, high, total, out, D: tl.constexpr):
    """`dense.store_part` of out [D, R]."""
    is_seen = total > 0.0
    safe = tl.where(is_seen, total, 1.0)
    lse = tl.where(is_seen, (high + tl.log2(safe)) * LN_2, -float("inf"))
    tl.store(lse_ptr + rows, lse, mask=is_row)
    at = out_ptr + rows[None, :] * D + tl.arange(0, D)[:, None]
    tl.store(at, out / safe[None, :], mask=is_row[None, :])


@triton.jit
def read_short(
    z, x, keys, values, slots, first, count, part, part_out, part_lse, scores, scale, value_scale,
    capacity, num_parts,
    P: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, STORED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """`read_long` of at most BLOCK_N slots, all asked for at once; x, scale: turned.

    Keys are the left operand: a product has at least 16 rows on its left, but 8 on its right.
    """
    row = tl.arange(0, BLOCK_P)
    is_row = row < P
    place = tl.arange(0, BLOCK_N)
    is_slot = place < count
    slot = tl.load(slots + first + place, mask=is_slot, other=0).to(tl.int64)
    k = load_stored(keys, slot, is_slot, D, KV, STORED)
    v = load_stored(values, slot, is_slot, D, KV, STORED)
    product = tl.dot(k, x, input_precision="ieee") * scale
    if KEEPS:
        kept = scores + (z * P + row)[None, :].to(tl.int64) * capacity
        kept += first + place[:, None]
        tl.store(kept, product, mask=is_slot[:, None] & is_row[None, :])
    hidden = tl.where(is_slot[:, None], product * LOG2_E, -float("inf"))
    high = tl.maximum(tl.max(hidden, 0), LOWEST)
    weights = tl.exp2(hidden - high[None, :])
    out = tl.dot(tl.trans(v), weights.to(v.dtype), input_precision="ieee")
    if STORED != KV:
        out *= value_scale
    rows = (z * num_parts + part) * P + row
    store_columns(part_out, part_lse, rows, is_row, high, tl.sum(weights, 0), out, D)


@triton.jit
def read_long(
    z, x, keys, values, slots, first, count, part, part_out, part_lse, scores, scale, value_scale,
    capacity, num_parts,
    P: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, STORED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q K^T) V over slots first to first + count of a problem's selection.

    Reads two rows of D elements a slot; where KEEPS, writes scores [Z, P, capacity], scaled.
    x [BLOCK_P, D], and scale (a number, or [BLOCK_P, 1]): as `fit_queries` gives them.
    """
    row = tl.arange(0, BLOCK_P)
    is_row = row < P
    high = tl.full((BLOCK_P,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    out = tl.zeros((BLOCK_P, D), tl.float32)
    for start in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_N)
        is_slot = place < count
        slot = tl.load(slots + first + place, mask=is_slot, other=0).to(tl.int64)
        k = load_stored(keys, slot, is_slot, D, KV, STORED)
        v = load_stored(values, slot, is_slot, D, KV, STORED)
        product = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        if KEEPS:
            kept = scores + (z * P + row)[:, None].to(tl.int64) * capacity
            kept += first + place[None, :]
            tl.store(kept, product, mask=is_row[:, None] & is_slot[None, :])
        hidden = tl.where(is_slot[None, :], product * LOG2_E, -float("inf"))
        high, total, out = softmax_step(hidden, v, high, total, out)
    if STORED != KV:
        out *= value_scale
    rows = (z * num_parts + part) * P + row
    store_part(part_out, part_lse, rows, is_row, high, total, out, D)


@triton.jit
def read_tile(
    z, x, keys, values, slots, first, count, part, part_out, part_lse, scores, scale, value_scale,
    capacity, num_parts,
    P: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, STORED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """A tile as `read_options` says."""
    if STAGES == 1:
        read_short(
            z, x, keys, values, slots, first, count, part, part_out, part_lse, scores, scale,
            value_scale, capacity, num_parts, P, D, KV, STORED, BLOCK_P, BLOCK_N, KEEPS,
        )  # fmt: skip
    else:
        read_long(
            z, x, keys, values, slots, first, count, part, part_out, part_lse, scores, scale,
            value_scale, capacity, num_parts, P, D, KV, STORED, BLOCK_P, BLOCK_N, STAGES, KEEPS,
        )  # fmt: skip


@triton.jit
def estimate_units(
    z, part, log_mass, width, first, count, columns, base, sizes_at, value_sums, part_out, part_lse,
    num_parts,
    P: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What stands for units that were not read: weights exp(log mass) over mean values.

    Units `first` to first + count; log_mass [Z, P, width] is -inf where one was read. Of columns
    (none: each its own, from `base` on) the value_sums [., D] are; sizes_at is by column too, or by
    unit where there are columns. Reads 2 D bytes of each unit.
    """
    row = tl.arange(0, BLOCK_P)
    is_row = row < P
    mass_at = log_mass + (z * P + row)[None, :].to(tl.int64) * width
    high = tl.full((BLOCK_P,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    out = tl.zeros((D, BLOCK_P), tl.float32)
    for start in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_N)
        is_unit = place < count
        unit = first + place
        if columns is None:
            at = base + unit
            sizes = tl.load(sizes_at + at, mask=is_unit, other=0)
        else:
            at = tl.load(columns + unit, mask=is_unit, other=0)
            sizes = tl.load(sizes_at + unit, mask=is_unit, other=0)
        v = tl.load(rows_at(value_sums, at, D), mask=is_unit[:, None], other=0.0)
        is_own = is_unit[:, None] & is_row[None, :]
        mass = tl.load(mass_at + unit[:, None], mask=is_own, other=-float("inf"))
        new_high = tl.maximum(high, tl.max(mass, 0))
        shrink = tl.exp(high - new_high)
        weights = tl.exp(mass - new_high[None, :])
        means = weights / tl.maximum(sizes, 1).to(tl.float32)[:, None]
        total = total * shrink + tl.sum(weights, 0)
        out = tl.dot(tl.trans(v), means.to(v.dtype), out * shrink[None, :], input_precision="ieee")
        high = new_high
    rows = (z * num_parts + part) * P + row
    store_columns(part_out, part_lse, rows, is_row, high * LOG2_E, total, out, D)


@triton.jit
def estimate_tile(
    tile, query, tables, log_mass, part_out, part_lse, num_queries, width, base, num_parts,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`estimate_units` of a tile of a table; tile, tables: as in `score.score_tile`."""
    head = tl.load(tile)
    first = tl.load(tile + 1)
    count = tl.load(tile + 2)
    place = tl.load(tile + 3)
    table = tables + head // G * 6
    z = (head // G * num_queries + query) * G + head % G
    estimate_units(
        z, base + place, log_mass, width, first, count, None, (head % G) * tl.load(table + 3),
        address(table + 2, tl.int32), address(table + 5, tl.float16), part_out, part_lse, num_parts,
        P, D, BLOCK_P, BLOCK_N, STAGES,
    )  # fmt: skip


@triton.jit
def estimate_members(
    z, first, count, part, members, value_sums, log_mass, part_out, part_lse,
    num_problems, width, num_parts,
    P: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`estimate_units` of a tile of packed clusters (`score.score_members`)."""
    columns = members + z.to(tl.int64) * width
    estimate_units(
        z, part, log_mass, width, first, count, columns, 0,
        columns + num_problems.to(tl.int64) * width, value_sums, part_out, part_lse, num_parts,
        P, D, BLOCK_P, BLOCK_N, STAGES,
    )  # fmt: skip

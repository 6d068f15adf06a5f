"""Parts merged: within a fold in the order of its lists, folds by their tree, then what is steady.

Bits depend on the parts alone: every list is merged a fixed number of parts at a time from its
fold's first, and folds meet as in `state.merge_tree`. A program holds the columns of all heads of a
problem side by side, P * D of them, and everything is done column by column: nothing is exchanged
between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LOWEST, arrive, log_add, pick, tiles_of_folds

MERGED_AT_ONCE = tl.constexpr(8)
MERGED_COLUMNS = 512  # of a program


@triton.jit
def merge_rows(out_a, lse_a, out_b, lse_b):
    """Parts over disjoint keys, merged column by column (`state.merge_parts`)."""
    lse = log_add(lse_a, lse_b)
    base = tl.maximum(lse, LOWEST)
    return out_a * tl.exp(lse_a - base) + out_b * tl.exp(lse_b - base), lse


@triton.jit
def merge_range(out_at, lse_at, first, last, out, lse, column, P: tl.constexpr, D: tl.constexpr):
    """Merge parts first to last of a problem into (out, lse), both [columns]."""
    head = column // D
    is_own = column < P * D
    for start in range(first, last, MERGED_AT_ONCE):
        high = lse
        for i in tl.static_range(MERGED_AT_ONCE):
            is_part = is_own & (start + i < last)
            own = tl.load(lse_at + (start + i) * P + head, mask=is_part, other=-float("inf"))
            high = tl.maximum(high, own)
        high = tl.maximum(high, LOWEST)
        shrink = tl.exp(lse - high)
        out = out * shrink
        total = shrink
        for i in tl.static_range(MERGED_AT_ONCE):
            is_part = is_own & (start + i < last)
            own = tl.load(lse_at + (start + i) * P + head, mask=is_part, other=-float("inf"))
            x = tl.load(out_at + (start + i) * P * D + column, mask=is_part, other=0.0)
            weight = tl.exp(own - high)
            out += weight * x
            total += weight
        is_seen = total > 0.0
        total = tl.where(is_seen, total, 1.0)
        out = out / total
        lse = tl.where(is_seen, high + tl.log(total), -float("inf"))
    return out, lse


@triton.jit
def parts_of_fold(bounds, fold, base, tile):
    """First and past-the-last part of one fold of a list that begins at part `base`."""
    _, _, before, tiles = tiles_of_folds(bounds, tile)
    first = base + pick(before, fold)
    return first, first + pick(tiles, fold)


@triton.jit
def load_fold(fold_out, fold_lse, at, fold, columns, BLOCK: tl.constexpr):
    """A fold that another program stored."""
    place = (at * 9 + fold) * BLOCK + columns
    out = tl.load(fold_out + place, cache_modifier=".cg")
    return out, tl.load(fold_lse + place, cache_modifier=".cg")


@triton.jit
def load_pair(fold_out, fold_lse, at, fold, columns, BLOCK: tl.constexpr):
    """The folds `fold` and fold + 4, merged."""
    a, lse_a = load_fold(fold_out, fold_lse, at, fold, columns, BLOCK)
    b, lse_b = load_fold(fold_out, fold_lse, at, fold + 4, columns, BLOCK)
    return merge_rows(a, lse_a, b, lse_b)


@triton.jit
def load_tree(fold_out, fold_lse, at, columns, BLOCK: tl.constexpr):
    """All 8 folds, by the tree of `state.merge_tree`."""
    a, lse_a = load_pair(fold_out, fold_lse, at, 0, columns, BLOCK)
    b, lse_b = load_pair(fold_out, fold_lse, at, 1, columns, BLOCK)
    c, lse_c = load_pair(fold_out, fold_lse, at, 2, columns, BLOCK)
    d, lse_d = load_pair(fold_out, fold_lse, at, 3, columns, BLOCK)
    a, lse_a = merge_rows(a, lse_a, c, lse_c)
    b, lse_b = merge_rows(b, lse_b, d, lse_d)
    return merge_rows(a, lse_a, b, lse_b)


@triton.jit
def merge_kernel(
    part_out, part_lse, bounds_read, bounds_tiles, bounds_members, fold_out, fold_lse, fold_read,
    arrived, out, lse_all, lse_read,
    num_queries, num_parts, num_steady, base_read, base_tiles, base_members,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    TILE_READ: tl.constexpr, TILE_MEMBERS: tl.constexpr, LISTS: tl.constexpr,
    READS_ALL: tl.constexpr,
):  # fmt: skip
    """Everything that a problem attended to, as one part.

    Grid: (8 folds and the steady parts, blocks of columns, Z). Each program merges one fold, what
    was read and then the rest; the last of the 9 to come merges them. part_out [Z, num_parts, P,
    D], part_lse [Z, num_parts, P]: the steady parts, and from each base on those of a list. Bounds
    of the lists, 9 a row, of which the first LISTS count: of what was read [Z] (in tiles of
    TILE_READ; where READS_ALL, [heads] and in parts), of tiles of units [heads] and of packed
    members [Z]. fold_out, fold_lse, fold_read [Z, blocks, 9, BLOCK] and arrived [Z, blocks] are
    scratch. Writes out [Z * P, D], lse_all and lse_read (of what was read alone, steady included)
    [Z * P]. Reads each part once.
    """
    fold = tl.program_id(0)
    z = tl.program_id(2)
    head = z // (G * num_queries) * G + z % G
    at = z * tl.num_programs(1) + tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + columns
    place = (at * 9 + fold) * BLOCK + columns
    out_at = part_out + z.to(tl.int64) * num_parts * P * D
    lse_at = part_lse + z.to(tl.int64) * num_parts * P
    own = tl.zeros((BLOCK,), tl.float32)
    lse = tl.full((BLOCK,), -float("inf"), tl.float32)
    # All bounds are asked for before any part is: one wait instead of three.
    bound = tl.minimum(fold, 7)
    row = head if READS_ALL else z
    read_from, read_to = parts_of_fold(bounds_read + row * 9, bound, base_read, TILE_READ)
    tiles_from, tiles_to = parts_of_fold(bounds_tiles + head * 9, bound, base_tiles, 1)
    rest_from, rest_to = parts_of_fold(bounds_members + z * 9, bound, base_members, TILE_MEMBERS)
    for index in range(LISTS):
        first = tl.where(index == 0, read_from, tl.where(index == 1, tiles_from, rest_from))
        last = tl.where(index == 0, read_to, tl.where(index == 1, tiles_to, rest_to))
        if fold == 8:
            first = 0
            last = tl.where(index == 0, num_steady, 0)
        own, lse = merge_range(out_at, lse_at, first, last, own, lse, column, P, D)
        if index == 0:
            tl.store(fold_read + place, lse)
    tl.store(fold_out + place, own)
    tl.store(fold_lse + place, lse)
    if arrive(arrived + at, 9):
        body, lse = load_tree(fold_out, fold_lse, at, columns, BLOCK)
        _, read = load_tree(fold_out, fold_read, at, columns, BLOCK)
        steady, steady_lse = load_fold(fold_out, fold_lse, at, 8, columns, BLOCK)
        body, lse = merge_rows(steady, steady_lse, body, lse)
        is_own = column < P * D
        out_row = out + z.to(tl.int64) * P * D
        tl.store(out_row + column, body.to(out.dtype.element_ty), mask=is_own)
        rows = z * P + column // D
        is_first = is_own & (column % D == 0)
        tl.store(lse_all + rows, lse, mask=is_first)
        tl.store(lse_read + rows, log_add(steady_lse, read), mask=is_first)

"""Parts merged: within a fold in the order of its lists, folds by their tree, then what is steady.

Bits depend on the parts alone: the parts of a fold are merged a fixed number at a time from its
first, and folds meet as in `state.merge_tree`. A program has some columns of one query head and
goes through all 8 folds at once, so that what it waits for it waits for once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LOWEST, halves, log_add, tiles_of_folds
from sparse_attn.kernels.early import take_turn


def merge_options(head_dim: int) -> dict[str, int]:
    """How `merge_kernel` is divided: the best of those measured on an H200."""
    return {"BLOCK": min(head_dim, 64), "AT_ONCE": 16, "num_warps": 4}


@triton.jit
def merge_rows(out_a, lse_a, out_b, lse_b):
    """Parts over disjoint keys, merged row by row (`state.merge_parts`)."""
    lse = log_add(lse_a, lse_b)
    base = tl.maximum(lse, LOWEST)
    return out_a * tl.exp(lse_a - base) + out_b * tl.exp(lse_b - base), lse


@triton.jit
def merge_tree(out, lse, BLOCK: tl.constexpr):
    """The 8 folds [8, BLOCK] and [8, 1], by the tree of `state.merge_tree`: [1, BLOCK], [1, 1]."""
    out_a, out_b = halves(out, 8, BLOCK)
    lse_a, lse_b = halves(lse, 8, 1)
    out, lse = merge_rows(out_a, lse_a, out_b, lse_b)
    out_a, out_b = halves(out, 4, BLOCK)
    lse_a, lse_b = halves(lse, 4, 1)
    out, lse = merge_rows(out_a, lse_a, out_b, lse_b)
    out_a, out_b = halves(out, 2, BLOCK)
    lse_a, lse_b = halves(lse, 2, 1)
    return merge_rows(out_a, lse_a, out_b, lse_b)


@triton.jit
def tree_lse(lse):
    """`merge_tree` of log masses [8, 1] alone."""
    a, b = halves(lse, 8, 1)
    a, b = halves(log_add(a, b), 4, 1)
    a, b = halves(log_add(a, b), 2, 1)
    return log_add(a, b)


@triton.jit
def log_of(high, total):
    """high + log total; -inf where nothing was summed."""
    is_seen = total > 0.0
    return tl.where(is_seen, high + tl.log(tl.where(is_seen, total, 1.0)), -float("inf"))


@triton.jit
def merge_steady(
    out_at, lse_at, num_steady, p, column, P: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The steady parts, the first num_steady of a problem: [1, BLOCK] and [1, 1]."""
    own = tl.zeros((1, BLOCK), tl.float32)
    high = tl.full((1,), -float("inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for start in range(0, num_steady, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)[None, :]
        is_part = part < num_steady
        own, high, total, _, _ = grow(
            out_at, lse_at, part, is_part, p, column, own, high, total, P, D
        )  # fmt: skip
    safe = tl.where(total > 0.0, total, 1.0)
    return own / safe[:, None], tl.reshape(log_of(high, total), (1, 1))


@triton.jit
def parts_of_folds(bounds, base, tile):
    """First part and parts of each fold of a list that begins at part `base`, [8, 1] each."""
    _, _, before, tiles = tiles_of_folds(bounds, tile)
    return base + before[:, None], tiles[:, None]


@triton.jit
def grow(
    out_at, lse_at, part, is_part, p, column, own, high, total, P: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Merge parts [R, n] into rows [R, BLOCK] of sums `own` and `total`, relative to exp(high).

    Returns them, and what each part counts.
    """
    lse = tl.load(lse_at + part * P + p, mask=is_part, other=-float("inf"))
    at = out_at + ((part * P + p) * D)[:, :, None] + column[None, None, :]
    x = tl.load(at, mask=is_part[:, :, None], other=0.0)
    new_high = tl.maximum(high, tl.max(lse, 1))
    base = tl.maximum(new_high, LOWEST)
    shrink = tl.exp(high - base)
    weight = tl.exp(lse - base[:, None])
    own = own * shrink[:, None] + tl.sum(x * weight[:, :, None], 1)
    return own, new_high, total * shrink + tl.sum(weight, 1), shrink, weight


@triton.jit
def merge_kernel(
    part_out, part_lse, bounds_read, bounds_tiles, bounds_members, out, lse_all, lse_read,
    num_queries, num_parts, num_steady, base_read, base_tiles, base_members,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr, TILE_READ: tl.constexpr, TILE_MEMBERS: tl.constexpr,
    LISTS: tl.constexpr, READS_ALL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Everything that a problem attended to, as one part.

    Grid: (blocks of columns of P heads, Z). part_out [Z, num_parts, P, D], part_lse [Z, num_parts,
    P]: the steady parts, and from each base on those of a list. Bounds of the lists, 9 a row, of
    which the first LISTS count: of what was read [Z] (in tiles of TILE_READ; where READS_ALL,
    [heads] and in parts), of tiles of units [heads] and of packed members [Z]. Writes out [Z * P,
    D], lse_all and lse_read (of what was read alone, steady included) [Z * P]. Reads each part
    once.
    """
    z = tl.program_id(1)
    p = tl.program_id(0) // (D // BLOCK)
    column = tl.program_id(0) % (D // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    head = z // (G * num_queries) * G + z % G
    out_at = part_out + z.to(tl.int64) * num_parts * P * D
    lse_at = part_lse + z.to(tl.int64) * num_parts * P
    row = head if READS_ALL else z
    read_from, reads = parts_of_folds(bounds_read + row * 9, base_read, TILE_READ)
    tiles_to = reads
    count = reads
    tiles_from = read_from
    rest_from = read_from
    if LISTS > 1:
        tiles_from, tiles = parts_of_folds(bounds_tiles + head * 9, base_tiles, 1)
        tiles_to = reads + tiles
        count = tiles_to
    if LISTS > 2:
        rest_from, rest = parts_of_folds(bounds_members + z * 9, base_members, TILE_MEMBERS)
        count = tiles_to + rest
    # The bounds are older than the kernel ahead; so are steady parts, unless it wrote all parts.
    if READS_ALL:
        take_turn(EARLY)
    steady, steady_lse = merge_steady(out_at, lse_at, num_steady, p, column, P, D, BLOCK, 8)
    if not READS_ALL:
        take_turn(EARLY)
    own = tl.zeros((8, BLOCK), tl.float32)
    high = tl.full((8,), -float("inf"), tl.float32)
    total = tl.zeros((8,), tl.float32)
    total_read = tl.zeros((8,), tl.float32)
    for start in range(0, tl.max(count), AT_ONCE):
        i = start + tl.arange(0, AT_ONCE)[None, :]
        part = tl.where(
            i < reads,
            read_from + i,
            tl.where(i < tiles_to, tiles_from + i - reads, rest_from + i - tiles_to),
        )
        is_part = i < count
        own, high, total, shrink, weight = grow(
            out_at, lse_at, part, is_part, p, column, own, high, total, P, D
        )  # fmt: skip
        total_read = total_read * shrink + tl.sum(tl.where(i < reads, weight, 0.0), 1)
    safe = tl.where(total > 0.0, total, 1.0)
    lse = tl.reshape(log_of(high, total), (8, 1))
    body, lse = merge_tree(own / safe[:, None], lse, BLOCK)
    body, lse = merge_rows(steady, steady_lse, body, lse)
    read = log_add(steady_lse, tree_lse(tl.reshape(log_of(high, total_read), (8, 1))))
    at = z * P + p
    body = tl.reshape(body, (BLOCK,))
    tl.store(out + at.to(tl.int64) * D + column, body.to(out.dtype.element_ty))
    if tl.program_id(0) % (D // BLOCK) == 0:
        tl.store(lse_all + at + tl.arange(0, 1)[:, None], lse)
        tl.store(lse_read + at + tl.arange(0, 1)[:, None], read)

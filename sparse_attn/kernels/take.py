"""Which units a query and KV head reads: the rule of `select/take.py`, on the chip.

Units go in order of benefit, equal ones by lowest column, until the limit. Nothing is sorted: the
benefit at which the limit is met is found by a search over the bits of a non-negative float, which
are ordered as it is; units at exactly that benefit are taken one after another. What is taken comes
out in order of columns, cut by fold: the slots of its keys, or the clusters of its groups.

One program does it, so what counts is how often it waits: everything is asked for at once, and a
step of the search is one exchange between its threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LOWEST, address, tiles_of_folds
from sparse_attn.kernels.early import take_turn
from sparse_attn.kernels.emit import emit, expand, hide_taken
from sparse_attn.kernels.search import low_part, packed, search_keys, units_at
from sparse_attn.kernels.take_mass import take_mass
from sparse_attn.kernels.worth import bits_of, total_of


@triton.jit
def first_of(numbers, count, BLOCK: tl.constexpr):
    """The first BLOCK of a list of so many."""
    lane = tl.arange(0, BLOCK)
    return tl.load(numbers + lane, mask=lane < count, other=0)


@triton.jit
def take_keys(
    log_mass, width, sizes, sizes_at, firsts_at, counts_at, count, held, totals, limit, scratch,
    entries, capacity, edges, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """By keys; the first BLOCK units stay on the chip, of others the benefits are written down.

    sizes: of the first BLOCK, of which so many as `held` could be asked for.
    """
    lane = tl.arange(0, BLOCK)
    sizes = tl.where(lane < count, sizes, 0)
    bits = bits_of(log_mass, width, lane, lane < held, sizes, totals, P, BLOCK_P)
    own = tl.where(sizes > 0, packed(sizes, SHIFT), 0)
    most = bits
    all_own = own
    for start in range(BLOCK, count, BLOCK):
        unit = start + lane
        is_unit = unit < count
        more = tl.load(sizes_at + unit, mask=is_unit, other=0)
        other = bits_of(log_mass, width, unit, is_unit, more, totals, P, BLOCK_P)
        tl.store(scratch + unit, other, mask=is_unit)
        most = tl.maximum(most, other)
        all_own += tl.where(more > 0, packed(more, SHIFT), 0)
    if count > BLOCK:
        tl.debug_barrier()
    high, low, keys, num_left = search_keys(
        bits, own, scratch, sizes_at, count, tl.max(most, 0), tl.sum(all_own, 0), limit, BLOCK,
        SHIFT,
    )  # fmt: skip
    at = tl.zeros((), tl.int32 if SHIFT < 32 else tl.int64)
    noted = tl.zeros((16,), tl.int32 if SHIFT < 32 else tl.int64)
    for start in range(0, tl.maximum(count, 1), BLOCK):
        unit = start + lane
        if start > 0:
            bits, sizes = units_at(scratch, sizes_at, start, count, BLOCK)
        taken = bits >= high
        if num_left > 1:  # one alone does not fit
            ties = (bits == low) & (bits >= 0)
            tied = tl.where(ties, sizes, 0)
            taken = taken | (ties & (keys + tl.cumsum(tied, 0) <= limit))
            keys += tl.sum(tied, 0)
        hide_taken(log_mass, width, unit, taken, P)
        firsts = tl.load(firsts_at + unit, mask=taken, other=0)
        counts = tl.load(counts_at + unit, mask=taken, other=0)
        at, noted = emit(
            entries, capacity, unit, taken, firsts, counts, at, noted, edges, start, BLOCK, SHIFT
        )  # fmt: skip
    return at, noted


@triton.jit
def take_kernel(
    log_mass, units, unit_bounds, steady_lse, tile_lse, opened_lse,
    scratch, entries, place_bounds, places,
    width, num_queries, num_steady, steady_rows, num_tiles, tile_rows, max_opened,
    limit, goal, max_entries, capacity,
    G: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
    SHIFT: tl.constexpr, BY_HEAD: tl.constexpr, BY_MASS: tl.constexpr, TILE_OPENED: tl.constexpr,
    SPAN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Units of one problem, by falling benefit until `limit` keys or `goal` quanta of mass.

    Grid: (Z). log_mass [Z, P, width] is read, and set to -inf where a unit is taken. units: int64
    [heads, 3], addresses of a unit's keys, and of what an entry says of it, first slot and size or
    first cluster and clusters; unless BY_HEAD, `members` (`score.score_members`). unit_bounds
    [heads, or Z, 9]: each fold's first unit. steady_lse [Z, steady_rows, P], of which num_steady
    count, tile_lse [Z, tile_rows, P], of which num_tiles, and opened_lse [Z, max_opened, P] (or
    none), one a tile of TILE_OPENED units: the log masses whose sum is everything. Writes entries
    [Z, max_entries, 3], places [Z, capacity], what the entries hold, and its bounds by fold [Z, 9].
    scratch [Z, width] int32 is used where a problem has more than BLOCK units, and by mass. SPAN:
    how much entries hold, about.
    """
    z = tl.program_id(0)
    row = z // (num_queries * G) * G + z % G if BY_HEAD else z
    fold = tl.arange(0, 16)
    edges = tl.load(unit_bounds + row * 9 + fold, mask=fold < 9, other=0)
    count = tl.load(unit_bounds + row * 9 + 8)
    z = z.to(tl.int64)
    if not BY_HEAD:
        take_turn(EARLY)
    num_opened = 0
    own_opened = opened_lse
    if opened_lse is not None:
        _, _, _, tiles = tiles_of_folds(unit_bounds + row * 9, TILE_OPENED)
        num_opened = tl.sum(tiles, 0)
        own_opened = opened_lse + z * max_opened * P
    log_mass += z * P * width
    if BY_HEAD:
        at = units + row * 3
        sizes = address(at, tl.int32)
        firsts = address(at + 1, tl.int32)
        counts = address(at + 2, tl.int32)
        held = count
        first_sizes = first_of(sizes, held, BLOCK)
        take_turn(EARLY)
    else:
        plane = tl.num_programs(0).to(tl.int64) * width
        sizes = units + plane + z * width
        firsts = sizes + plane
        counts = sizes
        held = width  # so that nothing waits for `count`
        first_sizes = first_of(sizes, held, BLOCK)
    entries += z * max_entries * 3
    steady, totals = total_of(
        steady_lse + z * steady_rows * P, num_steady, tile_lse + z * tile_rows * P, num_tiles,
        own_opened, num_opened, max_opened, P, BLOCK_P, 128,
    )  # fmt: skip
    scratch += z * width
    if BY_MASS:
        reads = tl.exp(steady - tl.maximum(totals, LOWEST))
        at, noted = take_mass(
            log_mass, width, sizes, firsts, counts, count, totals, reads, goal, scratch, entries,
            max_entries, edges, P, BLOCK_P, BLOCK, SHIFT,
        )  # fmt: skip
    else:
        at, noted = take_keys(
            log_mass, width, first_sizes, sizes, firsts, counts, count, held, totals, limit,
            scratch, entries, max_entries, edges, P, BLOCK_P, BLOCK, SHIFT,
        )  # fmt: skip
    noted = tl.where(edges < count, noted, at)
    tl.store(place_bounds + z * 9 + fold, low_part(noted, SHIFT), mask=fold < 9)
    tl.debug_barrier()
    num_entries = (at >> SHIFT).to(tl.int32)
    expand(places + z * capacity, capacity, entries, num_entries, 2048 // SPAN, SPAN)

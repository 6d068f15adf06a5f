"""Which units a query and KV head reads: the rule of `select/take.py`, on the chip.

Units go in order of benefit, equal ones by lowest column, until the limit. Nothing is sorted: the
benefit at which the limit is met is found by a search over the bits of a non-negative float, which
are ordered as it is; units at exactly that benefit are taken one after another. What is taken comes
out in order of columns, cut by fold: the slots of its keys, or the groups to be opened.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LOWEST, address
from sparse_attn.kernels.worth import QUANTA, bits_of, quanta_of, scalar, total_of

# Units held on the chip at once; more are read again for every step of the search.
MAX_RESIDENT = 4096
FEW = 1024  # units up to so many take less time in a smaller block


@triton.jit
def add_three(a, b, c, other_a, other_b, other_c):
    """The sum of two triples."""
    return a + other_a, b + other_b, c + other_c


@triton.jit
def keys_from(bits, sizes, level):
    """Keys of the units whose benefit is at least `level`."""
    return tl.sum(tl.where(bits >= level, sizes, 0), 0)


@triton.jit
def search_keys(bits, sizes, limit):
    """(lowest benefit whose units all fit, the benefit at which the limit falls, their keys).

    The second is -1, which no unit has, where every unit fits. The range between the two is cut in
    four by each step; it ends early where a single unit is left in it, which does not fit.
    """
    low = -1
    high = 0
    if keys_from(bits, sizes, 0) > limit:
        low = 0
        high = tl.max(bits, 0) + 1
        left = 2
        while (high - low > 1) & (left > 1):
            step = (high - low + 3) // 4
            level_a = low + step
            level_b = tl.minimum(low + 2 * step, high)
            level_c = tl.minimum(low + 3 * step, high)
            a, b, c = tl.reduce(
                (
                    tl.where(bits >= level_a, sizes, 0),
                    tl.where(bits >= level_b, sizes, 0),
                    tl.where(bits >= level_c, sizes, 0),
                ),
                0,
                add_three,
            )
            over = (a > limit).to(tl.int32) + (b > limit).to(tl.int32) + (c > limit).to(tl.int32)
            high = tl.minimum(low + step * (over + 1), high)
            low = low + step * over
            if high - low < (1 << 16):
                left = tl.sum(((bits >= low) & (bits < high)).to(tl.int32), 0)
    return high, low, keys_from(bits, sizes, high)


@triton.jit
def emit(out, before_at, capacity, unit, is_unit, taken, first_at, counts, at):
    """Write (first, count, place) of taken units as entries from `at` on; returns `at` behind them.

    A place is the sum of the counts before it. `at` holds both numbers, 2^32 an entry; so does
    before_at [units], of every unit.
    """
    own = tl.where(taken, counts.to(tl.int64) + (1 << 32), 0)
    before = at + tl.cumsum(own, 0) - own
    tl.store(before_at + unit, before, mask=is_unit)
    number = (before >> 32).to(tl.int32)
    entry = out + number * 3
    is_kept = taken & (number < capacity)
    tl.store(entry, tl.load(first_at + unit, mask=is_kept, other=0), mask=is_kept)
    tl.store(entry + 1, counts, mask=is_kept)
    tl.store(entry + 2, before.to(tl.int32), mask=is_kept)
    return at + tl.sum(own, 0)


@triton.jit
def emit_bounds(entry_bounds, place_bounds, unit_bounds, before_at, count, at):
    """Where each fold begins among entries and places; `at` is behind the last of them."""
    fold = tl.arange(0, 16)
    bound = tl.load(unit_bounds + fold, mask=fold < 9, other=0)
    before = tl.load(before_at + bound, mask=(fold < 9) & (bound < count), other=0)
    before = tl.where(bound < count, before, at)
    tl.store(entry_bounds + fold, (before >> 32).to(tl.int32), mask=fold < 9)
    tl.store(place_bounds + fold, before.to(tl.int32), mask=fold < 9)


@triton.jit
def expand(slots, capacity, entries, num_entries, BLOCK: tl.constexpr):
    """The slots of all entries, each from its place on."""
    for start in range(0, num_entries, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        is_entry = entry < num_entries
        first = tl.load(entries + entry * 3, mask=is_entry, other=0)
        size = tl.load(entries + entry * 3 + 1, mask=is_entry, other=0)
        place = tl.load(entries + entry * 3 + 2, mask=is_entry, other=0)
        for i in range(0, tl.max(size, 0), 8):
            each = i + tl.arange(0, 8)[None, :]
            is_slot = (each < size[:, None]) & (place[:, None] + each < capacity)
            tl.store(slots + place[:, None] + each, first[:, None] + each, mask=is_slot)


@triton.jit
def hide_taken(log_mass, width, unit, taken, P: tl.constexpr):
    """What is read exactly is not estimated too."""
    for p in tl.static_range(P):
        tl.store(log_mass + p * width + unit, -float("inf"), mask=taken)


@triton.jit
def take_resident(
    log_mass, width, sizes_at, count, totals, limit, first_at, counts_at, entries, capacity,
    before_at, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """By keys, with every unit on the chip."""
    unit = tl.arange(0, BLOCK)
    is_unit = unit < count
    sizes = tl.load(sizes_at + unit, mask=is_unit, other=0)
    bits = bits_of(log_mass, width, unit, is_unit, sizes, totals, P, BLOCK_P)
    high, low, keys = search_keys(bits, sizes, limit)
    taken = bits >= high
    ties = (bits == low) & (bits >= 0)
    if tl.sum(ties.to(tl.int32), 0) > 1:  # one alone does not fit
        own = tl.where(ties, sizes, 0)
        taken = taken | (ties & (keys + tl.cumsum(own, 0) <= limit))
    hide_taken(log_mass, width, unit, taken, P)
    counts = tl.load(counts_at + unit, mask=taken, other=0)
    zero = tl.zeros((), tl.int64)
    return emit(entries, before_at, capacity, unit, is_unit, taken, first_at, counts, zero)


@triton.jit
def weight_from(
    log_mass, width, sizes_at, count, scratch, totals, level, p,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """Keys, or quanta of head p's mass, of all units whose benefit is at least `level`."""
    weight = tl.zeros((), tl.int64)
    for start in range(0, count, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        is_unit = unit < count
        is_own = is_unit & (tl.load(scratch + unit, mask=is_unit, other=-1) >= level)
        if BY_MASS:
            own = quanta_of(log_mass, width, unit, is_own, totals, p, BLOCK_P)
        else:
            own = tl.load(sizes_at + unit, mask=is_own, other=0).to(tl.int64)
        weight += tl.sum(tl.where(is_own, own, 0), 0)
    return weight


@triton.jit
def is_within(
    log_mass, width, sizes_at, count, scratch, totals, reads, level, limit, goal,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """Whether all units of at least that benefit are taken, and the next one may be: they fit, or
    with all of them some head has not read enough.
    """
    if BY_MASS:
        result = False
        for p in range(P):
            read = (scalar(reads, p, BLOCK_P).to(tl.float64) * QUANTA).to(tl.int64)
            read += weight_from(
                log_mass, width, sizes_at, count, scratch, totals, level, p, BLOCK_P, BLOCK, True
            )
            result = result | (read < goal)
    else:
        keys = weight_from(
            log_mass, width, sizes_at, count, scratch, totals, level, 0, BLOCK_P, BLOCK, False
        )
        result = keys <= limit
    return result


@triton.jit
def take_chunked(
    log_mass, width, sizes_at, count, totals, reads, limit, goal, scratch, first_at, counts_at,
    entries, capacity, before_at,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """By keys or by mass, with benefits kept in memory and read BLOCK at a time."""
    high = 0
    for start in range(0, count, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        is_unit = unit < count
        sizes = tl.load(sizes_at + unit, mask=is_unit, other=0)
        bits = bits_of(log_mass, width, unit, is_unit, sizes, totals, P, BLOCK_P)
        tl.store(scratch + unit, bits, mask=is_unit)
        high = tl.maximum(high, tl.max(bits, 0) + 1)
    tl.debug_barrier()
    low = -1
    if is_within(
        log_mass, width, sizes_at, count, scratch, totals, reads, 0, limit, goal,
        P, BLOCK_P, BLOCK, BY_MASS,
    ):  # fmt: skip
        high = 0
    else:
        low = 0
    while high - low > 1:
        middle = low + (high - low) // 2
        if is_within(
            log_mass, width, sizes_at, count, scratch, totals, reads, middle, limit, goal,
            P, BLOCK_P, BLOCK, BY_MASS,
        ):  # fmt: skip
            high = middle
        else:
            low = middle
    at = tl.zeros((), tl.int64)
    head = tl.arange(0, BLOCK_P)
    before = tl.zeros((BLOCK_P,), tl.int64)
    for p in range(P if BY_MASS else 1):
        weight = weight_from(
            log_mass, width, sizes_at, count, scratch, totals, high, p, BLOCK_P, BLOCK, BY_MASS
        )
        if BY_MASS:
            weight += (scalar(reads, p, BLOCK_P).to(tl.float64) * QUANTA).to(tl.int64)
        before = tl.where(head == p, weight, before)
    for start in range(0, count, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        is_unit = unit < count
        sizes = tl.load(sizes_at + unit, mask=is_unit, other=0)
        bits = tl.load(scratch + unit, mask=is_unit, other=-1)
        is_tie = (bits == low) & (bits >= 0)
        taken = bits >= high
        if BY_MASS:
            for p in range(P):
                own = quanta_of(log_mass, width, unit, is_tie, totals, p, BLOCK_P)
                own = tl.where(is_tie, own, 0)
                base = tl.sum(tl.where(head == p, before, 0), 0)
                taken = taken | (is_tie & (base + tl.cumsum(own, 0) - own < goal))
                before = tl.where(head == p, base + tl.sum(own, 0), before)
        else:
            own = tl.where(is_tie, sizes, 0).to(tl.int64)
            base = tl.sum(before, 0)
            taken = taken | (is_tie & (base + tl.cumsum(own, 0) <= limit))
            before = tl.where(head == 0, base + tl.sum(own, 0), before)
        taken = taken & is_unit
        hide_taken(log_mass, width, unit, taken, P)
        counts = tl.load(counts_at + unit, mask=taken, other=0)
        at = emit(entries, before_at, capacity, unit, is_unit, taken, first_at, counts, at)
    return at


@triton.jit
def take_kernel(
    problems, log_mass, width, num_steady, limit, goal, scratch, before, slots, capacity,
    P: tl.constexpr, BLOCK_P: tl.constexpr, FEW: tl.constexpr,
    BLOCK: tl.constexpr, BY_MASS: tl.constexpr, EXPAND: tl.constexpr,
):  # fmt: skip
    """Units of one problem, by falling benefit until `limit` keys or `goal` quanta of mass.

    Grid: (Z). log_mass [Z, P, width] is read, and set to -inf where a unit is taken. problems:
    int64 [Z, 13], addresses: 0 sizes, 1 and 2 what an entry says of a unit (first slot and size,
    or first cluster and clusters), 3 number of units, 4 their bounds by fold, 5 and 6 a list of log
    masses and its bounds, 7 and 8 another, 9 log masses of the steady parts, 10 entries [capacity,
    3], 11 and 12 bounds [9] of entries and of places. slots [Z, capacity] where EXPAND. before
    [Z, width] int64 is scratch, scratch [Z, width] int32 where a problem has more than BLOCK units.
    """
    z = tl.program_id(0)
    row = problems + z * 13
    count = tl.load(address(row + 3, tl.int32))
    unit_bounds = address(row + 4, tl.int32)
    log_mass += z.to(tl.int64) * P * width
    steady, totals = total_of(
        address(row + 9, tl.float32), num_steady,
        address(row + 5, tl.float32), address(row + 6, tl.int32),
        address(row + 7, tl.float32), address(row + 8, tl.int32), P, BLOCK_P,
    )  # fmt: skip
    sizes_at = address(row, tl.int32)
    first_at = address(row + 1, tl.int32)
    counts_at = address(row + 2, tl.int32)
    entries = address(row + 10, tl.int32)
    before += z.to(tl.int64) * width
    if BY_MASS or count > BLOCK:
        reads = tl.exp(steady - tl.maximum(totals, LOWEST))
        at = take_chunked(
            log_mass, width, sizes_at, count, totals, reads, limit, goal,
            scratch + z.to(tl.int64) * width, first_at, counts_at, entries, capacity, before,
            P, BLOCK_P, BLOCK, BY_MASS,
        )  # fmt: skip
    elif count <= FEW:
        at = take_resident(
            log_mass, width, sizes_at, count, totals, limit, first_at, counts_at, entries, capacity,
            before, P, BLOCK_P, FEW,
        )  # fmt: skip
    else:
        at = take_resident(
            log_mass, width, sizes_at, count, totals, limit, first_at, counts_at, entries, capacity,
            before, P, BLOCK_P, BLOCK,
        )  # fmt: skip
    tl.debug_barrier()
    emit_bounds(
        address(row + 11, tl.int32), address(row + 12, tl.int32), unit_bounds, before, count, at
    )
    if EXPAND:
        own = slots + z.to(tl.int64) * capacity
        expand(own, capacity, entries, (at >> 32).to(tl.int32), 512)

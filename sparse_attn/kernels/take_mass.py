"""Units by falling benefit until every head of the group has read enough of its attention.

The rule of `select/take.py` for a limit of mass: shares are added as integers, benefits are kept in
memory and read again for every step of the search.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.emit import emit, hide_taken
from sparse_attn.kernels.worth import QUANTA, bits_of, quanta_of, scalar


@triton.jit
def mass_from(
    log_mass, width, count, scratch, totals, level, p, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Quanta of head p's mass that all units have whose benefit is at least `level`."""
    mass = tl.zeros((), tl.int64)
    for start in range(0, count, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        is_unit = unit < count
        is_own = is_unit & (tl.load(scratch + unit, mask=is_unit, other=-1) >= level)
        own = quanta_of(log_mass, width, unit, is_own, totals, p, BLOCK_P)
        mass += tl.sum(tl.where(is_own, own, 0), 0)
    return mass


@triton.jit
def quanta_read(reads, p, BLOCK_P: tl.constexpr):
    """What head p reads anyway, in quanta."""
    return (scalar(reads, p, BLOCK_P).to(tl.float64) * QUANTA).to(tl.int64)


@triton.jit
def needs_more(
    log_mass, width, count, scratch, totals, reads, level, goal,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether some head has not read enough with all units of at least that benefit."""
    result = False
    for p in range(P):
        mass = mass_from(log_mass, width, count, scratch, totals, level, p, BLOCK_P, BLOCK)
        result = result | (quanta_read(reads, p, BLOCK_P) + mass < goal)
    return result


@triton.jit
def take_mass(
    log_mass, width, sizes_at, firsts_at, counts_at, count, totals, reads, goal, scratch, entries,
    capacity, edges, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """By mass, with benefits kept in memory and read BLOCK at a time."""
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
    if needs_more(log_mass, width, count, scratch, totals, reads, 0, goal, P, BLOCK_P, BLOCK):
        high = 0
    else:
        low = 0
    while high - low > 1:
        middle = low + (high - low) // 2
        if needs_more(
            log_mass, width, count, scratch, totals, reads, middle, goal, P, BLOCK_P, BLOCK
        ):  # fmt: skip
            high = middle
        else:
            low = middle
    at = tl.zeros((), tl.int32 if SHIFT < 32 else tl.int64)
    noted = tl.zeros((16,), tl.int32 if SHIFT < 32 else tl.int64)
    head = tl.arange(0, BLOCK_P)
    before = tl.zeros((BLOCK_P,), tl.int64)
    for p in range(P):
        mass = mass_from(log_mass, width, count, scratch, totals, high, p, BLOCK_P, BLOCK)
        before = tl.where(head == p, quanta_read(reads, p, BLOCK_P) + mass, before)
    for start in range(0, count, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        is_unit = unit < count
        bits = tl.load(scratch + unit, mask=is_unit, other=-1)
        is_tie = (bits == low) & (bits >= 0)
        taken = bits >= high
        for p in range(P):
            own = quanta_of(log_mass, width, unit, is_tie, totals, p, BLOCK_P)
            own = tl.where(is_tie, own, 0)
            base = tl.sum(tl.where(head == p, before, 0), 0)
            taken = taken | (is_tie & (base + tl.cumsum(own, 0) - own < goal))
            before = tl.where(head == p, base + tl.sum(own, 0), before)
        taken = taken & is_unit
        hide_taken(log_mass, width, unit, taken, P)
        counts = tl.load(counts_at + unit, mask=taken, other=0)
        firsts = tl.load(firsts_at + unit, mask=taken, other=0)
        at, noted = emit(
            entries, capacity, unit, taken, firsts, counts, at, noted, edges, start, BLOCK, SHIFT
        )  # fmt: skip
    return at, noted

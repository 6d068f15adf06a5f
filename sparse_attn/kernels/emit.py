"""What a choice among units leaves behind: entries in order of columns, and their slots.

An entry is (first, count, place): a run of slots, or of clusters of a group, and where it lies
among what all entries hold. What they hold is written out, one number each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.search import low_part, packed


@triton.jit
def note_bounds(noted, before, first, edges, BLOCK: tl.constexpr):
    """`noted` [16], and what was before those of the columns `edges` that are among BLOCK from
    `first` on, of whose units `before` tells it.
    """
    place = edges - first
    is_here = (place >= 0) & (place < BLOCK)
    found = tl.gather(before, tl.where(is_here, place, 0), 0)
    return tl.where(is_here, found, noted)


@triton.jit
def emit(
    out, capacity, unit, taken, first_of, counts, at, noted, edges, first, BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Write (first, count, place) of taken units as entries; returns `at` behind them, and `noted`.

    A place is the sum of the counts before it. `at`, as `noted`, holds both numbers (`packed`).
    """
    own = tl.where(taken, packed(counts, SHIFT), 0)
    before = at + tl.cumsum(own, 0) - own
    number = (before >> SHIFT).to(tl.int32)
    entry = out + number * 3
    is_kept = taken & (number < capacity)
    tl.store(entry, first_of, mask=is_kept)
    tl.store(entry + 1, counts, mask=is_kept)
    tl.store(entry + 2, low_part(before, SHIFT), mask=is_kept)
    return at + tl.sum(own, 0), note_bounds(noted, before, first, edges, BLOCK)


@triton.jit
def expand(
    slots, capacity, entries, num_entries, BLOCK: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """What all entries hold, each from its place on: SPAN of BLOCK entries at a time."""
    for start in range(0, num_entries, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        is_entry = entry < num_entries
        first = tl.load(entries + entry * 3, mask=is_entry, other=0)
        size = tl.load(entries + entry * 3 + 1, mask=is_entry, other=0)
        place = tl.load(entries + entry * 3 + 2, mask=is_entry, other=0)
        for i in range(0, tl.max(size, 0), SPAN):
            each = i + tl.arange(0, SPAN)[None, :]
            is_slot = (each < size[:, None]) & (place[:, None] + each < capacity)
            tl.store(slots + place[:, None] + each, first[:, None] + each, mask=is_slot)


@triton.jit
def hide_taken(log_mass, width, unit, taken, P: tl.constexpr):
    """What is read exactly is not estimated too."""
    for p in tl.static_range(P):
        tl.store(log_mass + p * width + unit, -float("inf"), mask=taken)

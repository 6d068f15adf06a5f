"""The blocks that each tile of queries reads, from their scores: a search instead of two sorts.

Owns the choice of `blocks.take_best` in one launch, its lists rising as `BlockSelection` wants
them. Scores are compared as integers of the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST_AT_ONCE = 4096  # blocks held on the chip; of more, the rest is read again for every bit
ALWAYS = tl.constexpr((1 << 31) - 1)
NEVER = tl.constexpr(-(1 << 31))


@triton.jit
def ordered_scores(
    log_shares, start, num_units, num_always, stride_run, RUNS: tl.constexpr, CHUNK: tl.constexpr
):
    """Integers [CHUNK] in the order of the scores of blocks from `start`: the greatest of RUNS."""
    unit = start + tl.arange(0, CHUNK)
    is_unit = unit < num_units
    score = tl.load(log_shares + unit, mask=is_unit, other=-float("inf"))
    for run in tl.static_range(1, RUNS):
        at = log_shares + run * stride_run
        score = tl.maximum(score, tl.load(at + unit, mask=is_unit, other=-float("inf")))
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ ALWAYS, bits)
    return tl.where(is_unit, tl.where(unit < num_always, ALWAYS, bits), NEVER)


@triton.jit
def num_from(
    held, level, log_shares, num_units, num_always, stride_run,
    RUNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How many blocks score at least `level`; `held` are the scores of the first CHUNK."""
    found = (held >= level).to(tl.int32)
    for start in range(CHUNK, num_units, CHUNK):
        more = ordered_scores(log_shares, start, num_units, num_always, stride_run, RUNS, CHUNK)
        found += (more >= level).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def num_fitting(before_short, num_slots, num_units, budget_keys, BLOCK: tl.constexpr):
    """How many of the best blocks fit, where `before_short` come before the last one, which holds
    what is left of the slots.
    """
    short = num_slots - (num_units - 1) * BLOCK
    beside_short = tl.maximum(budget_keys - short, 0) // BLOCK
    takes_short = (short <= budget_keys) & (before_short <= beside_short)
    num = tl.where(takes_short, beside_short + 1, budget_keys // BLOCK)
    return tl.minimum(num, num_units)


@triton.jit
def take_best_kernel(
    log_shares, blocks, counts, num_slots, num_units, budget_keys, width, num_always,
    BLOCK: tl.constexpr, RUNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The blocks of the highest scores, one after another until the next exceeds budget_keys;
    the first `num_always` before all others, equal scores by lowest block.

    Grid: (tiles, G). log_shares [tiles, RUNS, G, num_units]; blocks [tiles, G, width], rising, -1
    where there are no more; counts [tiles, G]. The score of the last that fits is found bit by bit.
    Reads RUNS numbers of each block.
    """
    num_heads = tl.num_programs(1)
    of_list = (tl.program_id(0) * num_heads + tl.program_id(1)).to(tl.int64)
    stride_run = num_heads.to(tl.int64) * num_units
    first_run = tl.program_id(0).to(tl.int64) * RUNS * stride_run
    scores = log_shares + first_run + tl.program_id(1).to(tl.int64) * num_units
    held = ordered_scores(scores, 0, num_units, num_always, stride_run, RUNS, CHUNK)
    last = num_units - 1
    own = ordered_scores(scores, last, num_units, num_always, stride_run, RUNS, 1)
    short = tl.max(own, 0)
    before = num_from(held, short, scores, num_units, num_always, stride_run, RUNS, CHUNK) - 1
    num = num_fitting(before, num_slots, num_units, budget_keys, BLOCK)
    level = tl.full((), NEVER, tl.int32)
    if num_from(held, 0, scores, num_units, num_always, stride_run, RUNS, CHUNK) >= num:
        level = tl.full((), 0, tl.int32)
    for bit in range(31):
        higher = level + (1 << (30 - bit))
        if num_from(held, higher, scores, num_units, num_always, stride_run, RUNS, CHUNK) >= num:
            level = higher
    # No score is above ALWAYS; there the blocks at the level are all that there are.
    above = tl.full((), 0, tl.int32)
    if level < ALWAYS:
        above = num_from(held, level + 1, scores, num_units, num_always, stride_run, RUNS, CHUNK)
    num_taken = tl.full((), 0, tl.int32)
    num_equal = tl.full((), 0, tl.int32)
    chunk = held
    at = blocks + of_list * width
    for start in range(0, num_units, CHUNK):
        if start > 0:
            chunk = ordered_scores(scores, start, num_units, num_always, stride_run, RUNS, CHUNK)
        is_equal = (chunk == level).to(tl.int32)
        rank = num_equal + tl.cumsum(is_equal, 0)
        is_taken = (chunk > level) | ((is_equal == 1) & (rank <= num - above))
        place = num_taken + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        tl.store(at + place, start + tl.arange(0, CHUNK), mask=is_taken)
        num_equal += tl.sum(is_equal, 0)
        num_taken += tl.sum(is_taken.to(tl.int32), 0)
    for start in range(num, width, CHUNK):
        place = start + tl.arange(0, CHUNK)
        tl.store(at + place, -1, mask=place < width)
    tl.store(counts + of_list, num)

"""Decode attention over runs of slots: every key of a run, for the few queries of a step.

A run is a few hundred contiguous slots of one KV head that lie in one segment. Each run gives
one part, by itself and in a fixed order of its keys, so that bits depend neither on the batch nor
on how runs are dealt to programs; `merge.py` merges them in the order of the list. Flash-Decoding
(Dao et al. 2023) with a fixed division.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LN_2, LOG2_E, LOWEST, address, fit_queries, load_stored
from sparse_attn.kernels.early import take_turn

STEADY_SLOTS = 128  # of the keys that every query reads, where one program would wait for another
# Columns of a run: addresses of its first key and value, slots, index of its part within the head,
# head (document * G + KV head), and the place of its first slot among the tokens of the question
# (FAR_BEFORE for what every query sees), its flat slot (-1 where it has none), and the address of
# the scales of its keys and values, two float32, where they are in e4m3.
RUN_COLUMNS = 8
FAR_BEFORE = -(1 << 40)

MOST_AT_ONCE = 264  # programs of these kernels: two a multiprocessor


def run_slots(num_keys: int) -> int:
    """Slots of a run of a document with so many keys over its KV heads: a number of its own, the
    same in any batch.
    """
    return min(4096, max(256, 1 << max(0, num_keys // MOST_AT_ONCE - 1).bit_length()))


@triton.jit
def softmax_step(scores, values, high, total, out):
    """One step of the online softmax in base 2: scores [R, N], values [N, D]."""
    new_high = tl.maximum(high, tl.max(scores, 1))
    shrink = tl.exp2(high - new_high)
    weights = tl.exp2(scores - new_high[:, None])
    total = total * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None]
    out = tl.dot(weights.to(values.dtype), values, out, input_precision="ieee")
    return new_high, total, out


@triton.jit
def store_part(out_ptr, lse_ptr, rows, is_row, high, total, out, D: tl.constexpr):
    """Divide by the total and store at rows [R] of parts; a row that saw no key gives (0, -inf)."""
    is_seen = total > 0.0
    safe = tl.where(is_seen, total, 1.0)
    lse = tl.where(is_seen, (high + tl.log2(safe)) * LN_2, -float("inf"))
    tl.store(lse_ptr + rows, lse, mask=is_row)
    columns = tl.arange(0, D)[None, :]
    tl.store(out_ptr + rows[:, None] * D + columns, out / safe[:, None], mask=is_row[:, None])


@triton.jit
def attend_run(
    q, run, visible, part_out, part_lse, scores_at, scale, num_queries, num_parts, num_slots_kept,
    block,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr, KEEPS: tl.constexpr,
    STORED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The part of one run for a block of rows (query, head of the group).

    Slot j is hidden from query t unless first + j < visible[document] + t, the number of tokens
    that the first query sees, and, where WINDOW is not 0, unless it is among the last WINDOW of
    them. Where KEEPS, writes scaled scores [P, num_slots_kept] at the flat slot that the run names
    (-1: at none), of one query.
    STORED: the type of keys and values, KV or e4m3, whose scales are folded into the scores and
    into the part.
    """
    keys = address(run, STORED)
    values = address(run + 1, STORED)
    num_slots = tl.load(run + 2)
    part = tl.load(run + 3)
    head = tl.load(run + 4)
    first = tl.load(run + 5)
    flat = tl.load(run + 6)
    take_turn(EARLY)
    document = head // G
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    query = row // P
    is_row = query < num_queries
    problem = (document * num_queries + query) * G + head % G
    columns = tl.arange(0, D)
    q_rows = problem * P + row % P
    x = tl.load(q + q_rows[:, None] * D + columns[None, :], mask=is_row[:, None], other=0.0)
    scale *= LOG2_E
    if STORED == KV:
        x = x.to(KV)
    else:
        x, power = fit_queries(x, KV, STORED)
        scales = address(run + 7, tl.float32)
        scale *= tl.load(scales) * power[:, None]
    seen = tl.load(visible + document) - first + query  # slots of the run that each row sees
    high = tl.full((BLOCK_R,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    out = tl.zeros((BLOCK_R, D), tl.float32)
    for start in tl.range(0, num_slots, BLOCK_N, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_N)
        is_slot = slot < num_slots
        k = load_stored(keys, slot, is_slot, D, KV, STORED)
        v = load_stored(values, slot, is_slot, D, KV, STORED)
        scores = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        if KEEPS:
            kept = (row % P).to(tl.int64)[:, None] * num_slots_kept + flat + slot[None, :]
            is_kept = is_row[:, None] & is_slot[None, :] & (flat >= 0)
            tl.store(scores_at + kept, scores * LN_2, mask=is_kept)
        is_seen = is_slot[None, :] & (slot[None, :] < seen[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (slot[None, :] >= seen[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, -float("inf"))
        high, total, out = softmax_step(scores, v, high, total, out)
    if STORED != KV:
        out *= tl.load(scales + 1)
    rows = (problem * num_parts + part) * P + row % P
    store_part(part_out, part_lse, rows, is_row, high, total, out, D)


@triton.jit
def attend_runs_kernel(
    q, runs, visible, part_out, part_lse, scores, scale, num_queries, num_parts, num_slots,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr, KEEPS: tl.constexpr,
    STORED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q K^T) V over one run, for a block of rows.

    Grid: (runs, blocks of rows). Reads two rows of D elements of each of the run's slots.
    """
    attend_run(
        q, runs + tl.program_id(0).to(tl.int64) * 8, visible, part_out, part_lse, scores, scale,
        num_queries, num_parts, num_slots, tl.program_id(1), G, P, D, KV, BLOCK_R, BLOCK_N, STAGES,
        WINDOW, KEEPS, STORED, EARLY,
    )  # fmt: skip


@triton.jit
def spread_kernel(
    scores, slots, bounds, lse, evidence, num_slots,
    G: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """evidence[slot] += sum over heads of exp(score - lse), for what one query of each document
    read.

    Grid: (blocks, problems). scores [Z, P, num_slots] of the first bounds[z, 8] places, which are
    `slots` [Z, num_slots]; or [P, num_slots] of the flat slots of all documents, of problem z those
    from bounds[z, 0] to bounds[z, 1]. lse [Z, P]. evidence: int64 [documents, 2], the address of
    each one's masses and its first flat slot.
    """
    z = tl.program_id(1)
    row = evidence + z // G * 2
    masses = address(row, tl.float32)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if GATHERS:
        is_place = place < tl.load(bounds + z * 9 + 8)
        slot = tl.load(slots + z.to(tl.int64) * num_slots + place, mask=is_place, other=0)
        at = scores + z.to(tl.int64) * P * num_slots + place
        masses += slot
    else:
        slot = tl.load(bounds + z * 2) + place
        is_place = slot < tl.load(bounds + z * 2 + 1)
        at = scores + slot
        masses += slot - tl.load(row + 1)
    mass = tl.zeros((BLOCK,), tl.float32)
    for p in range(P):
        own = tl.load(at, mask=is_place, other=-float("inf"))
        mass += tl.exp(own - tl.load(lse + z * P + p))
        at += num_slots
    held = tl.load(masses, mask=is_place, other=0.0)
    tl.store(masses, held + mass, mask=is_place)

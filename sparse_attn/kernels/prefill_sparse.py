"""Attention of query tiles over their own lists of blocks, in both loop orders.

Queries outside: one program walks the list of a tile, as Native Sparse Attention does
(arXiv 2502.11089). Keys outside: one program holds a block and walks the tiles that chose it, as
Flash Sparse Attention does (arXiv 2508.18224), here over lists sorted by block instead of a dense
table; every (tile, block) pair writes its own part, and the parts of a tile are merged in the order
of its list, so that no order of programs changes a bit. Which order wins is a matter of rows a tile
has: tile_tokens * H / G.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LOG2_E, LOWEST
from sparse_attn.kernels.prefill_dense import (
    attend_tile,
    load_rows,
    row_offsets,
    softmax_step,
    store_rows,
)
from sparse_attn.kernels.prefill_select import attend_unread_units


@triton.jit
def rows_of_tile(program, num_tokens, ROWS: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr):
    """A program's tile of ROWS rows; its BLOCK_M rows within it and among all; which exist."""
    blocks: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    tile = program // blocks
    in_tile = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile * ROWS + in_tile
    return tile, in_tile, rows, (in_tile < ROWS) & (rows < num_tokens * P)


@triton.jit
def rows_of_step(entries, step, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Where the numbers of a step's BLOCK_N slots begin; a block is BLOCK // BLOCK_N steps."""
    steps: tl.constexpr = BLOCK // BLOCK_N
    first = tl.load(entries + step // steps) * BLOCK + step % steps * BLOCK_N
    return first.to(tl.int64) * D


@triton.jit
def attend_full_blocks(
    x, keys, values, entries, count, base_2, high, total, out,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`softmax_step` over `count` full blocks of a list.

    The scores of the next step are made while this one's become weights, so that tensor cores and
    the rest of a multiprocessor work at once; after the last step they are made once more, in vain.
    """
    place = tl.arange(0, BLOCK_N)[:, None] * D + tl.arange(0, D)[None, :]
    num_steps = count * (BLOCK // BLOCK_N)
    if num_steps > 0:
        k = tl.load(keys + rows_of_step(entries, 0, BLOCK, BLOCK_N, D) + place)
        scores = tl.dot(x, tl.trans(k), input_precision="ieee")
        for step in tl.range(0, num_steps, num_stages=STAGES):
            after = rows_of_step(entries, tl.minimum(step + 1, num_steps - 1), BLOCK, BLOCK_N, D)
            k = tl.load(keys + after + place)
            v = tl.load(values + rows_of_step(entries, step, BLOCK, BLOCK_N, D) + place)
            next_scores = tl.dot(x, tl.trans(k), input_precision="ieee")
            high, total, out = softmax_step(scores, base_2, v, high, total, out)
            scores = next_scores
    return high, total, out


@triton.jit
def attend_lists_kernel(
    q, k, v, blocks, counts, unit_keys, unit_values, flags, part_out, part_lse,
    scale, num_tokens, num_slots, num_units, width, stride_qt, stride_kg, stride_vg,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    READS: tl.constexpr, HAS_SHORT: tl.constexpr, HAS_TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q K^T) V over the blocks of a tile's list (READS), and over every other
    block as one term, exp(estimated log mass) times its mean value (HAS_TAIL).

    Grid: (tiles, and blocks of BLOCK_M rows in each, G). blocks [N, G, width] rising: only the
    document's last block may be short, so it comes last (HAS_SHORT) and is the only one masked;
    rows beyond the tile or the last token are computed and not stored. Reads 2 D elements of each
    slot of its blocks and of each unit.
    """
    g = tl.program_id(1)
    tile, _, rows, is_row = rows_of_tile(tl.program_id(0), num_tokens, TILE * P, P, BLOCK_M)
    x = load_rows(q, row_offsets(rows, is_row, g, stride_qt, P, D), is_row, D)
    high = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, D), tl.float32)
    of_list = (tile * G + g).to(tl.int64)
    if HAS_TAIL:
        own = g.to(tl.int64) * num_units * D
        high, total, out = attend_unread_units(
            x, unit_keys + own, unit_values + own,
            flags + of_list * num_units, num_units, num_slots, scale, high, total, out,
            D, BLOCK, BLOCK_U,
        )  # fmt: skip
    if READS:
        keys = k + g.to(tl.int64) * stride_kg
        values = v + g.to(tl.int64) * stride_vg
        entries = blocks + of_list * width
        count = tl.load(counts + of_list)
        full = count
        if HAS_SHORT:
            last = tl.load(entries + tl.maximum(count - 1, 0))
            full = count - ((count > 0) & ((last + 1) * BLOCK > num_slots)).to(tl.int32)
        base_2 = scale * LOG2_E
        high, total, out = attend_full_blocks(
            x, keys, values, entries, full, base_2, high, total, out, D, BLOCK, BLOCK_N, STAGES
        )
        if HAS_SHORT:
            seen = tl.zeros((BLOCK_M,), tl.int32) + num_slots
            for entry in range(full, count):
                start = tl.load(entries + entry) * BLOCK
                for first in tl.range(start, num_slots, BLOCK_N, num_stages=1):
                    high, total, out = attend_tile(
                        x, keys, values, first, num_slots, seen, base_2, high, total, out,
                        D, BLOCK_N,
                    )  # fmt: skip
    part_rows = (rows // P) * (G * P) + g * P + rows % P
    store_rows(part_out, part_lse, part_rows, is_row, high, total, out, D)


@triton.jit
def attend_pairs_kernel(
    q,
    k,
    v,
    pairs,
    first_pairs,
    item_blocks,
    item_firsts,
    pair_out,
    pair_lse,
    scale,
    num_tokens,
    num_slots,
    num_units,
    width,
    stride_qt,
    stride_kg,
    stride_vg,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One part per (query tile, block) pair: softmax(scale q K^T) V over the one block.

    Grid: items of at most PAIRS pairs of one (KV head, block); the block stays on chip while the
    rows of its pairs pass in steps of BLOCK_M. pairs: [N*G*width] int32, places in the lists,
    sorted by (KV head, block); first_pairs: [G*num_units + 1] int32, where each begins;
    item_blocks: g * num_units + block of each item (G*num_units: none); item_firsts: its first
    pair. Only slots beyond the end are masked. Reads 2 D elements of BLOCK slots and
    D of each row.
    """
    item = tl.program_id(0)
    of_block = tl.load(item_blocks + item)
    if of_block < G * num_units:
        g = of_block // num_units
        first = tl.load(item_firsts + item)
        last = tl.minimum(first + PAIRS, tl.load(first_pairs + of_block + 1))
        slot = of_block % num_units * BLOCK + tl.arange(0, BLOCK)
        is_slot = slot < num_slots
        place = slot[:, None].to(tl.int64) * D + tl.arange(0, D)[None, :]
        key = tl.load(k + g.to(tl.int64) * stride_kg + place, mask=is_slot[:, None], other=0.0)
        value = tl.load(v + g.to(tl.int64) * stride_vg + place, mask=is_slot[:, None], other=0.0)
        for start in tl.range(0, (last - first) * (TILE * P), BLOCK_M, num_stages=STAGES):
            row = start + tl.arange(0, BLOCK_M)
            is_row = first + row // (TILE * P) < last
            pair = tl.load(pairs + first + row // (TILE * P), mask=is_row, other=0)
            rows = pair // (G * width) * (TILE * P) + row % (TILE * P)
            is_row = is_row & (rows < num_tokens * P)
            x = load_rows(q, row_offsets(rows, is_row, g, stride_qt, P, D), is_row, D)
            scores = tl.dot(x, tl.trans(key), input_precision="ieee")
            scores = tl.where(is_slot[None, :], scores, -float("inf"))
            high = tl.full((BLOCK_M,), LOWEST, tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            out = tl.zeros((BLOCK_M, D), tl.float32)
            high, total, out = softmax_step(scores, scale * LOG2_E, value, high, total, out)
            at = pair * (TILE * P) + row % (TILE * P)
            store_rows(pair_out, pair_lse, at, is_row, high, total, out, D)


@triton.jit
def merge_pairs_kernel(
    pair_out,
    pair_lse,
    counts,
    part_out,
    part_lse,
    num_tokens,
    width,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The parts of a tile's pairs, merged in the order of its list: sum exp(lse - max) out.

    Grid: (tiles, and blocks of BLOCK_M rows in each, G). Reads D + 2 elements of each row and pair.
    """
    g = tl.program_id(1)
    tile, in_tile, rows, is_row = rows_of_tile(tl.program_id(0), num_tokens, TILE * P, P, BLOCK_M)
    high = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, D), tl.float32)
    of_list = (tile * G + g).to(tl.int64)
    columns = tl.arange(0, D)[None, :]
    for place in range(tl.load(counts + of_list)):
        at = (of_list * width + place) * (TILE * P) + in_tile
        lse = tl.load(pair_lse + at, mask=is_row, other=-float("inf")) * LOG2_E
        part = tl.load(pair_out + at[:, None] * D + columns, mask=is_row[:, None], other=0.0)
        new_high = tl.maximum(high, lse)
        shrink = tl.exp2(high - new_high)
        weight = tl.exp2(lse - new_high)
        total = total * shrink + weight
        out = out * shrink[:, None] + part.to(tl.float32) * weight[:, None]
        high = new_high
    part_rows = (rows // P) * (G * P) + g * P + rows % P
    store_rows(part_out, part_lse, part_rows, is_row, high, total, out, D)

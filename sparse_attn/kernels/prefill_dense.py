"""Dense attention of many queries, and the tile of the online softmax that all of prefill shares.

Owns the arithmetic of one tile (base 2 inside, natural log outside, float32 sums) and how the rows
of a KV head are laid out: row r of a run of tokens is (token r // P, head r % P of the group), so
that a key is read once for all query heads of its group. Online softmax: FlashAttention-2
(arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LN_2, LOG2_E, LOWEST


@triton.jit
def row_offsets(rows, is_row, g, stride_t, P: tl.constexpr, D: tl.constexpr):
    """Where rows [R] of KV head g begin in a tensor [T, H, D], as int64."""
    safe = tl.where(is_row, rows, 0)
    return (safe // P).to(tl.int64) * stride_t + (g * P + safe % P) * D


@triton.jit
def load_rows(x, offsets, is_row, D: tl.constexpr):
    """Rows [R, D] of x; zeros where there is none."""
    columns = tl.arange(0, D)[None, :]
    return tl.load(x + offsets[:, None] + columns, mask=is_row[:, None], other=0.0)


@triton.jit
def softmax_step(scores, base_2, values, high, total, out):
    """One step of the online softmax: scores [R, N], -inf where hidden; base_2 > 0 brings them to
    base 2, fused with the subtraction of the maximum; values [N, D].
    """
    new_high = tl.maximum(high, tl.max(scores, 1) * base_2)
    weights = tl.exp2(scores * base_2 - new_high[:, None])
    shrink = tl.exp2(high - new_high)
    total = total * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None]
    out = tl.dot(weights.to(values.dtype), values, out, input_precision="ieee")
    return new_high, total, out


@triton.jit
def attend_tile(
    x,
    keys,
    values,
    first,
    stop,
    seen,
    base_2,
    high,
    total,
    out,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`softmax_step` over BLOCK_N slots from `first`; row r sees those below seen[r] <= stop."""
    slot = first + tl.arange(0, BLOCK_N)
    is_slot = (slot < stop)[:, None]
    place = slot[:, None].to(tl.int64) * D + tl.arange(0, D)[None, :]
    k = tl.load(keys + place, mask=is_slot, other=0.0)
    v = tl.load(values + place, mask=is_slot, other=0.0)
    scores = tl.dot(x, tl.trans(k), input_precision="ieee")
    scores = tl.where(slot[None, :] < seen[:, None], scores, -float("inf"))
    return softmax_step(scores, base_2, v, high, total, out)


@triton.jit
def attend_full_tile(
    x, keys, values, first, base_2, high, total, out, D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """`attend_tile` over BLOCK_N slots that all exist: nothing is masked."""
    place = tl.arange(0, BLOCK_N)[:, None] * D + tl.arange(0, D)[None, :]
    start = tl.cast(first, tl.int64) * D
    k = tl.load(keys + start + place)
    v = tl.load(values + start + place)
    scores = tl.dot(x, tl.trans(k), input_precision="ieee")
    return softmax_step(scores, base_2, v, high, total, out)


@triton.jit
def store_rows(part_out, part_lse, rows, is_row, high, total, out, D: tl.constexpr):
    """Store rows [R] of parts [.., D], [..]; a row that saw no key gives (0, -inf)."""
    is_seen = total > 0.0
    safe = tl.where(is_seen, total, 1.0)
    lse = tl.where(is_seen, (high + tl.log2(safe)) * LN_2, -float("inf"))
    tl.store(part_lse + rows, lse, mask=is_row)
    place = rows[:, None].to(tl.int64) * D + tl.arange(0, D)[None, :]
    tl.store(part_out + place, (out / safe[:, None]).to(part_out.dtype.element_ty), is_row[:, None])


@triton.jit
def attend_dense_kernel(
    q,
    k,
    v,
    part_out,
    part_lse,
    scale,
    num_tokens,
    num_slots,
    stride_qt,
    stride_kg,
    stride_vg,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = softmax(scale q K^T) V, lse = log sum exp(scale q K^T), over all slots.

    Grid: (blocks of BLOCK_M rows of one KV head, G); CAUSAL hides slot j from token t where
    j > num_slots - num_tokens + t, longest rows first. Only tiles that cross the diagonal or the
    end are masked. Reads 2 D elements of each slot that a row of the block sees.
    """
    block = tl.program_id(0)
    g = tl.program_id(1)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_tokens * P
    x = load_rows(q, row_offsets(rows, is_row, g, stride_qt, P, D), is_row, D)
    keys = k + g.to(tl.int64) * stride_kg
    values = v + g.to(tl.int64) * stride_vg
    high = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, D), tl.float32)
    base_2 = scale * LOG2_E
    stop = num_slots
    all_see = num_slots
    if CAUSAL:
        past = num_slots - num_tokens
        last_token = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // P, num_tokens - 1)
        stop = past + last_token + 1
        all_see = past + block * BLOCK_M // P + 1
    full = all_see // BLOCK_N * BLOCK_N
    for first in tl.range(0, full, BLOCK_N, num_stages=STAGES):
        high, total, out = attend_full_tile(
            x, keys, values, first, base_2, high, total, out, D, BLOCK_N
        )
    seen = tl.zeros((BLOCK_M,), tl.int32) + stop
    if CAUSAL:
        seen = num_slots - num_tokens + 1 + rows // P
    for first in tl.range(full, stop, BLOCK_N, num_stages=1):
        high, total, out = attend_tile(
            x, keys, values, first, stop, seen, base_2, high, total, out, D, BLOCK_N
        )
    part_rows = (rows // P) * (G * P) + g * P + rows % P
    store_rows(part_out, part_lse, part_rows, is_row, high, total, out, D)

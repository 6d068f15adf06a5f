"""Attention of many query tokens by Triton kernels: dense, over lists of blocks, and their choice.

Owns what callers see of the prefill kernels: checks, launch shapes and scratch memory. Twins with
the same signatures are in `reference_prefill.py`. Query head h reads KV head h // (H // G). Inputs
are bfloat16 or float16 (float32 under the interpreter), parts are float32. Nothing here waits for
the device, and scratch does not grow with queries x keys: blocks are scored again instead of kept,
and parts of pairs are made for as many tokens as fit in `max_scratch_bytes`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import triton
from torch import Tensor

from sparse_attn.blocks import BlockSelection, BlockUnits
from sparse_attn.errors import ShapeMismatch
from sparse_attn.kernels.prefill_checks import check_budget, check_lists, check_tensors, check_tile
from sparse_attn.kernels.prefill_choose import MOST_AT_ONCE, take_best_kernel
from sparse_attn.kernels.prefill_dense import attend_dense_kernel
from sparse_attn.kernels.prefill_launch import (
    LANES,
    Launch,
    fitted,
    launches,
    padded,
    pairs_per_item,
)
from sparse_attn.kernels.prefill_select import greatest_shares_kernel, log_sums_kernel
from sparse_attn.kernels.prefill_sparse import (
    attend_lists_kernel,
    attend_pairs_kernel,
    merge_pairs_kernel,
)
from sparse_attn.state import Part, empty_part, merge_parts

Order = Literal["queries", "keys"]
_SCRATCH_BYTES = 1 << 30
_MERGED_ROWS = 16


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, launch: Launch | None = None
) -> Part:
    """Attention of q [T, H, D] over every key of k, v [G, S, D]."""
    return _attend_dense(q, k, v, scale, launch, is_causal=False)


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, launch: Launch | None = None
) -> Part:
    """`attend_dense` where token t of T sees keys 0 to S - T + t: the last T keys are its own."""
    if k.shape[1] < q.shape[0]:
        raise ShapeMismatch(
            f"keys of a causal chunk: {k.shape[1]}, at least its {q.shape[0]} tokens; "
            "append the chunk's own keys first"
        )
    return _attend_dense(q, k, v, scale, launch, is_causal=True)


def select_blocks(
    q: Tensor,
    units: BlockUnits,
    *,
    budget_keys: int,
    tile_tokens: int,
    scale: float,
    num_always: int = 0,
    max_scratch_bytes: int = _SCRATCH_BYTES,
) -> BlockSelection:
    """The blocks that each tile of q [T, H, D] and KV head reads.

    A block's score is the greatest share of attention that any query and head of the tile is
    estimated to give it; the first `num_always` blocks (sinks) and then the best are taken until
    the next exceeds `budget_keys`, equal scores by lowest block.
    """
    num_tokens = q.shape[0]
    num_kv_heads, num_units, _ = units.keys.shape
    check_tensors(q, units.keys, units.values, scale)
    check_tile(units.block, tile_tokens)
    check_budget(budget_keys)
    num_tiles = triton.cdiv(num_tokens, tile_tokens)
    if not (num_tokens and num_units):
        none = torch.empty((num_tiles, num_kv_heads, 0), dtype=torch.int64, device=q.device)
        return BlockSelection.of(none, block=units.block, tile_tokens=tile_tokens)
    budget_keys = min(budget_keys, units.num_slots)
    has_short = units.num_slots % units.block != 0
    width = max(1, min(num_units, budget_keys // units.block + has_short))
    blocks = torch.empty((num_tiles, num_kv_heads, width), dtype=torch.int32, device=q.device)
    counts = torch.empty((num_tiles, num_kv_heads), dtype=torch.int32, device=q.device)
    runs = _rows_and_runs(q, units, tile_tokens)[1]
    tiles = max(1, max_scratch_bytes // (4 * runs * num_kv_heads * num_units))
    for start in range(0, num_tiles, tiles):
        some = slice(start, start + tiles)
        shares = _greatest_shares(
            q[start * tile_tokens : (start + tiles) * tile_tokens], units, tile_tokens, scale
        )
        take_best_kernel[shares.shape[0], num_kv_heads](
            shares, blocks[some], counts[some], units.num_slots, num_units, budget_keys, width,
            num_always, BLOCK=units.block, RUNS=runs, CHUNK=min(MOST_AT_ONCE, padded(num_units)),
            num_warps=4,
        )  # fmt: skip
    return BlockSelection(blocks=blocks, counts=counts, block=units.block, tile_tokens=tile_tokens)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float,
    tail: BlockUnits | None = None,
    order: Order = "queries",
    launch: Launch | None = None,
    max_scratch_bytes: int = _SCRATCH_BYTES,
) -> Part:
    """Attention of q [T, H, D] over the selected blocks of k, v [G, S, D].

    tail: the statistics of the same keys; every block that is not read is then one term of the same
    softmax, its mean value at its mean key's score, so that the part covers all S keys. order:
    which loop is outside.
    """
    check_tensors(q, k, v, scale)
    check_lists(q, k.shape[0], k.shape[1], selection, tail)
    if order == "queries":
        return _attend_lists(q, (k, v), selection, tail, scale, launch)
    parts = [_attend_pairs(q, k, v, selection, scale, launch, max_scratch_bytes)]
    if tail is not None:
        parts.append(_attend_lists(q, None, selection, tail, scale, None))
    return merge_parts(parts)


def attend_unread(q: Tensor, units: BlockUnits, selection: BlockSelection, *, scale: float) -> Part:
    """The estimated part of q [T, H, D] over every block that is not selected."""
    check_tensors(q, units.keys, units.values, scale)
    check_lists(q, units.keys.shape[0], units.num_slots, selection, units)
    return _attend_lists(q, None, selection, units, scale, None)


def _attend_dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, launch: Launch | None, *, is_causal: bool
) -> Part:
    check_tensors(q, k, v, scale)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_slots, _ = k.shape
    if not (num_tokens and num_slots):
        return empty_part(num_tokens, num_heads, head_dim, q.device)
    per_group = num_heads // num_kv_heads
    shape = fitted(launch or launches(head_dim).dense, rows=num_tokens * per_group)
    part = _new_part(q)
    attend_dense_kernel[(triton.cdiv(num_tokens * per_group, shape.block_m), num_kv_heads)](
        q, k, v, *part, scale, num_tokens, num_slots, q.stride(0), k.stride(0), v.stride(0),
        G=num_kv_heads, P=per_group, D=head_dim, CAUSAL=is_causal,
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, STAGES=shape.num_stages,
        **shape.options(),
    )  # fmt: skip
    return part


def _attend_lists(
    q: Tensor,
    kv: tuple[Tensor, Tensor] | None,
    selection: BlockSelection,
    tail: BlockUnits | None,
    scale: float,
    launch: Launch | None,
) -> Part:
    """Queries outside: the lists of tiles, the unread units, or both in one softmax."""
    num_tokens, num_heads, head_dim = q.shape
    num_tiles, num_kv_heads, width = selection.blocks.shape
    if not num_tokens:
        return empty_part(0, num_heads, head_dim, q.device)
    per_group, block = num_heads // num_kv_heads, selection.block
    k, v = (q, q) if kv is None else kv  # never read where there is none
    num_slots = k.shape[1] if tail is None else tail.num_slots
    num_units = -(-num_slots // block)
    rows = selection.tile_tokens * per_group
    shape = fitted(launch or launches(head_dim).lists, rows=rows, block=block)
    part = _new_part(q)
    tables = (q, q) if tail is None else (tail.keys, tail.values)
    flags = selection.blocks if tail is None else selection.flags(num_units)
    attend_lists_kernel[(num_tiles * triton.cdiv(rows, shape.block_m), num_kv_heads)](
        q, k, v, selection.blocks, selection.counts, *tables, flags, *part, scale,
        num_tokens, num_slots, num_units, width, q.stride(0), k.stride(0), v.stride(0),
        G=num_kv_heads, P=per_group, D=head_dim, TILE=selection.tile_tokens, BLOCK=block,
        READS=kv is not None, HAS_SHORT=num_slots % block != 0, HAS_TAIL=tail is not None,
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_U=launches(head_dim).unread_units,
        STAGES=shape.num_stages, **shape.options(),
    )  # fmt: skip
    return part


def _attend_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    scale: float,
    launch: Launch | None,
    max_scratch_bytes: int,
) -> Part:
    """Keys outside, for as many tiles at a time as the scratch allows."""
    num_heads, head_dim = q.shape[1:]
    width, tile = selection.blocks.shape[2], selection.tile_tokens
    part = _new_part(q)
    tile_bytes = tile * num_heads * width * (head_dim * q.element_size() + 4)
    tiles = max(1, max_scratch_bytes // tile_bytes)
    for first in range(0, selection.blocks.shape[0], tiles):
        some = slice(first, first + tiles)
        tokens = slice(first * tile, (first + tiles) * tile)
        own = replace(selection, blocks=selection.blocks[some], counts=selection.counts[some])
        _attend_pairs_once(q[tokens], k, v, own, scale, launch, Part(*(x[tokens] for x in part)))
    return part


def _attend_pairs_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    scale: float,
    launch: Launch | None,
    part: Part,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    num_tiles, num_kv_heads, width = selection.blocks.shape
    num_slots, tile, block = k.shape[1], selection.tile_tokens, selection.block
    per_group, num_units = num_heads // num_kv_heads, -(-num_slots // block)
    rows = tile * per_group
    shape, per_item = launch or launches(head_dim).pairs, pairs_per_item(rows)
    pairs, first_pairs, item_blocks, item_firsts = _invert(selection, num_units, per_item)
    num_rows = num_tiles * num_kv_heads * width * rows
    pair_out = torch.empty(num_rows, head_dim, dtype=q.dtype, device=q.device)
    pair_lse = torch.empty(num_rows, dtype=torch.float32, device=q.device)
    constants = {"G": num_kv_heads, "P": per_group, "D": head_dim, "TILE": tile}
    attend_pairs_kernel[(item_blocks.shape[0],)](
        q, k, v, pairs, first_pairs, item_blocks, item_firsts, pair_out, pair_lse, scale,
        num_tokens, num_slots, num_units, width, q.stride(0), k.stride(0), v.stride(0),
        **constants, BLOCK=block, BLOCK_M=shape.block_m, PAIRS=per_item, STAGES=shape.num_stages,
        **shape.options(),
    )  # fmt: skip
    merged = min(_MERGED_ROWS, padded(rows))
    merge_pairs_kernel[(num_tiles * triton.cdiv(rows, merged), num_kv_heads)](
        pair_out, pair_lse, selection.counts, *part, num_tokens, width,
        **constants, BLOCK_M=merged, num_warps=4,
    )  # fmt: skip


def _invert(
    selection: BlockSelection, num_units: int, per_item: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists by tile turned into lists by (KV head, block), and those cut into items of work.

    Returns what `attend_pairs_kernel` calls pairs, first_pairs, item_blocks, item_firsts; there are
    as many items as any selection of this shape could need.
    """
    blocks, device = selection.blocks, selection.blocks.device
    num_lists = blocks.shape[1] * num_units
    head = torch.arange(blocks.shape[1], dtype=torch.int32, device=device).view(1, -1, 1)
    keys = torch.where(blocks < 0, num_lists, head * num_units + blocks).flatten()
    keys, pairs = keys.sort(stable=True)
    lists = torch.arange(num_lists + 1, dtype=torch.int32, device=device)
    first_pairs = torch.searchsorted(keys, lists, out_int32=True)
    num_items = (first_pairs[1:] - first_pairs[:-1] + per_item - 1) // per_item
    ends = num_items.cumsum(dim=0)
    most = min(pairs.numel(), pairs.numel() // per_item + num_lists)
    item = torch.arange(most, device=device)
    of_block = torch.searchsorted(ends, item, right=True)
    safe = of_block.clamp(max=num_lists - 1)
    firsts = first_pairs[safe] + (item - ends[safe] + num_items[safe]) * per_item
    return pairs.int(), first_pairs, of_block.int(), firsts.int()


def _rows_and_runs(q: Tensor, units: BlockUnits, tile_tokens: int) -> tuple[int, int]:
    """Rows among which a program finds the greatest share, and runs of so many rows in a tile."""
    tile_rows = tile_tokens * padded(q.shape[1] // units.keys.shape[0])
    rows = min(tile_rows, launches(q.shape[2]).shares.block_m)
    return rows, tile_rows // rows


def _greatest_shares(q: Tensor, units: BlockUnits, tile_tokens: int, scale: float) -> Tensor:
    """log of the greatest share of each block within each run of a tile: [N, runs, G, U] float32,
    -inf for a run without rows.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_units, _ = units.keys.shape
    per_group, of_sums, of_shares = (
        num_heads // num_kv_heads, launches(head_dim).log_sums, launches(head_dim).shares
    )  # fmt: skip
    head_rows = padded(per_group)
    rows, runs = _rows_and_runs(q, units, tile_tokens)
    num_tiles = triton.cdiv(num_tokens, tile_tokens)
    log_sums = torch.empty(num_kv_heads, num_tokens * head_rows, device=q.device)
    shares = torch.empty(num_tiles, runs, num_kv_heads, num_units, device=q.device)
    constants = {"P": per_group, "P_PADDED": head_rows, "D": head_dim, "BLOCK": units.block}
    log_sums_kernel[triton.cdiv(num_tokens * head_rows, of_sums.block_m), num_kv_heads](
        q, units.keys, units.variances, log_sums, scale, num_tokens, units.num_slots, num_units,
        q.stride(0), **constants, BLOCK_M=of_sums.block_m, BLOCK_U=of_sums.block_n,
        LANES=LANES, STAGES=of_sums.num_stages, **of_sums.options(),
    )  # fmt: skip
    greatest_shares_kernel[triton.cdiv(num_tiles * runs * rows, of_shares.block_m), num_kv_heads](
        q, units.keys, units.variances, log_sums, shares, scale, num_tokens, units.num_slots,
        num_units, num_tiles * runs, q.stride(0), **constants, G=num_kv_heads, ROWS=rows,
        BLOCK_M=of_shares.block_m, BLOCK_U=of_shares.block_n, STAGES=of_shares.num_stages,
        **of_shares.options(),
    )  # fmt: skip
    return shares


def _new_part(q: Tensor) -> Part:
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    return Part(out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device))

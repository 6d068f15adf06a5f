"""What the prefill kernels accept: shapes, types and places, and the sentence for what they do not.

Looks at no element of any tensor, so that nothing waits for the device: a selection made by hand
goes through `BlockSelection.of`, and its blocks must exist.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparse_attn.blocks import BlockSelection, BlockUnits
from sparse_attn.errors import AttentionError, InvalidBudget, ShapeMismatch

HEAD_DIMS = (64, 128, 256)
BLOCKS = (64, 128)
TILES = (1, 16, 64)
MAX_GROUP = 16


def check_tensors(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """q [T, H, D], k, v [G, S, D]: one type and device, heads in groups, rows contiguous."""
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ShapeMismatch(
            f"q, k, v: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, expected [T, H, D] "
            "and twice [G, S, D]; pass one layer of one document"
        )
    if q.shape[2] not in HEAD_DIMS:
        raise ShapeMismatch(f"head dim: {q.shape[2]}, one of {HEAD_DIMS}; use --backend torch")
    per_group, rest = divmod(q.shape[1], k.shape[0])
    if rest or not 1 <= per_group <= MAX_GROUP:
        raise ShapeMismatch(
            f"query heads per KV head: {q.shape[1]} / {k.shape[0]}, 1 to {MAX_GROUP}; "
            "use --backend torch"
        )
    _check_kinds((q, k, v))
    if any(x.stride(2) != 1 or x.stride(1) != x.shape[2] for x in (q, k, v) if x.numel()):
        raise ShapeMismatch(
            f"strides of q, k, v: {q.stride()}, {k.stride()}, {v.stride()}, the last two of each "
            "those of contiguous rows; call .contiguous() first"
        )
    if not 0.0 < scale < float("inf"):
        raise AttentionError(f"scale: {scale}, above 0 and finite; pass head_dim ** -0.5")


def check_lists(
    q: Tensor, num_kv_heads: int, num_slots: int, selection: BlockSelection, tail: BlockUnits | None
) -> None:
    """One list for each query tile and KV head; the tail stands for the same keys."""
    check_tile(selection.block, selection.tile_tokens)
    expected = (-(-q.shape[0] // selection.tile_tokens), num_kv_heads)
    found = tuple(selection.blocks.shape[:2])
    if found != expected or tuple(selection.counts.shape) != expected:
        raise ShapeMismatch(
            f"lists of blocks: {found}, {expected} tiles and KV heads; select for these tokens"
        )
    if tail is not None and (tail.num_slots, tail.block) != (num_slots, selection.block):
        raise ShapeMismatch(
            f"slots and block of the tail: {tail.num_slots}, {tail.block}, those of keys and "
            f"selection are {num_slots}, {selection.block}; call block_units on these keys"
        )


def check_tile(block: int, tile_tokens: int) -> None:
    """Blocks and query tiles have sizes that kernels exist for."""
    if block not in BLOCKS or tile_tokens not in TILES:
        raise ShapeMismatch(
            f"slots of a block, tokens of a query tile: {block}, {tile_tokens}, one of {BLOCKS} "
            f"and of {TILES}; choose among these"
        )


def check_budget(budget_keys: int) -> None:
    """A budget is a number of keys."""
    if budget_keys < 0:
        raise InvalidBudget(f"budget: {budget_keys} keys, at least 0; give a larger budget")


def _check_kinds(tensors: tuple[Tensor, ...]) -> None:
    is_interpreted = tensors[0].device.type == "cpu"
    if is_interpreted and not triton.knobs.runtime.interpret:
        raise AttentionError(
            "device: cpu, kernels need a GPU or the interpreter; use --backend torch"
        )
    dtypes = [torch.bfloat16, torch.float16, *([torch.float32] if is_interpreted else [])]
    if tensors[0].dtype not in dtypes or len({(x.dtype, x.device) for x in tensors}) > 1:
        found = [f"{x.dtype} on {x.device}" for x in tensors]
        raise AttentionError(f"q, k, v: {found}, one of {dtypes} on one device; convert them")

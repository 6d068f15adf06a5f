"""Sparse prefill in vectorised torch: the twins of `kernels/prefill.py` for CPUs and doubts.

Owns how tiles are batched: the keys that a few tiles read are gathered side by side, so that one
product serves them all. Lists are padded to one width and what is padding is masked, so nothing
waits for the device; memory is bounded by `_BATCH_BYTES`, not by queries x keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparse_attn.blocks import BlockSelection, BlockUnits, take_best
from sparse_attn.state import LOWEST, Part, empty_part
from sparse_attn.torch_backend import scaled_product, score_units, softmax_product, widened

# Of scores, gathered keys and values at a time.
_BATCH_BYTES = 64 << 20


def select_blocks(
    q: Tensor,
    units: BlockUnits,
    *,
    budget_keys: int,
    tile_tokens: int,
    scale: float,
    num_always: int = 0,
) -> BlockSelection:
    """The blocks that each tile of q [T, H, D] and KV head reads; see `kernels.prefill`."""
    num_kv_heads = units.keys.shape[0]
    per_group = q.shape[1] // num_kv_heads
    shares = []
    for g in range(num_kv_heads):
        log_mass, _ = _score(q[:, g * per_group : (g + 1) * per_group], units, g, scale)
        log_share = log_mass - log_mass.logsumexp(dim=2, keepdim=True)
        by_token = _by_tile(log_share.amax(dim=1), tile_tokens, padding=-torch.inf)
        shares.append(by_token.amax(dim=1))
    best = take_best(
        torch.stack(shares, dim=1), budget_keys=budget_keys, units=units, num_always=num_always
    )
    return BlockSelection.of(best, block=units.block, tile_tokens=tile_tokens)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float,
    tail: BlockUnits | None = None,
) -> Part:
    """Attention of q [T, H, D] over the selected blocks of k, v [G, S, D]; with `tail`, every other
    block is one term of the same softmax.
    """
    num_tokens, num_heads, head_dim = q.shape
    if not num_tokens:
        return empty_part(0, num_heads, head_dim, q.device)
    heads = q.view(num_tokens, k.shape[0], -1, head_dim).unbind(1)
    parts = [_attend_head(heads[g], k, v, selection, tail, g, scale) for g in range(k.shape[0])]
    out, lse = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return Part(out, lse)


def _attend_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    tail: BlockUnits | None,
    g: int,
    scale: float,
) -> Part:
    """One KV head's q [T, P, D], a few tiles at a time."""
    num_tokens, per_group, head_dim = q.shape
    rows, blocks = _by_tile(q, selection.tile_tokens, padding=0.0), selection.blocks[:, g]
    width = blocks.shape[1] * selection.block + (0 if tail is None else tail.keys.shape[1])
    row_bytes = 4 * selection.tile_tokens * per_group + 2 * head_dim * k.element_size()
    batch = max(1, _BATCH_BYTES // (width * row_bytes))
    columns = []
    for some, own in zip(torch.split(rows, batch), torch.split(blocks, batch), strict=True):
        scores, values = _read(some.flatten(1, 2), k[g], v[g], own, selection.block, scale)
        if tail is not None:
            unread = _unread(some, tail, own, g, scale)
            means = widened(tail.values[g]).expand(len(own), -1, -1)
            scores, values = torch.cat([scores, unread], 2), torch.cat([values, means], 1)
        columns.append(softmax_product(scores, values, may_hide=True))
    out, lse = (torch.cat(column) for column in zip(*columns, strict=True))
    return Part(
        out.float().reshape(-1, per_group, head_dim)[:num_tokens],
        lse.reshape(-1, per_group)[:num_tokens],
    )


def _read(
    rows: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Scores [n, R, W*block] of rows [n, R, D] over their blocks [n, W], LOWEST where padded, and
    the values.
    """
    slots = blocks.unsqueeze(2) * block + torch.arange(block, device=blocks.device)
    is_key = ((blocks >= 0).unsqueeze(2) & (slots < k.shape[0])).flatten(1)
    place = slots.flatten(1).clamp(0, k.shape[0] - 1).flatten()
    keys, values = (widened(x.index_select(0, place)).view(*is_key.shape, -1) for x in (k, v))
    scores = scaled_product(widened(rows), keys, scale)
    return scores.masked_fill_(~is_key.unsqueeze(1), LOWEST), values


def _unread(rows: Tensor, tail: BlockUnits, blocks: Tensor, g: int, scale: float) -> Tensor:
    """Log mass without spread [n, R, U] of every block that is not in blocks [n, W], LOWEST
    elsewhere, for rows [n, tile, P, D].
    """
    _, mass = _score(rows.flatten(0, 1), tail, g, scale)
    mass = mass.view(*rows.shape[:3], -1).flatten(1, 2)
    num_units = mass.shape[2]
    place = torch.where(blocks < 0, num_units, blocks).long()
    is_read = torch.zeros(len(blocks), num_units + 1, dtype=torch.bool, device=blocks.device)
    is_read.scatter_(1, place, True)
    return mass.masked_fill_(is_read[:, None, :num_units], LOWEST)


def _score(q: Tensor, units: BlockUnits, g: int, scale: float) -> tuple[Tensor, Tensor]:
    """Log mass [T, P, U] of KV head g's blocks for q [T, P, D], with their spread and without."""
    log_sizes = units.sizes().log()
    return score_units(
        q, units.keys[g], units.variances[g], log_sizes, (2.0 * log_sizes).sqrt(), scale=scale
    )


def _by_tile(x: Tensor, tile_tokens: int, *, padding: float) -> Tensor:
    """[T, ...] as [N, tile_tokens, ...], the last tile filled up."""
    missing = -x.shape[0] % tile_tokens
    filled = functional.pad(x, (0, 0) * (x.dim() - 1) + (0, missing), value=padding)
    return filled.reshape(-1, tile_tokens, *x.shape[1:])

"""The definition of sparse prefill, in float32 with loops: the twins of `kernels/prefill.py`.

Imports `reference.py`, the types of lists and units, and no kernel. Never used in production.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn import reference
from sparse_attn.blocks import BlockSelection, BlockUnits
from sparse_attn.state import Part, empty_part


def attend_dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part:
    """Attention of q [T, H, D] over every key of k, v [G, S, D]."""
    return reference.attend(q, k, v, scale=scale)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part:
    """Token t of q [T, H, D] sees keys 0 to S - T + t of k, v [G, S, D]."""
    past = k.shape[1] - q.shape[0]
    mask = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool, device=q.device).tril(past)
    return reference.attend(q, k, v, scale=scale, mask=mask)


def block_units(k: Tensor, v: Tensor, *, block: int) -> BlockUnits:
    """Mean, variance and mean value of each run of `block` slots of k, v [G, S, D]."""
    num_units = -(-k.shape[1] // block)
    keys = torch.empty(k.shape[0], num_units, k.shape[2], device=k.device)
    variances, values = torch.empty_like(keys), torch.empty_like(keys)
    for g in range(k.shape[0]):
        for u in range(num_units):
            run = slice(u * block, (u + 1) * block)
            keys[g, u] = k[g, run].float().mean(dim=0)
            variances[g, u] = k[g, run].float().var(dim=0, correction=0)
            values[g, u] = v[g, run].float().mean(dim=0)
    tables = (x.to(k.dtype) for x in (keys, variances, values))
    return BlockUnits(**dict(zip(_TABLES, tables, strict=True)), block=block, num_slots=k.shape[1])


def score_units(q: Tensor, units: BlockUnits, *, scale: float) -> tuple[Tensor, Tensor]:
    """Estimated log mass of each block for each query head (`select/centroid.py`), and without its
    spread: [T, H, U].
    """
    per_group = q.shape[1] // units.keys.shape[0]
    log_sizes = torch.tensor([math.log(n) for n in _sizes(units)], device=q.device)
    masses = [
        reference.score_units(
            q[:, g * per_group : (g + 1) * per_group],
            units.keys[g],
            units.variances[g],
            log_sizes,
            (2.0 * log_sizes).sqrt(),
            scale=scale,
        )
        for g in range(units.keys.shape[0])
    ]
    with_spread, linear = (torch.cat(x, dim=1) for x in zip(*masses, strict=True))
    return with_spread, linear


def select_blocks(
    q: Tensor,
    units: BlockUnits,
    *,
    budget_keys: int,
    tile_tokens: int,
    scale: float,
    num_always: int = 0,
) -> BlockSelection:
    """The first `num_always` blocks and the best others of each query tile and KV head, by the
    greatest share of any query.
    """
    log_mass, _ = score_units(q, units, scale=scale)
    log_share = log_mass - torch.logsumexp(log_mass, dim=2, keepdim=True)
    per_group, sizes = q.shape[1] // units.keys.shape[0], _sizes(units)
    lists = []
    for start in range(0, q.shape[0], tile_tokens):
        for g in range(units.keys.shape[0]):
            heads = slice(g * per_group, (g + 1) * per_group)
            scores = log_share[start : start + tile_tokens, heads].amax(dim=(0, 1)).tolist()
            scores[:num_always] = [math.inf] * min(num_always, len(scores))
            taken, left = [], budget_keys
            for _, u in sorted((-score, u) for u, score in enumerate(scores)):
                left -= sizes[u]
                if left < 0:
                    break
                taken.append(u)
            lists.append(taken)
    blocks = torch.full((len(lists), max(map(len, lists), default=0)), -1, device=q.device)
    for row, taken in zip(blocks, lists, strict=True):
        row[: len(taken)] = torch.tensor(taken, device=q.device)
    shape = (-(-q.shape[0] // tile_tokens), units.keys.shape[0], blocks.shape[1])
    return BlockSelection.of(blocks.view(shape), block=units.block, tile_tokens=tile_tokens)


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
    block is one term of the same softmax, its mean value at its mean key's score.
    """
    part = empty_part(q.shape[0], q.shape[1], q.shape[2], q.device)
    per_group, block = q.shape[1] // k.shape[0], selection.block
    log_mass = None if tail is None else score_units(q, tail, scale=scale)[1]
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // per_group
            read = [b for b in selection.blocks[t // selection.tile_tokens, g].tolist() if b >= 0]
            slots = [s for b in read for s in range(b * block, min((b + 1) * block, k.shape[1]))]
            scores, values = k[g, slots].float() @ q[t, h].float() * scale, v[g, slots].float()
            if tail is not None and log_mass is not None:
                others = [b for b in range(log_mass.shape[2]) if b not in read]
                scores = torch.cat([scores, log_mass[t, h, others]])
                values = torch.cat([values, tail.values[g, others].float()])
            if len(scores):
                part.lse[t, h] = torch.logsumexp(scores, dim=0)
                part.out[t, h] = torch.exp(scores - part.lse[t, h]) @ values
    return part


def attend_unread(q: Tensor, units: BlockUnits, selection: BlockSelection, *, scale: float) -> Part:
    """The estimated part of q [T, H, D] over every block that is not selected."""
    part = empty_part(q.shape[0], q.shape[1], q.shape[2], q.device)
    per_group = q.shape[1] // units.keys.shape[0]
    _, log_mass = score_units(q, units, scale=scale)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            read = selection.blocks[t // selection.tile_tokens, h // per_group].tolist()
            others = [b for b in range(log_mass.shape[2]) if b not in read]
            if others:
                scores = log_mass[t, h, others]
                part.lse[t, h] = torch.logsumexp(scores, dim=0)
                weights = torch.exp(scores - part.lse[t, h])
                part.out[t, h] = weights @ units.values[h // per_group, others].float()
    return part


_TABLES = ("keys", "variances", "values")


def _sizes(units: BlockUnits) -> list[int]:
    starts = range(0, units.num_slots, units.block)
    return [min(units.block, units.num_slots - start) for start in starts]

"""What sparse prefill is told: statistics of blocks, and which blocks each query tile reads.

Owns the two types and how they are made with torch alone; knows no kernel, so that the twin in
`reference_prefill.py` has them without triton. A block is a run of `block` slots in stored order,
the last may be shorter. A query tile is `tile_tokens` consecutive query tokens, the last may be
shorter; its query heads of one KV head read the same blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockUnits:
    """What each block of one layer stands for when it is not read.

    keys, values: [G, U, D], means over the block; variances: [G, U, D], of the keys; all
    contiguous and of the type of the keys. num_slots: slots of each KV head.
    """

    keys: Tensor
    variances: Tensor
    values: Tensor
    block: int
    num_slots: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockSelection:
    """The blocks that each query tile and KV head reads.

    blocks: [N, G, W] int32, contiguous, rising, -1 (padding) last; counts: [N, G] int32, how many
    there are; N = ceil(T / tile_tokens).
    """

    blocks: Tensor
    counts: Tensor
    block: int
    tile_tokens: int

    @classmethod
    def of(cls, blocks: Tensor, *, block: int, tile_tokens: int) -> BlockSelection:
        """From lists in any order, [N, G, W] int, each block at most once, -1 where padded."""
        if blocks.shape[2] == 0:
            blocks = functional.pad(blocks, (0, 1), value=-1)
        beyond = torch.iinfo(torch.int32).max
        rising = blocks.int().masked_fill(blocks < 0, beyond).sort(dim=2).values
        padding = rising == beyond
        return cls(
            blocks=rising.masked_fill(padding, -1).contiguous(),
            counts=(~padding).sum(dim=2, dtype=torch.int32),
            block=block,
            tile_tokens=tile_tokens,
        )

    def flags(self, num_units: int) -> Tensor:
        """[N, G, U] int8, 1 where the block is read."""
        place = torch.where(self.blocks < 0, num_units, self.blocks).long()
        flags = place.new_zeros(*place.shape[:2], num_units + 1, dtype=torch.int8)
        return flags.scatter_(2, place, 1)[..., :num_units].contiguous()


def block_units(k: Tensor, v: Tensor, *, block: int) -> BlockUnits:
    """Statistics of the blocks of k, v [G, S, D]: computed in float32, kept in their type.

    Widens one KV head at a time.
    """
    columns = [_head_units(*rows, block) for rows in zip(k, v, strict=True)]
    keys, variances, values = (torch.stack(x).to(k.dtype) for x in zip(*columns, strict=True))
    return BlockUnits(
        keys=keys, variances=variances, values=values, block=block, num_slots=k.shape[1]
    )


def take_best(log_shares: Tensor, *, budget_keys: int, units: BlockUnits) -> Tensor:
    """The blocks of the highest scores, one after another until the next exceeds the budget.

    log_shares: [N, G, U] float32; equal scores are taken by lowest block. Returns [N, G, W] int64,
    best first, -1 where padded; W follows from the budget, not from the scores.
    """
    num_units = log_shares.shape[2]
    last = units.num_slots - (num_units - 1) * units.block
    is_short = 0 < last < units.block
    width = min(num_units, budget_keys // units.block + is_short)
    best = log_shares.sort(dim=2, descending=True, stable=True).indices[..., :width]
    sizes = torch.where(best == num_units - 1, last, units.block)
    return best.masked_fill(sizes.cumsum(dim=2) > budget_keys, -1)


def _head_units(k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys, their variances and mean values [U, D] float32 of k, v [S, D]."""
    num_slots, width = k.shape
    num_units = -(-num_slots // block)
    sizes = torch.full((num_units, 1), block, dtype=torch.float32, device=k.device)
    sizes[num_units - 1 :] -= num_units * block - num_slots
    short = (0, 0, 0, num_units * block - num_slots)
    is_key = torch.arange(num_units * block, device=k.device).view(num_units, block, 1) < num_slots
    keys, values = (functional.pad(x.float(), short).view(num_units, block, width) for x in (k, v))
    mean = keys.sum(dim=1) / sizes
    spread = (keys - mean.unsqueeze(1)).masked_fill_(~is_key, 0.0)
    return mean, spread.square_().sum(dim=1) / sizes, values.sum(dim=1) / sizes

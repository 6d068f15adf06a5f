"""What sparse prefill is told: statistics of blocks, and which blocks each query tile reads.

Owns the two types and how they are made, with torch alone: every backend has them. A block is a
run of `block` slots in stored order, the last may be shorter. A query tile is `tile_tokens`
consecutive query tokens, the last may be shorter; its query heads of one KV head read the same
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sparse_attn.state import Part


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockUnits:
    """What each block of one layer is chosen by, and stands for when it is not read.

    keys, values: [G, U, D], means over the block; variances: [G, U, D], of the keys, by which
    blocks are chosen alone; all contiguous and of the type of the keys. num_slots: slots of each
    KV head.
    """

    keys: Tensor
    variances: Tensor
    values: Tensor
    block: int
    num_slots: int

    def sizes(self) -> Tensor:
        """Keys [U] float32 of each block."""
        starts = torch.arange(0, self.num_slots, self.block, device=self.keys.device)
        return (self.num_slots - starts).clamp(max=self.block).float()

    def followed_by(self, other: BlockUnits) -> BlockUnits:
        """The blocks of both, where this one's last block is full."""
        assert self.block == other.block
        assert self.num_slots % self.block == 0
        return BlockUnits(
            keys=torch.cat([self.keys, other.keys], dim=1),
            variances=torch.cat([self.variances, other.variances], dim=1),
            values=torch.cat([self.values, other.values], dim=1),
            block=self.block,
            num_slots=self.num_slots + other.num_slots,
        )


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


class BlockOperations(Protocol):
    """What a backend does with blocks; the meanings are those of `kernels/prefill.py`."""

    def select_blocks(
        self,
        q: Tensor,
        units: BlockUnits,
        *,
        budget_keys: int,
        tile_tokens: int,
        scale: float,
        num_always: int = 0,
    ) -> BlockSelection: ...

    def attend_blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BlockSelection,
        *,
        scale: float,
        tail: BlockUnits | None = None,
    ) -> Part: ...


def block_units(k: Tensor, v: Tensor, *, block: int) -> BlockUnits:
    """Statistics of the blocks of k, v [G, S, D]: computed in float32, kept in their type."""
    whole, rest = divmod(k.shape[1], block)
    runs = [(slice(0, whole * block), block), (slice(whole * block, k.shape[1]), rest)]
    tables = [_statistics(k[:, run], v[:, run], size) for run, size in runs if size]
    keys, variances, values = (torch.cat(x, dim=1).to(k.dtype) for x in zip(*tables, strict=True))
    return BlockUnits(
        keys=keys, variances=variances, values=values, block=block, num_slots=k.shape[1]
    )


def take_best(
    log_shares: Tensor, *, budget_keys: int, units: BlockUnits, num_always: int = 0
) -> Tensor:
    """The blocks of the highest scores, one after another until the next exceeds the budget.

    log_shares: [N, G, U] float32; equal scores are taken by lowest block. The first `num_always`
    blocks come before all others. Returns [N, G, W] int64,
    best first, -1 where padded; W follows from the budget, not from the scores.
    """
    num_units = log_shares.shape[2]
    scored = log_shares[..., num_always:]
    log_shares = functional.pad(scored, (num_units - scored.shape[2], 0), value=torch.inf)
    last = units.num_slots - (num_units - 1) * units.block
    is_short = 0 < last < units.block
    width = min(num_units, budget_keys // units.block + is_short)
    best = log_shares.sort(dim=2, descending=True, stable=True).indices[..., :width]
    sizes = torch.where(best == num_units - 1, last, units.block)
    return best.masked_fill(sizes.cumsum(dim=2) > budget_keys, -1)


def _statistics(k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys, their variances and mean values [G, U, D] float32 of runs of `size` slots."""
    keys, values = (x.float().reshape(len(x), -1, size, x.shape[2]) for x in (k, v))
    means = keys.mean(dim=2)
    variances = (keys - means.unsqueeze(2)).square_().mean(dim=2)
    return means, variances, values.mean(dim=2)

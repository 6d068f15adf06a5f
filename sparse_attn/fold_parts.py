"""Parts and scores of a step while they are gathered fold by fold, for `composed.py`.

Owns the order in which a fold grows. Knows no operation that computes a part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn.folds import NUM_FOLDS, Kept
from sparse_attn.select.centroid import Units
from sparse_attn.state import Part, merge_parts


class FoldParts:
    """A part for each fold, all of them empty at first."""

    def __init__(self, q: Tensor, num_kv_heads: int) -> None:
        self._q = q
        self.per_group = q.shape[1] // num_kv_heads
        out = torch.zeros((NUM_FOLDS, *q.shape), dtype=torch.float32, device=q.device)
        self.parts = Part(out, out.new_full(out.shape[:-1], -math.inf))
        self._filled: set[tuple[int, int]] = set()

    def queries(self, g: int) -> Tensor:
        """The queries [T, H/G, D] of KV head g."""
        return self._q[:, g * self.per_group : (g + 1) * self.per_group]

    def add(self, g: int, fold: int, part: Part) -> None:
        """One more part of head g's fold, merged after those before."""
        heads = slice(g * self.per_group, (g + 1) * self.per_group)
        own = Part(self.parts.out[fold, :, heads], self.parts.lse[fold, :, heads])
        if (g, fold) in self._filled:  # an empty part would change no bit
            part = merge_parts([own, part])
        self._filled.add((g, fold))
        own.out.copy_(part.out)
        own.lse.copy_(part.lse)


def keep_units(units: Units, taken: Tensor, scores: list[Tensor], per_group: int) -> Kept:
    """The last query's scores over the units that it took [G, U], head after head."""
    taken = taken & (units.sizes > 0)
    counts = taken.sum(dim=1).cumsum(dim=0)
    return Kept(
        first=units.starts[taken],
        count=units.sizes[taken],
        bounds=torch.cat([counts.new_zeros(1), counts]),
        scores=side_by_side(scores, per_group, taken.device),
    )


def side_by_side(scores: list[Tensor], per_group: int, device: torch.device) -> Tensor:
    """Scores [P, n] of lists one after another, [P, sum of n]."""
    if not scores:
        return torch.zeros(per_group, 0, device=device)
    return torch.cat(scores, dim=1)

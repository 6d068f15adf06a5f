"""One selection over units that lie with several callers: each lists its best, all cut alike.

Every caller lists its units in order of benefit, long enough for whatever the whole may take of
them; with all lists in hand, each finds how many of its own the choice takes. The result is the
choice that one caller would make who holds every unit (`take.py`), ties included. Knows no ranks:
how lists travel is the caller's affair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import Units
from sparse_attn.select.take import descending, fits
from sparse_attn.step import Ranks

_NO_ID = 2**31 - 1


class Candidates(NamedTuple):
    """A caller's units in order of benefit, then id.

    benefit: [G, T, W] float32; sizes, ids, columns: [G, T, W] int64, size 0 at padding (last);
    shares: [G, H/G, T, W] float32 for a limit of mass, else None.
    """

    benefit: Tensor
    sizes: Tensor
    ids: Tensor
    columns: Tensor
    shares: Tensor | None


def list_width(sizes: Tensor, limit: Limit) -> int:
    """Most units of sizes [G, U] that a list must hold under that limit.

    By keys, the most units that can fit and one more, which says where the choice ends. Callers
    agree on the greatest of their widths.
    """
    num_units = int((sizes > 0).sum(dim=1).max()) if sizes.numel() else 0
    if limit.keys is None or num_units == 0:
        return num_units
    rising = torch.where(sizes > 0, sizes, limit.keys + 1).sort(dim=1).values
    return min(num_units, 1 + int((rising.cumsum(dim=1) <= limit.keys).sum(dim=1).max()))


def list_candidates(ranks: Ranks, units: Units, *, width: int) -> Candidates:
    """The `width` best of a caller's units for each query."""
    is_unit = (units.sizes > 0).unsqueeze(1)
    order = descending(torch.where(is_unit, ranks.benefit, -1.0))[..., :width]
    missing = width - order.shape[2]

    def listed(x: Tensor, padding: int) -> Tensor:
        own = x.unsqueeze(1).expand_as(ranks.benefit).gather(2, order).masked_fill(hidden, padding)
        return torch.nn.functional.pad(own, (0, missing), value=padding)

    hidden = ~is_unit.expand_as(ranks.benefit).gather(2, order)
    columns = torch.arange(units.num_units, device=order.device).expand_as(units.sizes)
    benefit = ranks.benefit.gather(2, order).masked_fill(hidden, 0.0)
    shares = None
    if ranks.shares is not None:
        shares = ranks.shares.gather(
            3, order.unsqueeze(1).expand(-1, ranks.shares.shape[1], -1, -1)
        )
        shares = torch.nn.functional.pad(shares.masked_fill(hidden.unsqueeze(1), 0.0), (0, missing))
    return Candidates(
        benefit=torch.nn.functional.pad(benefit, (0, missing)),
        sizes=listed(units.sizes, 0),
        ids=listed(units.ids, _NO_ID),
        columns=listed(columns, units.num_units),
        shares=shares,
    )


def cut_lists(
    benefits: Tensor,
    sizes: Tensor,
    ids: Tensor,
    *,
    own: int,
    limit: Limit,
    shares: Tensor | None = None,
    steady: Tensor | None = None,
) -> Tensor:
    """How many of list `own` the choice over all lists takes, [G, T] int64.

    benefits, sizes, ids: [R, G, T, W] of R callers; by mass also shares: [R, G, H/G, T, W] and
    steady: [G, H/G, T] (`Ranks.steady`, of everything that is read anyway, the same for all).
    """
    width = benefits.shape[3]
    benefits, sizes, ids = (_joined(x) for x in (benefits, sizes, ids))
    bits = benefits.contiguous().view(torch.int32).long()
    rank = torch.where(sizes > 0, ids - (bits << 32), _NO_ID)
    order = rank.argsort(dim=-1)
    if shares is not None:
        shares = _joined(shares)
        shares = shares.gather(3, order.unsqueeze(1).expand_as(shares))
    taken = fits(sizes.gather(2, order), shares, steady, limit)
    return (taken & (order >= own * width) & (order < (own + 1) * width)).sum(dim=-1)


def take_first(candidates: Candidates, num_taken: Tensor, num_units: int) -> Tensor:
    """Which of the caller's units are taken, [G, T, num_units] bool: the first num_taken [G, T]."""
    columns = candidates.columns
    is_taken = torch.arange(columns.shape[2], device=columns.device) < num_taken.unsqueeze(-1)
    taken = is_taken.new_zeros((*columns.shape[:2], num_units + 1))
    return taken.scatter_(2, columns, is_taken)[..., :num_units].contiguous()


def _joined(x: Tensor) -> Tensor:
    """[R, ..., W] -> [..., R * W]."""
    return x.movedim(0, -2).flatten(-2)

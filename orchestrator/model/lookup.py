"""Which clusters a tile of queries reads, over all ranks that share a document.

Owns the two ways of dividing a budget over ranks: `global` takes the best clusters wherever they
lie, from lists that the ranks exchange, and equals the choice of one rank that holds everything;
`proportional` gives each rank its share of the budget and exchanges no list. Knows no attention:
it scores, ranks and takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.model.context import DocumentContext
from orchestrator.steps import AttentionPlan
from sparse_attn.api import Backend
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import Units, lookup_bytes, opening_limit
from sparse_attn.select.lists import cut_lists, list_candidates, list_width, take_first
from sparse_attn.step import Ranks, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The units looked at, which of them each query takes [G, T, U], and what stayed closed."""

    units: Units
    scores: Scores
    taken: Tensor
    closed: tuple[Units, Scores] | None
    lookup_bytes: int


class Lookup:
    """The look-up of one question; collective over the place's context ranks."""

    def __init__(
        self, context: DocumentContext, plan: AttentionPlan, backend: Backend, *, scale: float
    ) -> None:
        self._context, self._plan, self._backend, self._scale = context, plan, backend, scale
        self._ranks = context.place.context
        self._limit = Limit(keys=plan.keys) if plan.mass is None else Limit(mass=plan.mass)
        self._widths: dict[int, int] = {}

    def find(self, full_layer: int, q: Tensor, lse_steady: Tensor) -> Found:
        """Choose for each query of q [T, H, D]; lse_steady: [T, H], what is read anyway."""
        index = self._context.index(full_layer)
        if self._plan.levels == 1:
            units = index.clusters
            scores, taken = self._choose(
                units, q, lse_steady, lse_steady, self._limit, layer=full_layer
            )
            return Found(
                units=units,
                scores=scores,
                taken=taken,
                closed=None,
                lookup_bytes=lookup_bytes(units),
            )
        groups = index.groups
        opening = opening_limit(self._limit)
        scores, opened = self._choose(groups, q, lse_steady, lse_steady, opening, layer=full_layer)
        opened_by_any = opened.any(dim=1)
        closed = self._backend.close_units(scores, groups, opened_by_any)
        lse_other = self._merge([lse_steady, self._sum_over(closed.lse)])
        units = index.members(opened_by_any)
        scores, taken = self._choose(units, q, lse_steady, lse_other, self._limit)
        return Found(
            units=units,
            scores=scores,
            taken=taken,
            closed=(groups, closed),
            lookup_bytes=lookup_bytes(groups) + lookup_bytes(units),
        )

    def _choose(
        self,
        units: Units,
        q: Tensor,
        lse_steady: Tensor,
        lse_other: Tensor,
        limit: Limit,
        *,
        layer: int | None = None,
    ) -> tuple[Scores, Tensor]:
        """Scores of the units, and those that each query takes; lse_other: [T, H], the mass of
        everything that is not among the units of any rank; layer: whose units they are, all of
        them, as in every step of the question.
        """
        backend = self._backend
        scores = backend.score_units(q, units, scale=self._scale)
        total = self._merge([lse_other, self._sum_over(scores.lse)])
        if self._ranks.size == 1 or self._plan.choice == "proportional":
            taken = backend.take_units(
                scores, units, total=total, lse_steady=lse_steady, limit=self._own(limit)
            )
            return scores, taken
        by_mass = lse_steady if limit.mass is not None else None
        ranks = backend.rank_units(scores, units, total=total, lse_steady=by_mass)
        return scores, self._take_globally(units, ranks, limit, self._widest(units, limit, layer))

    def _take_globally(self, units: Units, ranks: Ranks, limit: Limit, width: int) -> Tensor:
        own = list_candidates(ranks, units, width=width)
        lists = [own.benefit.view(torch.int32).unsqueeze(1)]
        if own.shares is not None:
            lists.append(own.shares.view(torch.int32))
        counts = torch.stack([own.sizes, own.ids], dim=1).int()
        # One message: benefit, shares of each head, sizes, ids; floats as the bits they are.
        gathered = self._ranks.all_gather(torch.cat([*lists, counts], dim=1))
        floats = gathered[:, :, :-2].contiguous().view(torch.float32)
        num_taken = cut_lists(
            floats[:, :, 0],
            gathered[:, :, -2].long(),
            gathered[:, :, -1].long(),
            own=self._ranks.rank,
            limit=limit,
            shares=None if own.shares is None else floats[:, :, 1:],
            steady=ranks.steady,
        )
        return take_first(own, num_taken, units.num_units)

    def _widest(self, units: Units, limit: Limit, layer: int | None) -> int:
        """The length of list that every rank sends; agreed on once for units that stay."""
        if layer is not None and layer in self._widths:
            return self._widths[layer]
        longest = torch.tensor([list_width(units.sizes, limit)])
        self._ranks.control.all_reduce_(longest, op="max")
        if layer is not None:
            self._widths[layer] = int(longest)
        return int(longest)

    def _own(self, limit: Limit) -> Limit:
        """This rank's share of a limit of keys."""
        if self._ranks.size == 1 or limit.keys is None:
            return limit
        return Limit(keys=round(limit.keys * self._context.own_share))

    def _sum_over(self, lse: Tensor) -> Tensor:
        """Natural log [T, H] of a mass over all ranks."""
        if self._ranks.size == 1:
            return lse
        return self._backend.merge_tree_lse(self._ranks.all_gather(lse.contiguous()))

    def _merge(self, lses: list[Tensor]) -> Tensor:
        return self._backend.merge_tree_lse(torch.stack(lses))

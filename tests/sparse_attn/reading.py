"""A tile's attention over units that lie with several callers, as ranks would compute it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.api import Backend
from sparse_attn.folds import Kept
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import Units, opening_limit
from sparse_attn.select.lists import cut_lists, list_candidates, list_width, take_first
from sparse_attn.state import Part
from sparse_attn.step import Ranks, Scores, UnitsRead
from tests.sparse_attn.inputs import SCALE, Layer


def together(backend: Backend, parts: list[Part]) -> Part:
    return backend.merge_tree(
        torch.stack([part.out for part in parts]), torch.stack([part.lse for part in parts])
    )


def spread(backend: Backend, layers: list[Layer], kept: list[Kept | None], lse: Tensor) -> Tensor:
    """The evidence of all callers, in the order of one who holds everything."""
    evidence = torch.zeros(sum(len(layer.k) for layer in layers))
    for layer, own in zip(layers, kept, strict=True):
        found = torch.zeros(len(layer.k))
        assert own is not None
        backend.spread_evidence(found, own, lse[-1])
        evidence[layer.place] = found
    return evidence


class Read:
    """A tile's attention over units that lie with several callers, as a rank would compute it."""

    def __init__(
        self,
        backend: Backend,
        layers: list[Layer],
        q: Tensor,
        limit: Limit,
        *,
        levels: int = 1,
        is_estimating: bool = True,
    ) -> None:
        self.backend, self.layers = backend, layers
        steady = backend.attend(q, layers[0].steady_k, layers[0].steady_v, scale=SCALE).lse
        units = [x.index.clusters for x in layers]
        closed: list[tuple[Units, Scores] | None] = [None] * len(layers)
        totals = [steady]
        if levels == 2:
            groups = [x.index.groups for x in layers]
            scores = [backend.score_units(q, x, scale=SCALE) for x in groups]
            total = self._total([steady], scores)
            opened = self._take(groups, scores, total, steady, opening_limit(limit))
            any_opened = [x.any(dim=1) for x in opened]
            closed_scores = [
                backend.close_units(*args) for args in zip(scores, groups, any_opened, strict=True)
            ]
            closed = list(zip(groups, closed_scores, strict=True))
            totals.append(backend.merge_tree_lse(torch.stack([x.lse for x in closed_scores])))
            units = [x.index.members(o) for x, o in zip(layers, any_opened, strict=True)]
        self.units, self.lse_steady = units, steady
        self.scores = [backend.score_units(q, x, scale=SCALE) for x in units]
        self.total = self._total(totals, self.scores)
        self.taken = self._take(units, self.scores, self.total, steady, limit)
        self.reads: list[UnitsRead] = [
            backend.attend_units(
                q,
                layer.k,
                layer.v,
                units[i],
                self.scores[i],
                self.taken[i],
                scale=SCALE,
                is_estimating=is_estimating,
                keeps=True,
                closed=closed[i],
            )
            for i, layer in enumerate(layers)
        ]
        self.part = together(backend, [x.part for x in self.reads])
        self.lse_read = backend.merge_tree_lse(torch.stack([x.lse_read for x in self.reads]))
        self.evidence = spread(backend, layers, [x.kept for x in self.reads], self.lse_read)
        self.num_attended = torch.stack([x.num_attended for x in self.reads]).sum(dim=0)
        self.num_read = torch.stack([x.num_read for x in self.reads]).sum(dim=0)

    def _total(self, others: list[Tensor], scores: list[Scores]) -> Tensor:
        own = self.backend.merge_tree_lse(torch.stack([x.lse for x in scores]))
        return self.backend.merge_tree_lse(torch.stack([own, *others]))

    def _take(
        self, units: list[Units], scores: list[Scores], total: Tensor, steady: Tensor, limit: Limit
    ) -> list[Tensor]:
        """By `take_units` where one caller holds everything, else by lists."""
        if len(units) == 1:
            whole = self.backend.take_units(
                scores[0], units[0], total=total, lse_steady=steady, limit=limit
            )
            return [whole]
        ranks: list[Ranks] = [
            self.backend.rank_units(
                own, x, total=total, lse_steady=steady if limit.mass is not None else None
            )
            for own, x in zip(scores, units, strict=True)
        ]
        width = max(list_width(x.sizes, limit) for x in units)
        lists = [list_candidates(own, x, width=width) for own, x in zip(ranks, units, strict=True)]
        shares = None
        if limit.mass is not None:
            shares = torch.stack([x.shares for x in lists if x.shares is not None])
        taken = []
        for i, x in enumerate(units):
            num_taken = cut_lists(
                torch.stack([x.benefit for x in lists]),
                torch.stack([x.sizes for x in lists]),
                torch.stack([x.ids for x in lists]),
                own=i,
                limit=limit,
                shares=shares,
                steady=ranks[0].steady,
            )
            taken.append(take_first(lists[i], num_taken, x.num_units))
        return taken

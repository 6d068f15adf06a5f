"""A backend out of plain operations on parts: the steps of a question, one operation after another.

Owns the order of operations; the operations are a module's (`torch_backend`, `reference`). What a
step is, is defined here; a backend with fused kernels computes the same.

Keys and values of a document are flat: k, v [N, D], `slot` is a row. Every operation over them has
the shape of one head's fold, or of one segment of it, whoever else's keys the caller holds: that,
and the tree in which folds meet (`folds.py`), is why bits do not depend on how many callers share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_attn import state
from sparse_attn.blocks import BlockOperations
from sparse_attn.estimate import Missed, sample_missed
from sparse_attn.fold_parts import FoldParts, keep_units, side_by_side
from sparse_attn.folds import NUM_FOLDS, Kept, Runs
from sparse_attn.select.base import Limit, Tail
from sparse_attn.select.centroid import Units, expand_runs
from sparse_attn.select.take import take
from sparse_attn.state import Part, merge_parts
from sparse_attn.step import Ranks, Scores, UnitsRead
from sparse_attn.stored import check_scales, widen


class Composed:
    """Operations of a module, and the steps made of them."""

    makes_plans = False

    def __init__(self, operations: ModuleType, blocks: BlockOperations) -> None:
        self._operations, self.blocks = operations, blocks

    def fused_for(self, _: torch.dtype) -> Any:
        """Operators of a layer for streams of that type, None where torch's are used."""
        return None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] in x's dtype."""
        return torch.nn.functional.linear(x, weight, bias)

    def linear_split(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Sequence[int]
    ) -> Tensor:
        """`linear`, piece by piece of its columns: the bits of those between two neighbouring
        bounds (rising, from 0 to N) do not depend on the pieces beside them.
        """
        pieces = [slice(*pair) for pair in pairwise(bounds)]
        outs = [
            Composed.linear(self, x, _aligned(weight[piece]), None if bias is None else bias[piece])
            for piece in pieces
            if piece.start < piece.stop
        ]
        return torch.cat(outs, dim=1) if outs else x.new_empty((x.shape[0], 0))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
    ) -> Part:
        """Every query over every key; q [T, H, D]; k, v [G, S, D]; mask [T, S] bool."""
        part: Part = self._operations.attend(q, k, v, scale=scale, mask=mask)
        return part

    def attend_causal(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part:
        """A chunk over itself: token t of q [T, H, D] sees keys 0 to t of k, v [G, T, D]."""
        part: Part = self._operations.attend_causal(q, k, v, scale=scale)
        return part

    def attend_prefix(self, q: Tensor, k: Tensor, v: Tensor, *, past: int, scale: float) -> Part:
        """Token t of q [T, H, D] sees slots 0 to past + t of k, v [G, past + T, D]."""
        if q.shape[0] == 1:
            return self.attend(q, k, v, scale=scale)
        before = self.attend(q, k[:, :past], v[:, :past], scale=scale)
        causal = self.attend_causal(q, k[:, past:], v[:, past:], scale=scale)
        return self.merge_parts([before, causal])

    def merge_parts(self, parts: Sequence[Part]) -> Part:
        """The part over the union, one after another; see `state.merge_parts`."""
        return merge_parts(parts)

    def merge_tree(self, outs: Tensor, lses: Tensor) -> Part:
        """The part over the union of n callers' folds, outs [n, T, H, D], lses [n, T, H]."""
        return state.merge_tree(outs, lses)

    def merge_tree_lse(self, lses: Tensor) -> Tensor:
        """The `lse` [T, H] of `merge_tree`, from lses [n, T, H] alone."""
        return state.merge_tree_lse(lses)

    def attend_runs(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        runs: Runs,
        *,
        scale: float,
        keeps: bool,
        scales: Tensor | None = None,
    ) -> tuple[Part, Kept | None]:
        """Attention of q [T, H, D] over every slot of `runs`, and if `keeps` the last query's
        scores. scales: [G, 2] float32, of a head's keys and values in e4m3, None of others.
        """
        check_scales(k, scales)
        folds, kept = FoldParts(q, runs.num_kv_heads), []
        operations = self._operations
        for g in range(runs.num_kv_heads):
            own = folds.queries(g)
            for fold in range(NUM_FOLDS):
                for run in runs.of_fold(g, fold):
                    keys, values = (
                        _aligned(widen(x[run], scales, g, i, q.dtype)) for i, x in enumerate((k, v))
                    )
                    if q.shape[0] == 1:
                        part, scores = operations.attend_scored(
                            own, keys, values, visible=None, scale=scale
                        )
                    else:
                        part = self.attend(own, keys[None], values[None], scale=scale)
                        scores = operations.score_keys(own[-1:], keys, scale=scale) if keeps else ()
                    if keeps:
                        kept.append(scores[0])
                    folds.add(g, fold, part)
        if not keeps:
            return self.merge_tree(*folds.parts), None
        bounds = torch.cat([runs.bounds[:, 0], runs.bounds[-1:, -1]])
        scores = side_by_side(kept, folds.per_group, q.device)
        kept_runs = Kept(first=runs.first, count=runs.count, bounds=bounds, scores=scores)
        return self.merge_tree(*folds.parts), kept_runs

    def score_units(self, q: Tensor, units: Units, *, scale: float) -> Scores:
        """The estimated mass of each unit for q [T, H, D]; see `select/centroid.py`."""
        num_kv_heads = units.sizes.shape[0]
        num_tokens, num_heads, _ = q.shape
        per_group = num_heads // num_kv_heads
        shape = (num_tokens, num_heads, units.num_units)
        log_mass = torch.full(shape, -math.inf, device=q.device)
        linear = torch.full_like(log_mass, -math.inf)
        for g, _, columns in units.each_fold():
            heads = slice(g * per_group, (g + 1) * per_group)
            log_mass[:, heads, columns], linear[:, heads, columns] = self._operations.score_units(
                q[:, heads],
                _aligned(units.rows(units.centroids, g, columns)),
                _aligned(units.rows(units.variances, g, columns)),
                units.log_sizes[g, columns],
                units.critical[g, columns],
                scale=scale,
            )
        return Scores(log_mass, linear, self.total_mass(log_mass, units))

    def total_mass(self, log_mass: Tensor, units: Units) -> Tensor:
        """Natural log of the mass of all units together, [T, H], from log_mass [T, H, U]."""
        per_group = log_mass.shape[1] // units.sizes.shape[0]
        lses = log_mass.new_full((NUM_FOLDS, *log_mass.shape[:2]), -math.inf)
        for g, fold, columns in units.each_fold():
            heads = slice(g * per_group, (g + 1) * per_group)
            own = log_mass[:, heads, columns].contiguous()
            lses[fold, :, heads] = self._operations.log_sum_exp(own)
        return self.merge_tree_lse(lses)

    def close_units(self, scores: Scores, units: Units, opened: Tensor) -> Scores:
        """The scores of the units that are not opened [G, U] bool; those that are do not count."""
        per_head = opened.repeat_interleave(scores.log_mass.shape[1] // opened.shape[0], dim=0)
        log_mass = scores.log_mass.masked_fill(per_head, -math.inf)
        return Scores(log_mass, scores.log_mass_linear, self.total_mass(log_mass, units))

    def rank_units(
        self, scores: Scores, units: Units, *, total: Tensor, lse_steady: Tensor | None = None
    ) -> Ranks:
        """What a selection goes by; total, lse_steady: [T, H], natural log of the mass of
        everything, and of what is read anyway (given for a limit of mass).
        """
        num_kv_heads, num_tokens = units.sizes.shape[0], total.shape[0]
        per_group = total.shape[1] // num_kv_heads
        shares = torch.exp(scores.log_mass - total.unsqueeze(-1))
        shares = shares.view(num_tokens, num_kv_heads, per_group, units.num_units)
        benefit = shares[:, :, 0].clone()
        for p in range(1, per_group):
            benefit += shares[:, :, p]
        benefit = benefit.transpose(0, 1) * units.rank_weights.unsqueeze(1)
        if lse_steady is None:
            return Ranks(benefit, None, None)
        steady = torch.exp(lse_steady - total).view(num_tokens, num_kv_heads, per_group)
        return Ranks(benefit, shares.permute(1, 2, 0, 3).contiguous(), steady.permute(1, 2, 0))

    def take_units(
        self, scores: Scores, units: Units, *, total: Tensor, lse_steady: Tensor, limit: Limit
    ) -> Tensor:
        """Which units each query reads, [G, T, U] bool, where one caller holds all of them."""
        by_mass = lse_steady if limit.mass is not None else None
        ranks = self.rank_units(scores, units, total=total, lse_steady=by_mass)
        return take(ranks, units.sizes, limit)

    def attend_units(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        units: Units,
        scores: Scores,
        taken: Tensor,
        *,
        scale: float,
        is_estimating: bool,
        keeps: bool,
        closed: tuple[Units, Scores] | None = None,
        scales: Tensor | None = None,
    ) -> UnitsRead:
        """Attention over the units that each query of the tile takes [G, T, U] bool and, if
        `is_estimating`, what stands for the others and for the `closed` units (groups that the
        look-up did not open). May overwrite scores.log_mass; `keeps` the last query's scores;
        scales: as in `attend_runs`.
        """
        check_scales(k, scales)
        per_head = taken.repeat_interleave(q.shape[1] // taken.shape[0], dim=0).transpose(0, 1)
        log_mass = scores.log_mass.masked_fill(per_head, -math.inf)
        read, rest = FoldParts(q, taken.shape[0]), FoldParts(q, taken.shape[0])
        kept = []
        for g, fold, columns in units.each_fold():
            part, last = self._attend_taken(
                read.queries(g),
                (k, v, scales),
                units,
                taken[g, :, columns],
                (g, columns),
                scale=scale,
            )
            if part is not None:
                read.add(g, fold, part)
                kept.append(last)
            if is_estimating:
                rest.add(g, fold, self._estimate(units, log_mass, g, columns))
        tail = units.tail(log_mass, scores.log_mass_linear)
        if closed is not None:
            tail = tail.join(closed[0].tail(closed[1].log_mass, closed[1].log_mass_linear))
            if is_estimating:
                for g, fold, columns in closed[0].each_fold():
                    rest.add(g, fold, self._estimate(closed[0], closed[1].log_mass, g, columns))
        both = self.merge_parts([read.parts, rest.parts]) if is_estimating else read.parts
        return UnitsRead(
            part=self.merge_tree(*both),
            lse_read=self.merge_tree_lse(read.parts.lse),
            tail=tail,
            num_attended=(taken * units.sizes.unsqueeze(1)).sum(dim=2),
            num_read=(taken.any(dim=1) * units.sizes).sum(dim=1),
            kept=keep_units(units, taken[:, -1], kept, read.per_group) if keeps else None,
        )

    def spread_evidence(self, evidence: Tensor, kept: Kept, lse_read: Tensor) -> None:
        """evidence [N] gains the mass of the last query at each slot that it read, as a share of
        all that it read anywhere, lse_read [H], summed over heads.
        """
        heads = lse_read.view(-1, kept.scores.shape[0])
        # Runs are the host's, what a look-up took is the device's.
        first, count, bounds = (
            x.to(evidence.device) for x in (kept.first, kept.count, kept.bounds[1:])
        )
        ends = count.cumsum(dim=0)
        first = first + count - ends
        num_keys = kept.scores.shape[1]
        place = torch.arange(num_keys, device=evidence.device)
        run = torch.searchsorted(ends, place, right=True)
        head = torch.searchsorted(bounds.contiguous(), run, right=True)
        mass = torch.zeros(num_keys, device=evidence.device)
        for p in range(kept.scores.shape[0]):
            mass += torch.exp(kept.scores[p] - heads[head, p])
        evidence.index_add_(0, first[run] + place, mass)

    def sample_missed(
        self,
        q: Tensor,
        k: Tensor,
        tail: Tail,
        lse_read: Tensor,
        *,
        scale: float,
        num_strata: int,
        generator: torch.Generator,
        scales: Tensor | None = None,
    ) -> Missed:
        """A sample of what each query and head of one caller's tail missed; see `estimate.py`."""
        check_scales(k, scales)
        return sample_missed(
            q,
            k,
            tail,
            lse_read,
            scale=scale,
            num_strata=num_strata,
            generator=generator,
            scales=scales,
        )

    def _attend_taken(
        self,
        q: Tensor,
        stored: tuple[Tensor, Tensor, Tensor | None],
        units: Units,
        taken: Tensor,
        place: tuple[int, slice],
        *,
        scale: float,
    ) -> tuple[Part | None, Tensor]:
        """One head's fold: the units taken [T, n] of `place`, and the last query's scores; stored:
        keys, values and their scales.
        """
        (g, columns), (k, v, scales) = place, stored
        starts, sizes = units.starts[g, columns], units.sizes[g, columns]
        slots, run = (x[0] for x in expand_runs(starts[None], sizes[None], taken.any(dim=0)[None]))
        if slots.shape[0] == 0:
            return None, slots
        visible = taken[:, run] if q.shape[0] > 1 else None
        keys, values = (
            widen(self._operations.gather_rows(x, slots), scales, g, i, q.dtype)
            for i, x in enumerate((k, v))
        )
        part, scores = self._operations.attend_scored(q, keys, values, visible=visible, scale=scale)
        return part, scores[-1] if visible is None else scores[-1][:, visible[-1]]

    def _estimate(self, units: Units, log_mass: Tensor, g: int, columns: slice) -> Part:
        per_group = log_mass.shape[1] // units.sizes.shape[0]
        part: Part = self._operations.attend_estimated(
            log_mass[:, g * per_group : (g + 1) * per_group, columns],
            _aligned(units.rows(units.value_sums, g, columns)),
            units.sizes[g, columns],
        )
        return part


def _aligned(x: Tensor) -> Tensor:
    """x, copied to where a vector begins if it does not begin there: a product's bits may depend
    on it.
    """
    return x if x.device.type != "cpu" or x.data_ptr() % 64 == 0 else x.clone()

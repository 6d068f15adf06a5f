"""The `native` backend: the steps of a question in C, everything else as the torch backend does it.

Owns the order of the kernels' calls. The rules they follow are those of `composed.py`,
`select/take.py` and `estimate.py`, which compute the same with torch operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparse_attn import torch_backend, torch_prefill
from sparse_attn.composed import Composed
from sparse_attn.estimate import MAX_LOG_RATIO, UNIFORM_SHARE, Missed
from sparse_attn.folds import Kept, Runs
from sparse_attn.native import library, look_up
from sparse_attn.native.structs import KeysOf, RunsOf, UnitsOf
from sparse_attn.select.base import Limit, Tail
from sparse_attn.select.centroid import Units
from sparse_attn.state import Part
from sparse_attn.step import Ranks, Scores, UnitsRead

# From this many query tokens on, dense attention is a matrix product and torch's is the faster one.
_MIN_DENSE_TOKENS = 4


class NativeBackend(Composed):
    """Kernels of `kernels.c` where a question spends its time."""

    def __init__(self) -> None:
        super().__init__(torch_backend, torch_prefill)
        library.load()  # what is missing is said now, not in the middle of a question
        self._units: WeakKeyDictionary[Units, UnitsOf] = WeakKeyDictionary()
        self._runs: WeakKeyDictionary[Runs, RunsOf] = WeakKeyDictionary()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not _is_one_row(x, weight):
            return super().linear(x, weight, bias)
        out = library.products(x[0].float().contiguous(), weight)
        if bias is not None:
            out += bias
        return out.to(x.dtype).unsqueeze(0)

    def linear_split(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Sequence[int]
    ) -> Tensor:
        if _is_one_row(x, weight):  # every row of the weights is added up by itself
            return self.linear(x, weight, bias)
        return super().linear_split(x, weight, bias, bounds)

    def attend_prefix(self, q: Tensor, k: Tensor, v: Tensor, *, past: int, scale: float) -> Part:
        keys = KeysOf(k, v, q.shape[1])
        return Part(*library.attend_prefix(keys, _scaled(q, scale), past=past))

    def merge_parts(self, parts: Sequence[Part]) -> Part:
        merged = Part(*(x.clone(memory_format=torch.contiguous_format) for x in parts[0]))
        for part in parts[1:]:
            library.merge_pair(merged, Part(*(x.contiguous() for x in part)))
        return merged

    def merge_tree(self, outs: Tensor, lses: Tensor) -> Part:
        return Part(*library.merge_tree(outs.contiguous(), lses.contiguous()))

    def merge_tree_lse(self, lses: Tensor) -> Tensor:
        return library.merge_tree(None, lses.contiguous())[1]

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
        num_tokens, own = q.shape[0], self._runs_of(runs)
        keys = KeysOf(k, v, q.shape[1], num_kv_heads=runs.num_kv_heads, scales=scales)
        part = None
        if num_tokens >= _MIN_DENSE_TOKENS:
            part, _ = super().attend_runs(q, k, v, runs, scale=scale, keeps=False, scales=scales)
            if not keeps:
                return part, None
            q = q[-1:]  # of which the scores alone are wanted
        out, lse, scores = library.attend_runs(keys, own, _scaled(q, scale), keeps=keeps)
        kept = None
        if scores is not None:
            kept = Kept(first=own.first, count=own.count, bounds=own.heads, scores=scores)
        return part or Part(out, lse), kept

    def score_units(self, q: Tensor, units: Units, *, scale: float) -> Scores:
        own = self._units_of(units, q.shape[1])
        return Scores(*look_up.score_units(own, _scaled(q, scale)))

    def total_mass(self, log_mass: Tensor, units: Units) -> Tensor:
        return look_up.total_mass(log_mass, units.bounds)

    def rank_units(
        self, scores: Scores, units: Units, *, total: Tensor, lse_steady: Tensor | None = None
    ) -> Ranks:
        own = self._units_of(units, total.shape[1])
        steady = None if lse_steady is None else lse_steady.contiguous()
        total = total.contiguous()
        return Ranks(*look_up.rank_units(scores.log_mass, own, total=total, lse_steady=steady))

    def take_units(
        self, scores: Scores, units: Units, *, total: Tensor, lse_steady: Tensor, limit: Limit
    ) -> Tensor:
        return look_up.take_units(
            scores.log_mass,
            self._units_of(units, total.shape[1]),
            total=total.contiguous(),
            lse_steady=lse_steady.contiguous(),
            limit=limit,
        )

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
        own = self._units_of(units, q.shape[1])
        count = look_up.count_taken(taken, own, keeps=keeps)
        out, lse, lse_read, kept_scores = look_up.attend_units(
            KeysOf(k, v, q.shape[1], num_kv_heads=taken.shape[0], scales=scales),
            own,
            _scaled(q, scale),
            taken=taken,
            log_mass=scores.log_mass,
            count=count,
            closed=closed and (self._units_of(closed[0], q.shape[1]), closed[1].log_mass),
            is_estimating=is_estimating,
        )
        tail = units.tail(scores.log_mass, scores.log_mass_linear)
        if closed is not None:
            tail = tail.join(closed[0].tail(closed[1].log_mass, closed[1].log_mass_linear))
        kept = None
        if count.runs is not None and kept_scores is not None:
            first, num_slots, bounds = count.runs
            kept = Kept(first=first, count=num_slots, bounds=bounds, scores=kept_scores)
        return UnitsRead(Part(out, lse), lse_read, tail, count.attended, count.read, kept)

    def spread_evidence(self, evidence: Tensor, kept: Kept, lse_read: Tensor) -> None:
        library.spread_evidence(evidence, kept, lse_read.contiguous())

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
        return Missed(
            *library.sample_missed(
                KeysOf(k, k, q.shape[1], num_kv_heads=tail.sizes.shape[0], scales=scales),
                _scaled(q, scale),
                tail,
                lse_read,
                uniform=torch.rand((2, *q.shape[:2], num_strata, 2), generator=generator),
                uniform_share=UNIFORM_SHARE,
                max_log_ratio=MAX_LOG_RATIO,
            )
        )

    def _units_of(self, units: Units, num_heads: int) -> UnitsOf:
        per_group = num_heads // units.sizes.shape[0]
        found = self._units.get(units)
        if found is None or per_group != found.struct.P:
            found = self._units[units] = UnitsOf(units, per_group)
        return found

    def _runs_of(self, runs: Runs) -> RunsOf:
        found = self._runs.get(runs)
        if found is None:
            found = self._runs[runs] = RunsOf(runs)
        return found


def _is_one_row(x: Tensor, weight: Tensor) -> bool:
    is_known = weight.dtype in (torch.float32, torch.bfloat16) and weight.is_contiguous()
    return x.shape[0] == 1 and is_known


def _scaled(q: Tensor, scale: float) -> Tensor:
    return q.float().mul(scale).contiguous()

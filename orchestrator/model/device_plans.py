"""Plans of questions' attention on a GPU, and the steady keys that they read.

Owns a question's buffers of steady keys, how many of them the next query sees, one plan for each
number of its queries that come together, and plans of one query each of several questions. Knows no
recorder and no decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orchestrator.model.context import DocumentContext
from orchestrator.steps import AttentionPlan
from sparse_attn.folds import NUM_FOLDS, Runs
from sparse_attn.kernels.backend import TritonBackend
from sparse_attn.kernels.decode import DecodeDocument, DenseDecode, Heads
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.base import Limit

Planned = tuple[DenseDecode | CentroidDecode, Tensor]
"""A plan, and its `visible`."""


class Tail:
    """The keys of one kind of layers that every query reads: kept ones, then the question's.

    k, v: per layer, [G, kept + capacity, D]; num_kept; at: [1] int64 on the device, the row of the
    next token.
    """

    def __init__(self, k: list[Tensor], v: list[Tensor], capacity_tokens: int) -> None:
        self.num_kept = k[0].shape[1] if k else 0
        self.k, self.v = ([_extended(x, capacity_tokens) for x in own] for own in (k, v))
        self.at = torch.tensor([self.num_kept], device=k[0].device if k else None)

    def append(self, place: int, k: Tensor, v: Tensor) -> None:
        """Write new k, v [T, G, D] from the next token's row on; moves nothing."""
        at = self.at + torch.arange(k.shape[0], device=k.device)
        self.k[place].index_copy_(1, at, k.transpose(0, 1))
        self.v[place].index_copy_(1, at, v.transpose(0, 1))

    def show(self, visible: Tensor, query: int) -> None:
        """visible [1]: how many keys a query sees, that many after the next token."""
        torch.add(self.at, query + 1, out=visible)


class Kind(NamedTuple):
    """What queries need in common to share a plan. stored: type of keys and values; limit: None
    where everything is read; levels: of the look-up; estimates: whether what was not read counts.
    """

    stored: torch.dtype
    limit: Limit | None
    levels: int
    estimates: bool

    @classmethod
    def exact(cls, stored: torch.dtype) -> Kind:
        """Everything is read."""
        return cls(stored, None, 1, estimates=False)

    @classmethod
    def of(cls, plan: AttentionPlan, stored: torch.dtype) -> Kind:
        """Two levels where nothing is to be read (`window`): groups then say what was missed."""
        if plan.mode == "exact":
            return cls.exact(stored)
        limit = Limit(keys=plan.keys) if plan.mass is None else Limit(mass=plan.mass)
        is_window = plan.mode == "window"
        return cls(stored, limit, 2 if is_window else plan.levels, estimates=not is_window)


class Plans:
    """full, sliding_tail: the steady keys of full-attention and of sliding-window layers; document:
    as plans take it; evidence: for each full layer, where it is added up.
    """

    def __init__(
        self,
        context: DocumentContext,
        plan: AttentionPlan,
        backend: TritonBackend,
        *,
        scale: float,
        windows: tuple[int | None, ...],
        capacity_tokens: int,
        evidence: Sequence[Tensor],
    ) -> None:
        if plan.mode != "exact":
            context.require_clusters()
        self._context, self._backend, self._scale = context, backend, scale
        resident, layers = context.resident, range(len(context.resident.k))
        stored = resident.k[0].dtype if resident.k else resident.dtype
        self.kind, self.evidence = Kind.of(plan, stored), evidence
        steady = [context.steady_keys(i) for i in layers]
        self.full = Tail([k for k, _ in steady], [v for _, v in steady], capacity_tokens)
        self.sliding_tail = Tail(resident.sliding_k, resident.sliding_v, capacity_tokens)
        self.document = DecodeDocument(
            runs=context.runs,
            k=resident.k,
            v=resident.v,
            scales=resident.scales,
            steady_k=self.full.k,
            steady_v=self.full.v,
            indexes=[] if plan.mode == "exact" else [context.index(i) for i in layers],
        )
        self._windows = [window for window in windows if window is not None]
        self._made: dict[int, Planned] = {}
        self._sliding: dict[int, tuple[DenseDecode, Tensor]] = {}
        self._auditor: Planned | None = None

    def of(self, num_queries: int) -> Planned:
        """The plan for so many queries, and how many steady keys the first of them sees."""
        if num_queries not in self._made:
            evidence = [self.evidence] if num_queries == 1 else None
            visible = torch.empty_like(self.full.at)
            plan = self._make([self.document], visible, num_queries, self.kind, evidence)
            self._made[num_queries] = (plan, visible)
        return self._made[num_queries]

    def sliding(self, num_queries: int) -> tuple[DenseDecode, Tensor]:
        """The same as `of`, for sliding-window layers."""
        if num_queries not in self._sliding:
            visible = torch.empty_like(self.sliding_tail.at)
            plan = self._make_sliding([self._sliding_document()], visible, num_queries)
            self._sliding[num_queries] = (plan, visible)
        return self._sliding[num_queries]

    def auditor(self) -> Planned:
        """A plan of one query that reads every key."""
        if self._auditor is None:
            visible = torch.empty_like(self.full.at)
            everything = Kind.exact(self.kind.stored)
            self._auditor = (self._make([self.document], visible, 1, everything, None), visible)
        return self._auditor

    def together(self, others: Sequence[Plans]) -> Planned:
        """A plan of one query each of this question and of others of its kind."""
        if not others:
            return self.of(1)
        own = [self, *others]
        assert all(plans.kind == self.kind for plans in others)
        visible = self.full.at.new_empty(len(own))
        documents, evidence = [x.document for x in own], [x.evidence for x in own]
        return self._make(documents, visible, 1, self.kind, evidence), visible

    def sliding_together(self, others: Sequence[Plans]) -> tuple[DenseDecode, Tensor]:
        """The same as `together`, for sliding-window layers and questions of any kind."""
        if not others:
            return self.sliding(1)
        documents = [plans._sliding_document() for plans in (self, *others)]
        visible = self.sliding_tail.at.new_empty(len(documents))
        return self._make_sliding(documents, visible, 1), visible

    def _sliding_document(self) -> DecodeDocument:
        nothing, num_kv_heads = torch.zeros(0, dtype=torch.int64), self._context.place.num_kv_heads
        bounds = nothing.new_zeros((num_kv_heads, NUM_FOLDS + 1))
        runs, tail = Runs(first=nothing, count=nothing, bounds=bounds), self.sliding_tail
        return DecodeDocument(runs=runs, k=[], v=[], steady_k=tail.k, steady_v=tail.v)

    def _heads_of(self, num_documents: int, num_queries: int) -> Heads:
        layout, place = self._context.resident.layout, self._context.place
        return Heads(
            num_documents=num_documents,
            num_queries=num_queries,
            num_kv_heads=layout.num_kv_heads,
            per_group=place.num_heads // layout.num_kv_heads,
            head_dim=layout.head_dim,
        )

    def _make_sliding(
        self, documents: list[DecodeDocument], visible: Tensor, num_queries: int
    ) -> DenseDecode:
        return self._backend.plan_dense(
            self._heads_of(len(documents), num_queries),
            documents,
            visible,
            scale=self._scale,
            windows=self._windows,
        )

    def _make(
        self,
        documents: list[DecodeDocument],
        visible: Tensor,
        num_queries: int,
        kind: Kind,
        evidence: Sequence[Sequence[Tensor]] | None,
    ) -> DenseDecode | CentroidDecode:
        heads = self._heads_of(len(documents), num_queries)
        if kind.limit is None:
            return self._backend.plan_dense(
                heads, documents, visible, scale=self._scale, evidence=evidence
            )
        return self._backend.plan_selected(
            heads,
            documents,
            visible,
            limit=kind.limit,
            levels=kind.levels,
            scale=self._scale,
            estimates=kind.estimates,
            evidence=evidence,
        )


def _extended(x: Tensor, capacity_tokens: int) -> Tensor:
    """x [G, n, D] with room for more tokens; finite everywhere."""
    room = x.new_zeros((x.shape[0], capacity_tokens, x.shape[2]))
    return torch.cat([x, room], dim=1).contiguous()

"""Plans of one question's attention on a GPU, and the steady keys that they read.

Owns the buffers of steady keys, how many of them the next query sees, and one plan for each number
of queries that come together. Knows no recorder and no decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.model.context import DocumentContext
from orchestrator.steps import AttentionPlan
from sparse_attn.folds import NUM_FOLDS, Runs
from sparse_attn.kernels.backend import TritonBackend
from sparse_attn.kernels.decode import DecodeDocument, DenseDecode, Heads
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.base import Limit


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


class Plans:
    """full, sliding_tail: the steady keys of full-attention and of sliding-window layers; levels:
    of the look-up, two where nothing is to be read (`window`): groups then say what was missed.
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
    ) -> None:
        if plan.mode != "exact":
            context.require_clusters()
        self._context, self._plan, self._backend, self._scale = context, plan, backend, scale
        resident, layers = context.resident, range(len(context.resident.k))
        steady = [context.steady_keys(i) for i in layers]
        self.full = Tail([k for k, _ in steady], [v for _, v in steady], capacity_tokens)
        self.sliding_tail = Tail(resident.sliding_k, resident.sliding_v, capacity_tokens)
        self._document = DecodeDocument(
            runs=context.runs,
            k=resident.k,
            v=resident.v,
            scales=resident.scales,
            steady_k=self.full.k,
            steady_v=self.full.v,
            indexes=[] if plan.mode == "exact" else [context.index(i) for i in layers],
        )
        self.levels = 2 if plan.mode == "window" else plan.levels
        self._windows = [window for window in windows if window is not None]
        self._made: dict[int, tuple[DenseDecode | CentroidDecode, Tensor]] = {}
        self._sliding: dict[int, tuple[DenseDecode, Tensor]] = {}
        self._auditor: tuple[DenseDecode, Tensor] | None = None

    def sliding(self, num_queries: int) -> tuple[DenseDecode, Tensor]:
        """The same as `of`, for sliding-window layers."""
        if num_queries not in self._sliding:
            nothing = torch.zeros(0, dtype=torch.int64)
            num_kv_heads = self._context.resident.num_kv_heads
            runs = Runs(
                first=nothing,
                count=nothing,
                bounds=nothing.new_zeros((num_kv_heads, NUM_FOLDS + 1)),
            )
            tail = self.sliding_tail
            document = DecodeDocument(runs=runs, k=[], v=[], steady_k=tail.k, steady_v=tail.v)
            visible = torch.empty_like(tail.at)
            plan = self._backend.plan_dense(
                self._heads_of(num_queries),
                document,
                visible,
                scale=self._scale,
                windows=self._windows,
            )
            self._sliding[num_queries] = (plan, visible)
        return self._sliding[num_queries]

    def auditor(self) -> tuple[DenseDecode, Tensor]:
        """A plan of one query that reads every key."""
        if self._auditor is None:
            visible = torch.empty_like(self.full.at)
            plan = self._backend.plan_dense(
                self._heads_of(1), self._document, visible, scale=self._scale
            )
            self._auditor = (plan, visible)
        return self._auditor

    def _heads_of(self, num_queries: int) -> Heads:
        layout, place = self._context.resident.layout, self._context.place
        return Heads(
            num_documents=1,
            num_queries=num_queries,
            num_kv_heads=layout.num_kv_heads,
            per_group=place.num_heads // layout.num_kv_heads,
            head_dim=layout.head_dim,
        )

    def of(self, num_queries: int) -> tuple[DenseDecode | CentroidDecode, Tensor]:
        """The plan for so many queries, and how many steady keys the first of them sees."""
        if num_queries not in self._made:
            visible = torch.empty_like(self.full.at)
            self._made[num_queries] = (self._make_plan(num_queries, visible), visible)
        return self._made[num_queries]

    def _make_plan(self, num_queries: int, visible: Tensor) -> DenseDecode | CentroidDecode:
        heads, keeps, plan = self._heads_of(num_queries), num_queries == 1, self._plan
        if plan.mode == "exact":
            return self._backend.plan_dense(
                heads, self._document, visible, scale=self._scale, keeps=keeps
            )
        return self._backend.plan_selected(
            heads,
            self._document,
            visible,
            limit=Limit(keys=plan.keys) if plan.mass is None else Limit(mass=plan.mass),
            levels=self.levels,
            scale=self._scale,
            estimates=plan.mode != "window",
            keeps=keeps,
        )


def _extended(x: Tensor, capacity_tokens: int) -> Tensor:
    """x [G, n, D] with room for more tokens; finite everywhere."""
    room = x.new_zeros((x.shape[0], capacity_tokens, x.shape[2]))
    return torch.cat([x, room], dim=1).contiguous()

"""A question's attention by plans of kernels, where one rank holds the whole document.

Owns, for one question: which plan (`device_plans.py`) attends in which layer, and what the recorder
is told. The same contract as `attention.QuestionAttention`, which it replaces on a GPU; a forward
of one token decides nothing on the host, so that `decode_graph.py` can capture it.

Question tokens come up to `TILE_QUERIES` at a time. Each selects for itself, as one token does, in
both levels of the look-up. Evidence and recall are always those of single queries: the plan of one
query runs once more for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orchestrator.model.attention import count_per_kind
from orchestrator.model.context import DocumentContext
from orchestrator.model.decoder import Room
from orchestrator.model.device_plans import Plans, Tail
from orchestrator.model.recorder import Recorder
from orchestrator.recall import QuerySample
from orchestrator.steps import AttentionPlan
from sparse_attn.estimate import bound_of, recall_of
from sparse_attn.kernels.backend import TritonBackend
from sparse_attn.kernels.decode import Attended, DenseDecode
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.centroid import lookup_bytes

TILE_QUERIES = 16


class DeviceAttention:
    """Attention of one question: call it once per layer and forward, in layer order, and `advance`
    after each forward.
    """

    is_static = True

    def __init__(
        self,
        context: DocumentContext,
        plan: AttentionPlan,
        backend: TritonBackend,
        recorder: Recorder,
        *,
        scale: float,
        windows: tuple[int | None, ...],
        capacity_tokens: int,
    ) -> None:
        self._context, self._plan, self._recorder = context, plan, recorder
        self._scale, self._windows = scale, windows
        self._plans = Plans(
            context, plan, backend, scale=scale, windows=windows, capacity_tokens=capacity_tokens
        )
        self._full, self._sliding = self._plans.full, self._plans.sliding_tail
        resident = context.resident
        bounds = resident.holding.head_bounds
        self._head_bounds = torch.tensor(bounds, dtype=torch.int32, device=resident.device)
        self._queries = QuerySample(period=plan.recall_period, seed=plan.seed)
        self._generator = torch.Generator(resident.device).manual_seed(plan.seed)
        self._num_past = 0
        # Of the tiles of a forward in one layer: slots of each query and head, opened clusters.
        self._tiles: list[tuple[Tensor, Tensor]] = []
        self._places = count_per_kind(windows)
        # The queries of a forward of one token, for what is sampled after it.
        shape = (len(resident.k), 1, context.place.num_heads, resident.layout.head_dim)
        self._last_q = list(torch.zeros(shape, dtype=resident.dtype, device=resident.device))

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output [T, H, D] in q's dtype, for q [T, H, D] and the new k, v [T, G, D]."""
        self._tail_of(layer_idx).append(self._places[layer_idx], k, v)
        return self.attend_placed(layer_idx, q.contiguous())

    def room(self, layer_idx: int) -> Room:
        """Where the keys and values of the forward's tokens go in a layer."""
        tail, place = self._tail_of(layer_idx), self._places[layer_idx]
        return Room(k=tail.k[place], v=tail.v[place], at=tail.at)

    def attend_placed(self, layer_idx: int, q: Tensor) -> Tensor:
        """As calling it, where keys and values are in their room."""
        place = self._places[layer_idx]
        if self._windows[layer_idx] is not None:
            return self._in_tiles(self._attend_sliding, place, q)
        if q.shape[0] == 1:
            return self._attend_one(place, q)
        out = self._in_tiles(self._attend_tile, place, q)
        self._account(place, q)
        return out

    def _tail_of(self, layer_idx: int) -> Tail:
        return self._full if self._windows[layer_idx] is None else self._sliding

    def advance(self, num_tokens: int) -> None:
        """The forward of num_tokens is over: the next token comes after them."""
        if num_tokens == 1 and self._full.k:
            self._account_step()
        self._num_past += num_tokens
        for tail in (self._full, self._sliding):
            tail.at.add_(num_tokens)

    def _in_tiles(
        self, attend: Callable[[int, Tensor, int], Tensor], place: int, q: Tensor
    ) -> Tensor:
        tiles = torch.split(q, TILE_QUERIES)
        return torch.cat([attend(place, tile, i * TILE_QUERIES) for i, tile in enumerate(tiles)])

    def _attend_one(self, place: int, q: Tensor) -> Tensor:
        """A decode step: evidence is spread here, everything else is told after the forward."""
        plan, visible = self._plans.of(1)
        if place == 0:
            self._full.show(visible, 0)
        attended = plan.run(place, q.unsqueeze(0))
        self._spread(plan, place)
        self._last_q[place].copy_(q)
        return attended.out[0].clone()

    def _attend_tile(self, place: int, q: Tensor, first: int) -> Tensor:
        plan, visible = self._plans.of(q.shape[0])
        self._full.show(visible, first)
        out = plan.run(place, q.unsqueeze(0)).out[0].clone()
        if isinstance(plan, CentroidDecode):
            counts = plan.slot_bounds[place, :, 8].view(q.shape[0], -1).clone()
            self._tiles.append((counts, plan.packed_bounds[place, :, 8].sum()))
        return out

    def _attend_sliding(self, place: int, q: Tensor, first: int) -> Tensor:
        plan, visible = self._plans.sliding(q.shape[0])
        self._sliding.show(visible, first)
        return plan.run(place, q.unsqueeze(0)).out[0].clone()

    def _spread(self, plan: DenseDecode | CentroidDecode, place: int) -> None:
        mass = self._recorder.mass(place)
        if isinstance(plan, CentroidDecode):
            plan.spread(place, mass)
        else:
            plan.spread(place, mass, self._head_bounds)

    def _account(self, place: int, q: Tensor) -> None:
        """Evidence of the last of several queries, recall of those that are sampled, and what all
        of them read.
        """
        num_tokens = q.shape[0]
        chosen = self._chosen(place, num_tokens)
        plan, _ = self._plans.of(1)
        for t in sorted({*chosen, num_tokens - 1}):
            attended = self._run_one(place, q, t)
            if t == num_tokens - 1:
                self._spread(plan, place)
            if t in chosen:
                self._sample(place, q[t : t + 1], attended, self._num_past + t)
        tiles, self._tiles = self._tiles, []
        if tiles:
            counts = torch.cat([counts for counts, _ in tiles]).unsqueeze(0)
            packed = torch.stack([packed for _, packed in tiles]).sum()
            self._tell(counts, packed, len(chosen), layers=[place])
        else:
            self._tell_exact(num_tokens)
        if self._plan.audit and tiles:
            for t in range(num_tokens):
                self._audit(place, q, t)

    def _account_step(self) -> None:
        """What a forward of one token saw, in all layers."""
        plan, layers = self._plans.of(1)[0], range(len(self._full.k))
        if not isinstance(plan, CentroidDecode):
            for _ in layers:
                self._tell_exact(1)
            return
        counts = plan.slot_bounds[:, :, 8].unsqueeze(1).clone()
        packed = plan.packed_bounds[:, :, 8].sum()
        chosen = [place for place in layers if self._chosen(place, 1)]
        for place in chosen:
            q = self._last_q[place]
            self._sample(place, q, plan.run(place, q.unsqueeze(0)), self._num_past)
        self._tell(counts, packed, len(chosen), layers=list(layers))
        if self._plan.audit:
            for place in layers:
                self._audit(place, self._last_q[place], 0)

    def _chosen(self, place: int, num_tokens: int) -> list[int]:
        if self._plan.mode == "exact":
            return []
        return self._queries.chosen(place, self._num_past, num_tokens)

    def _run_one(self, place: int, q: Tensor, t: int) -> Attended:
        """The plan of one query, for query t of a forward that comes next."""
        plan, visible = self._plans.of(1)
        self._full.show(visible, t)
        return plan.run(place, q[t : t + 1].unsqueeze(0))

    def _sample(self, place: int, q: Tensor, attended: Attended, query: int) -> None:
        plan, _ = self._plans.of(1)
        assert isinstance(plan, CentroidDecode)
        missed = plan.sample(place, q, num_strata=self._plan.num_strata, generator=self._generator)
        self._recorder.add_recall(
            place,
            [query],
            recall_of(missed.mean, missed.variance),
            bound_of(missed.log_most, attended.lse_read[0]),
        )

    def _audit(self, place: int, q: Tensor, t: int) -> None:
        """The true recall of query t, by a dense plan beside the one that was used."""
        dense, visible = self._plans.auditor()
        self._full.show(visible, t)
        total = dense.run(place, q[t : t + 1].unsqueeze(0)).lse[0].clone()
        attended, plan = self._run_one(place, q, t), self._plans.of(1)[0]
        assert isinstance(plan, CentroidDecode)
        query = q[t : t + 1].contiguous()
        missed = plan.sample(place, query, num_strata=1, generator=self._generator)
        lse_read = attended.lse_read[0]
        recall = torch.exp(lse_read - total).clamp_(max=1.0)
        self._recorder.add_audit(place, recall, bound_of(missed.log_most, lse_read))

    def _tell_exact(self, num_tokens: int) -> None:
        num_body = self._context.num_tokens - self._context.num_steady
        self._recorder.add_exact(num_tokens, self._num_steady(num_tokens) + num_body)

    def _tell(self, counts: Tensor, packed: Tensor, num_sampled: int, layers: list[int]) -> None:
        """What queries read: counts [layers, T, G], slots; packed [], opened clusters of all;
        num_sampled: pairs of a query and a layer whose recall was sampled.
        """
        num_tokens = counts.shape[1]
        self._recorder.add_selected(
            counts,
            num_steady=self._num_steady(num_tokens),
            lookup_bytes=num_tokens * sum(self._table_bytes(place) for place in layers),
            packed_bytes=packed * (6 * self._context.resident.layout.head_dim),
            num_sampled=2 * self._plan.num_strata * num_sampled * self._context.place.num_heads,
            has_first_layer=0 in layers,
        )

    def _num_steady(self, num_tokens: int) -> int:
        """Steady keys that the last of the next num_tokens queries sees."""
        return self._full.num_kept + self._num_past + num_tokens

    def _table_bytes(self, place: int) -> int:
        """Bytes of the tables that every query looks through."""
        index = self._context.index(place)
        return lookup_bytes(index.groups if self._plans.levels == 2 else index.clusters)

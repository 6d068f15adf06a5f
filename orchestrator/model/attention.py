"""A question's attention: the meeting place of stored KV and parts (keys in, part out).

Owns, for one question on one document: the steady keys (sinks, last window, question, answer so
far), which parts are computed in which layer, and what is told to the recorder. Knows no decoder
and no files: the decoder calls it with rotated queries and keys and gets the attention output back.

Full-attention layers merge  steady | retrieved | estimated  (or steady | body when `exact`);
sliding-window layers attend to the last `window` keys and are neither selected nor recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_store import ResidentDocument
from orchestrator.model.recorder import Recorder
from orchestrator.recall import QuerySample
from sparse_attn.api import Backend
from sparse_attn.estimate import bound_missed_share
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import CentroidIndex, Units
from sparse_attn.state import Part, merge_parts
from sparse_attn.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Everything decided before the first forward: `auto` is already resolved.

    mode: exact, window or centroid; limit: of retrieved keys (0 in window); levels: of the look-up;
    tile_tokens: question tokens that read together; recall_period: one query in so many has its
    recall sampled, from num_strata times two keys a head; audit: compare every query with exact
    attention.
    """

    mode: str
    limit: Limit
    levels: int
    tile_tokens: int = 64
    recall_period: int = 4
    num_strata: int = 32
    seed: int = 0
    audit: bool = False


class DocumentContext:
    """A document in memory, ready for questions: its KV and the look-up tables of each layer.

    Shared by every question on the document and changed by none. num_sinks, num_window: the steady
    zone; load_clusters: brings the cluster tables where `resident` was loaded without, when a
    question first needs them.
    """

    def __init__(
        self,
        resident: ResidentDocument,
        *,
        num_sinks: int,
        num_window: int,
        load_clusters: Callable[[], None] | None = None,
    ) -> None:
        self.resident = resident
        self._load_clusters = load_clusters
        self.num_tokens = resident.num_tokens
        self.num_sinks = min(num_sinks, self.num_tokens)
        self.num_window = min(num_window, self.num_tokens - self.num_sinks)
        self._indexes: dict[int, CentroidIndex] = {}

    @property
    def num_steady(self) -> int:
        """Keys that are always read: sinks and window."""
        return self.num_sinks + self.num_window

    @property
    def body(self) -> slice:
        """Slots outside the steady zone."""
        return slice(self.num_sinks, self.num_tokens - self.num_window)

    def require_clusters(self) -> None:
        """Bring the cluster tables if they are not here yet; not in inference mode."""
        if not self.resident.clusters and self._load_clusters is not None:
            self._load_clusters()

    def index(self, full_layer: int) -> CentroidIndex:
        """Look-up tables of the `full_layer`-th full-attention layer, built on first use."""
        if full_layer not in self._indexes:
            self._indexes[full_layer] = _build_index(self.resident, full_layer)
        return self._indexes[full_layer]

    def steady_keys(self, full_layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G, sinks + window, D] of the steady zone."""
        k, v = self.resident.k[full_layer], self.resident.v[full_layer]
        stop = self.num_tokens - self.num_window
        return (
            torch.cat([k[:, : self.num_sinks], k[:, stop:]], dim=1),
            torch.cat([v[:, : self.num_sinks], v[:, stop:]], dim=1),
        )


def _build_index(resident: ResidentDocument, full_layer: int) -> CentroidIndex:
    tables = resident.clusters[full_layer]
    clusters = Units.from_tables(
        centroids=tables.centroids,
        variances=tables.variances,
        value_sums=tables.value_sums,
        radii=tables.radii,
        starts=tables.starts,
        sizes=tables.sizes,
    )
    first_cluster = tables.group_starts.long().clamp(max=clusters.starts.shape[1] - 1)
    groups = Units.from_tables(
        centroids=tables.group_centroids,
        variances=tables.group_variances,
        value_sums=tables.group_value_sums,
        radii=tables.group_radii,
        starts=clusters.starts.gather(1, first_cluster),
        sizes=tables.group_sizes,
    )
    return CentroidIndex(
        clusters=clusters,
        groups=groups,
        group_starts=tables.group_starts.long(),
        group_counts=tables.group_counts.long(),
    )


class QuestionAttention:
    """Attention of one question: call it once per layer and forward, in layer order.

    windows: per layer, the sliding window in tokens or None; capacity_tokens: question plus answer.
    """

    def __init__(
        self,
        context: DocumentContext,
        plan: AttentionPlan,
        backend: Backend,
        recorder: Recorder,
        *,
        scale: float,
        windows: tuple[int | None, ...],
        capacity_tokens: int,
    ) -> None:
        self._context, self._plan, self._backend, self._recorder = context, plan, backend, recorder
        self._scale, self._windows = scale, windows
        self._generator = torch.Generator().manual_seed(plan.seed)
        if plan.mode != "exact":
            context.require_clusters()
        self._queries = QuerySample(period=plan.recall_period, seed=plan.seed)
        self._places = _count_per_kind(windows)
        self._tails = [self._make_tail(layer, capacity_tokens) for layer in range(len(windows))]
        self._filled = [int(tail[2]) for tail in self._tails]

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output [T, H, D] in q's dtype, for q [T, H, D] and the new k, v [T, G, D]."""
        past = self._append(layer_idx, k, v)
        window = self._windows[layer_idx]
        if window is not None:
            return self._attend_sliding(layer_idx, q, past, window).out.to(q.dtype)
        steady = self._attend_steady(layer_idx, q, past)
        full_layer = self._places[layer_idx]
        if self._plan.mode == "exact":
            return self._attend_exact(full_layer, q, steady, past).to(q.dtype)
        return self._attend_tiles(full_layer, q, steady, past).to(q.dtype)

    def _attend_tiles(self, full_layer: int, q: Tensor, steady: Part, past: int) -> Tensor:
        """Question tokens read together, `tile_tokens` at a time."""
        num_tokens, tile = q.shape[0], self._plan.tile_tokens
        if num_tokens <= tile:
            return self._attend_selected(full_layer, q, steady, past + num_tokens, is_last=True)
        outs = []
        for start in range(0, num_tokens, tile):
            stop = min(start + tile, num_tokens)
            own = Part(steady.out[start:stop], steady.lse[start:stop])
            is_last = stop == num_tokens
            outs.append(
                self._attend_selected(full_layer, q[start:stop], own, past + stop, is_last=is_last)
            )
        return torch.cat(outs)

    def _make_tail(self, layer_idx: int, capacity_tokens: int) -> tuple[Tensor, Tensor, int]:
        """Buffers [G, kept + capacity, D] that begin with the document keys this layer always
        reads.
        """
        place, resident = self._places[layer_idx], self._context.resident
        if self._windows[layer_idx] is None:
            k, v = self._context.steady_keys(place)
            if self._plan.mode == "exact":  # the document is read as one run, steady zone included
                k, v = k[:, :0], v[:, :0]
        else:
            k, v = resident.sliding_k[place], resident.sliding_v[place]
        kept = k.shape[1]
        buffers = [x.new_empty((x.shape[0], kept + capacity_tokens, x.shape[2])) for x in (k, v)]
        buffers[0][:, :kept], buffers[1][:, :kept] = k, v
        return buffers[0], buffers[1], kept

    def _append(self, layer_idx: int, k: Tensor, v: Tensor) -> int:
        """Add the new keys to the layer's tail; returns how many it held before."""
        past, stop = self._filled[layer_idx], self._filled[layer_idx] + k.shape[0]
        tail_k, tail_v, _ = self._tails[layer_idx]
        tail_k[:, past:stop] = k.transpose(0, 1)
        tail_v[:, past:stop] = v.transpose(0, 1)
        self._filled[layer_idx] = stop
        return past

    def _attend_steady(self, layer_idx: int, q: Tensor, past: int) -> Part:
        k, v = (x[:, : past + q.shape[0]] for x in self._tails[layer_idx][:2])
        return self._backend.attend_prefix(q, k, v, past=past, scale=self._scale)

    def _attend_sliding(self, layer_idx: int, q: Tensor, past: int, window: int) -> Part:
        tail_k, tail_v, _ = self._tails[layer_idx]
        stop = past + q.shape[0]
        first = max(0, past - window + 1)
        k, v = tail_k[:, first:stop], tail_v[:, first:stop]
        if q.shape[0] == 1:
            return self._backend.attend(q, k, v, scale=self._scale)
        key = torch.arange(first, stop, device=q.device)
        query = torch.arange(past, stop, device=q.device).unsqueeze(1)
        mask = (key <= query) & (key > query - window)
        return self._backend.attend(q, k, v, scale=self._scale, mask=mask)

    def _attend_exact(self, full_layer: int, q: Tensor, steady: Part, past: int) -> Tensor:
        # Whole tensors: a slice between the heads' steady zones would be copied by bf16 products.
        k, v = self._context.resident.k[full_layer], self._context.resident.v[full_layer]
        part = self._backend.attend_body(
            q, k, v, steady, scale=self._scale, evidence=self._recorder.mass(full_layer)
        )
        self._recorder.add_exact(q.shape[0], past + q.shape[0] + k.shape[1])
        return part.out

    def _attend_selected(
        self, full_layer: int, q: Tensor, steady: Part, num_steady: int, *, is_last: bool
    ) -> Tensor:
        """One tile: select, read, estimate the rest, and tell the recorder what was missed."""
        resident, plan = self._context.resident, self._plan
        step = self._backend.attend_selected(
            q,
            resident.k[full_layer],
            resident.v[full_layer],
            self._context.index(full_layer),
            steady,
            scale=self._scale,
            limit=plan.limit,
            levels=plan.levels,
            is_estimating=plan.mode != "window",
            evidence=self._recorder.mass(full_layer) if is_last else None,
        )
        first_query = num_steady - q.shape[0] - self._context.num_steady
        num_sampled = self._sample_recall(full_layer, q, step, first_query=first_query)
        self._recorder.add_read(full_layer, q.shape[0], num_steady, step, num_sampled=num_sampled)
        if plan.audit:
            self._audit(full_layer, q, step, steady)
        return step.out

    def _sample_recall(self, full_layer: int, q: Tensor, step: Step, *, first_query: int) -> int:
        """Sample the recall of the tile's chosen queries; returns keys read for it."""
        chosen = self._queries.chosen(full_layer, first_query, q.shape[0])
        if not chosen:
            return 0
        lse_read, tail = step.lse_read, step.tail
        if len(chosen) < q.shape[0]:
            rows = torch.tensor(chosen, device=q.device)
            q, lse_read, tail = q[rows], lse_read[rows], tail.of_queries(rows)
        recall, bound = self._backend.sample_recall(
            q,
            self._context.resident.k[full_layer],
            tail,
            lse_read,
            scale=self._scale,
            num_strata=self._plan.num_strata,
            generator=self._generator,
        )
        self._recorder.add_recall(full_layer, [first_query + t for t in chosen], recall, bound)
        return 2 * self._plan.num_strata * q.shape[0] * q.shape[1]

    def _audit(self, full_layer: int, q: Tensor, step: Step, steady: Part) -> None:
        body, resident = self._context.body, self._context.resident
        k, v = resident.k[full_layer][:, body], resident.v[full_layer][:, body]
        total = merge_parts([steady, self._backend.attend(q, k, v, scale=self._scale)])
        bound = bound_missed_share(q, step.tail, step.lse_read, scale=self._scale)
        recall = torch.exp(step.lse_read - total.lse).clamp_(max=1.0)
        self._recorder.add_audit(full_layer, recall, bound)


def _count_per_kind(windows: tuple[int | None, ...]) -> list[int]:
    """For each layer, its index among the layers of its own kind (full or sliding)."""
    counts = {True: 0, False: 0}
    places = []
    for window in windows:
        places.append(counts[window is None])
        counts[window is None] += 1
    return places

"""A document in memory, ready for questions: a rank's shard of its KV and its look-up tables.

Owns what every question on the document shares and none changes: which slots are read in which
fold, the units of each layer, and the steady zone, which every rank of a head group has whole.
Knows no question and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kv_store import ClusterTables, ResidentDocument
from orchestrator.place import Place, fold_of
from sparse_attn.folds import NUM_FOLDS, Runs
from sparse_attn.select.centroid import CentroidIndex, Units

_ID_BITS = 31


class DocumentContext:
    """One document. Collective: every rank of the place's context group makes it.

    load_clusters: brings the cluster tables where `resident` was loaded without, when a question
    first needs them.
    """

    def __init__(
        self,
        resident: ResidentDocument,
        place: Place,
        *,
        load_clusters: Callable[[], None] | None = None,
    ) -> None:
        self.resident, self.place = resident, place
        self._load_clusters = load_clusters
        layout = resident.layout
        self.num_tokens = layout.num_tokens
        self.num_sinks = min(layout.sinks, self.num_tokens)
        self.num_window = min(layout.window, self.num_tokens - self.num_sinks)
        self.runs = _make_runs(resident)
        self._steady = _share_steady(resident, place, self.num_sinks, self.num_window)
        self._indexes: dict[int, CentroidIndex] = {}

    @property
    def num_steady(self) -> int:
        """Keys that are always read: sinks and window."""
        return self.num_sinks + self.num_window

    @property
    def own_share(self) -> float:
        """The share of the body's keys, over the head group's KV heads, that this rank holds."""
        num_body = (self.num_tokens - self.num_steady) * self.resident.num_kv_heads
        return float(self.runs.count.sum()) / max(1, num_body)

    def require_clusters(self) -> None:
        """Bring the cluster tables if they are not here yet; not in inference mode."""
        if not self.resident.clusters and self._load_clusters is not None:
            self._load_clusters()

    def index(self, full_layer: int) -> CentroidIndex:
        """Look-up tables of the `full_layer`-th full-attention layer, built on first use."""
        if full_layer not in self._indexes:
            table = self.resident.clusters[full_layer]
            self._indexes[full_layer] = _build_index(self.resident, table)
        return self._indexes[full_layer]

    def steady_keys(self, full_layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G, sinks + window, D] of the steady zone, in token order."""
        return self._steady[0][full_layer], self._steady[1][full_layer]


def _make_runs(resident: ResidentDocument) -> Runs:
    """The body slots of each held segment, by KV head, fold and segment."""
    holding = resident.holding
    spans: list[tuple[int, int]] = []
    bounds = []
    for kv_head_idx, segments in zip(holding.kv_heads, holding.segments, strict=True):
        first = len(spans)
        spans += [holding.body_of(segment_idx, kv_head_idx) for segment_idx in segments]
        folds = [fold_of(segment_idx, kv_head_idx) for segment_idx in segments]
        bounds.append([first + edge for edge in _fold_bounds(folds, range(len(folds) + 1))])
    starts = torch.tensor([start for start, _ in spans], dtype=torch.int64)
    ends = torch.tensor([end for _, end in spans], dtype=torch.int64)
    return Runs(first=starts, count=ends - starts, bounds=torch.tensor(bounds, dtype=torch.int64))


def _fold_bounds(folds: Sequence[int], edges: Sequence[int]) -> list[int]:
    """Where each of the 8 folds begins, and where the last ends, among runs sorted by fold;
    edges[i]: where run i begins.
    """
    return [edges[sum(own < fold for own in folds)] for fold in range(NUM_FOLDS + 1)]


def _build_index(resident: ResidentDocument, tables: ClusterTables) -> CentroidIndex:
    clusters = Units.from_tables(
        centroids=tables.centroids,
        variances=tables.variances,
        value_sums=tables.value_sums,
        radii=tables.radii,
        starts=tables.starts,
        sizes=tables.sizes,
        **_order_of(resident, tables.columns, tables.sizes.shape[1]),
    )
    first_cluster = tables.group_starts.long().clamp(max=max(0, clusters.starts.shape[1] - 1))
    groups = Units.from_tables(
        centroids=tables.group_centroids,
        variances=tables.group_variances,
        value_sums=tables.group_value_sums,
        radii=tables.group_radii,
        starts=clusters.starts.gather(1, first_cluster),
        sizes=tables.group_sizes,
        **_order_of(resident, tables.group_columns, tables.group_sizes.shape[1]),
    )
    return CentroidIndex(
        clusters=clusters,
        groups=groups,
        group_starts=tables.group_starts.long(),
        group_counts=tables.group_counts.long(),
    )


def _order_of(
    resident: ResidentDocument, columns: tuple[tuple[int, ...], ...], num_units: int
) -> dict[str, Tensor]:
    """bounds [G, 9] of the folds, and ids [G, U] that number the units the same on every mesh."""
    holding, num_segments = resident.holding, resident.layout.num_segments
    # The document's segments in order of fold, then units within one: the same on every mesh.
    shift = _ID_BITS - num_segments.bit_length()
    bounds, ids = [], torch.zeros((len(columns), num_units), dtype=torch.int64)
    for head, (kv_head_idx, segments) in enumerate(
        zip(holding.kv_heads, holding.segments, strict=True)
    ):
        folds = [fold_of(segment_idx, kv_head_idx) for segment_idx in segments]
        bounds.append(_fold_bounds(folds, columns[head]))
        order = [s for _, s in sorted((fold_of(s, kv_head_idx), s) for s in range(num_segments))]
        for i, segment_idx in enumerate(segments):
            first, last = columns[head][i : i + 2]
            ids[head, first:last] = order.index(segment_idx) << shift
            ids[head, first:last] += torch.arange(last - first)
    device = resident.device
    return {"bounds": torch.tensor(bounds, dtype=torch.int64), "ids": ids.to(device)}


def _share_steady(
    resident: ResidentDocument, place: Place, num_sinks: int, num_window: int
) -> tuple[Tensor, Tensor]:
    """Keys and values [Lf, G, sinks + window, D] of the steady zone, from whoever holds each."""
    layout, holding = resident.layout, resident.holding
    shape = (
        layout.num_full_layers,
        resident.num_kv_heads,
        num_sinks + num_window,
        layout.head_dim,
    )
    k, v = (torch.zeros(shape, dtype=resident.dtype, device=resident.device) for _ in range(2))
    for segment_idx, kv_head_idx in holding.files:
        if not layout.steady_tokens(segment_idx):
            continue
        first, last = layout.clustered_span(segment_idx)
        start, end = layout.segment_span(segment_idx)
        head = kv_head_idx - holding.first_kv_head
        tokens = torch.tensor([*range(start, start + first), *range(start + last, end)])
        places = torch.where(tokens < num_sinks, tokens, tokens - layout.num_tokens + shape[2])
        for target, name in ((k, "k"), (v, "v")):
            steady = resident.steady_rows(name, segment_idx, kv_head_idx)
            target[:, head].index_copy_(1, places.to(target.device), steady)
    for tensor in (k, v):
        place.context.all_reduce_(tensor)  # every key is one rank's, and zero elsewhere
    return k, v

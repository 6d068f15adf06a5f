"""Cluster tensors of a whole document, one table a layer, assembled from its segments.

Owns the padding and the global numbering of slots and clusters. Refuses to know how clusters are
built or scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_store.host import zeros_host
from kv_store.layout import CLUSTER_TENSORS


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTables:
    """The clusters of one layer. Size or count 0 marks padding, which may stand between segments.

    Per cluster: `starts` (slot of the document) and `sizes` [G, C] int64; `centroids`,
    `value_sums`, `variances` [G, C, D] float16 and `radii` [G, C] float32. Per group:
    `group_starts` (column of its first cluster), `group_counts` (clusters) and `group_sizes` (keys)
    [G, P] int64, the others likewise. Columns are in segment order; the slots of a group are
    contiguous.
    """

    starts: Tensor
    sizes: Tensor
    centroids: Tensor
    value_sums: Tensor
    variances: Tensor
    radii: Tensor
    group_starts: Tensor
    group_counts: Tensor
    group_sizes: Tensor
    group_centroids: Tensor
    group_value_sums: Tensor
    group_variances: Tensor
    group_radii: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentColumns:
    """Where a segment's clusters and groups stand in the tables, and its first slot."""

    first_slot: int
    clusters: slice
    groups: slice


class TableBuilder:
    """The tables of all layers while segments are put into them, one KV head at a time."""

    def __init__(
        self,
        first_slots: Sequence[int],
        widths: Sequence[tuple[int, int]],
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> None:
        """Allocate for segments with those first slots and those numbers of clusters and groups."""
        self._columns: list[SegmentColumns] = []
        cluster = group = 0
        for first_slot, (num_clusters, num_groups) in zip(first_slots, widths, strict=True):
            clusters = slice(cluster, cluster + num_clusters)
            groups = slice(group, group + num_groups)
            self._columns.append(
                SegmentColumns(first_slot=first_slot, clusters=clusters, groups=groups)
            )
            cluster, group = clusters.stop, groups.stop
        self._tables: dict[str, Tensor] = {}
        for name, (dtype, letter, has_dim) in CLUSTER_TENSORS.items():
            shape = (num_layers, num_kv_heads, cluster if letter == "C" else group)
            self._tables[name] = zeros_host(
                (*shape, head_dim) if has_dim else shape,
                torch.int64 if dtype == "int32" else getattr(torch, dtype),
            )

    def place(self, name: str, segment_idx: int, kv_head_idx: int, width: int) -> Tensor:
        """The first `width` columns of a segment in one table: [Lf, width(, D)], a view."""
        columns = self._columns[segment_idx]
        start = (columns.clusters if CLUSTER_TENSORS[name][1] == "C" else columns.groups).start
        return self._tables[name][:, kv_head_idx, start : start + width]

    def put(self, segment_idx: int, kv_head_idx: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors to their place, segment-local slots and clusters made global."""
        columns = self._columns[segment_idx]
        offsets = {"cluster_starts": columns.first_slot, "group_starts": columns.clusters.start}
        for name, stored in tensors.items():
            whole = columns.clusters if CLUSTER_TENSORS[name][1] == "C" else columns.groups
            width = min(stored.shape[1], whole.stop - whole.start)
            place = self.place(name, segment_idx, kv_head_idx, width)
            place.copy_(stored[:, :width])
            if name in offsets:
                place += offsets[name]

    def finish(self, *, device: torch.device) -> tuple[ClusterTables, ...]:
        """One table a layer."""
        moved = {n.removeprefix("cluster_"): t.to(device) for n, t in self._tables.items()}
        return tuple(
            ClusterTables(**{name: table[layer_idx] for name, table in moved.items()})
            for layer_idx in range(moved["sizes"].shape[0])
        )


def count_columns(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Clusters and groups of one KV head's tensors up to the last that some layer uses."""
    return _last_used(tensors["cluster_sizes"]), _last_used(tensors["group_counts"])


def _last_used(counts: Tensor) -> int:
    used = (counts > 0).any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def trim_padding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One KV head's tensors without the padding columns that no layer uses."""
    if "cluster_sizes" not in tensors:
        return dict(tensors)
    widths = dict(zip("CP", count_columns(tensors), strict=True))
    return {
        name: tensor[:, : widths[CLUSTER_TENSORS[name][1]]] if name in CLUSTER_TENSORS else tensor
        for name, tensor in tensors.items()
    }

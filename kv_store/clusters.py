"""Cluster tensors of a document or a shard of it, one table a layer, assembled from its segments.

Owns the padding and the global numbering of slots and clusters. Refuses to know how clusters are
built or scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kv_store.holding import Holding
from kv_store.host import zeros_host
from kv_store.layout import CLUSTER_TENSORS


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTables:
    """The clusters of one layer. Size or count 0 marks padding: of a layer that has fewer clusters
    in a segment than another, and after the last column of a head.

    Per cluster: `starts` (slot) and `sizes` [G, C] int64; `centroids`, `value_sums`, `variances`
    [G, C, D] float16 and `radii` [G, C] float32. Per group: `group_starts` (column of its first
    cluster), `group_counts` (clusters) and `group_sizes` (keys) [G, P] int64, the others likewise.
    Columns are in the holding's order of segments; the slots of a group are contiguous.
    columns, group_columns: for each KV head, where the columns of each held segment begin, in that
    order, and where the last one's end; the same in every layer.
    """

    columns: tuple[tuple[int, ...], ...]
    group_columns: tuple[tuple[int, ...], ...]
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

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        values = (getattr(self, field.name) for field in fields(self))
        return sum(value.nbytes for value in values if isinstance(value, Tensor))


class TableBuilder:
    """The tables of all layers while held segments are put into them, one KV head at a time."""

    def __init__(
        self,
        holding: Holding,
        widths: Mapping[tuple[int, int], tuple[int, int]],
        *,
        device: torch.device,
    ) -> None:
        """widths: numbers of clusters and groups of each held (segment, KV head); device: where the
        tables are put together.
        """
        self._holding = holding
        self._bounds = {
            letter: tuple(
                _bounds([widths[segment_idx, kv_head_idx][i] for segment_idx in held])
                for kv_head_idx, held in zip(holding.kv_heads, holding.segments, strict=True)
            )
            for i, letter in enumerate("CP")
        }
        layout = holding.layout
        self._tables: dict[str, Tensor] = {}
        for name, (dtype, letter, has_dim) in CLUSTER_TENSORS.items():
            num_columns = max(bounds[-1] for bounds in self._bounds[letter])
            shape = (layout.num_full_layers, len(holding.segments), num_columns)
            self._tables[name] = _zeros(
                (*shape, layout.head_dim) if has_dim else shape,
                torch.int64 if dtype == "int32" else getattr(torch, dtype),
                device,
            )

    def place(self, name: str, segment_idx: int, kv_head_idx: int) -> Tensor:
        """The columns of a held segment in one table: [Lf, width(, D)], a view."""
        head = kv_head_idx - self._holding.first_kv_head
        first, last = self._columns(CLUSTER_TENSORS[name][1], segment_idx, kv_head_idx)
        return self._tables[name][:, head, first:last]

    def put(self, segment_idx: int, kv_head_idx: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors to their place, segment-local slots and clusters made global."""
        offsets = {
            "cluster_starts": self._holding.slots_of(segment_idx, kv_head_idx)[0],
            "group_starts": self._columns("C", segment_idx, kv_head_idx)[0],
        }
        for name, stored in tensors.items():
            place = self.place(name, segment_idx, kv_head_idx)
            place.copy_(stored[:, : place.shape[1]])
            if name in offsets:
                place += offsets[name]

    def finish(self, *, device: torch.device) -> tuple[ClusterTables, ...]:
        """One table a layer."""
        moved = {n.removeprefix("cluster_"): t.to(device) for n, t in self._tables.items()}
        return tuple(
            ClusterTables(
                columns=self._bounds["C"],
                group_columns=self._bounds["P"],
                **{name: table[layer_idx] for name, table in moved.items()},
            )
            for layer_idx in range(moved["sizes"].shape[0])
        )

    def _columns(self, letter: str, segment_idx: int, kv_head_idx: int) -> tuple[int, int]:
        head = kv_head_idx - self._holding.first_kv_head
        place = self._holding.segments[head].index(segment_idx)
        bounds = self._bounds[letter][head]
        return bounds[place], bounds[place + 1]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return zeros_host(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def _bounds(widths: list[int]) -> tuple[int, ...]:
    bounds = [0]
    for width in widths:
        bounds.append(bounds[-1] + width)
    return tuple(bounds)


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

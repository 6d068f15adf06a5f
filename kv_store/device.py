"""The KV of one document in the memory of one device.

Owns the resident tensors, which an ingest fills segment by segment and `load.py` at once from disk.
Refuses to know files, attention, budgets and ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kv_store.clusters import ClusterTables, TableBuilder, count_columns
from kv_store.errors import InvalidSegment
from kv_store.host import empty_host
from kv_store.layout import CLUSTER_TENSORS, Layout

SLOT_TENSORS = ("k", "v", "positions")


class ResidentDocument:
    """KV of the sealed segments, per full-attention layer in slot order.

    `k[l]`, `v[l]` [G, N, D] `dtype`, contiguous; `positions[l]` [G, N] int32, the document token of
    each slot; slots from `num_sealed` on are not filled yet. `sliding_k[l]`, `sliding_v[l]` [G, W',
    D]: the last min(num_sealed, W) tokens in token order, per sliding-window layer. `clusters[l]`:
    one table a full-attention layer after `freeze` or `load_clusters`, empty before it or if the
    document has no clusters.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        num_full_layers: int,
        num_sliding_layers: int,
        sliding_window: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Allocate for all `num_tokens`; nothing is filled."""
        self.num_tokens = num_tokens
        self.num_sealed = 0
        self.num_kv_heads = num_kv_heads
        self.sliding_window = sliding_window
        self.dtype = dtype
        self.device = torch.device(device)
        self.clusters: tuple[ClusterTables, ...] = ()
        slots = (num_full_layers, num_kv_heads, num_tokens)
        self._slots = {
            "k": self._empty((*slots, head_dim), dtype),
            "v": self._empty((*slots, head_dim), dtype),
            "positions": self._empty(slots, torch.int32),
        }
        self.k = list(self._slots["k"])
        self.v = list(self._slots["v"])
        self.positions = list(self._slots["positions"])
        no_tail = torch.empty(
            (num_sliding_layers, num_kv_heads, 0, head_dim), dtype=dtype, device=self.device
        )
        self._tails = {"sliding_k": no_tail, "sliding_v": no_tail}
        self._segments: list[tuple[int, list[dict[str, Tensor]]]] = []

    @staticmethod
    def for_layout(
        layout: Layout, *, dtype: torch.dtype, device: torch.device | str
    ) -> ResidentDocument:
        """Room for a document of that layout."""
        return ResidentDocument(
            num_tokens=layout.num_tokens,
            num_full_layers=layout.num_full_layers,
            num_sliding_layers=layout.num_sliding_layers,
            sliding_window=layout.sliding_window,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            dtype=dtype,
            device=device,
        )

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu":
            return empty_host(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    @property
    def sliding_k(self) -> list[Tensor]:
        """Keys of each sliding-window layer, [G, W', D]."""
        return list(self._tails["sliding_k"])

    @property
    def sliding_v(self) -> list[Tensor]:
        """Values of each sliding-window layer, [G, W', D]."""
        return list(self._tails["sliding_v"])

    @property
    def sliding_start(self) -> int:
        """Document token of the first sliding-window key."""
        return self.num_sealed - min(self.num_sealed, self.sliding_window)

    def append(self, heads: Sequence[Mapping[str, Tensor]]) -> None:
        """Copy one sealed segment in, one mapping per KV head as in its files, floats converted.

        Errors: InvalidSegment if heads or tokens are more than there is room for.
        """
        start = self.num_sealed
        end = start + heads[0]["k"].shape[1]
        if len(heads) != self.num_kv_heads or end > self.num_tokens:
            raise InvalidSegment(
                f"segment of {len(heads)} KV heads up to token {end}; "
                f"limit {self.num_kv_heads} and {self.num_tokens}; append what was sealed"
            )
        for kv_head_idx, tensors in enumerate(heads):
            self.fill(kv_head_idx, start, end, tensors)
        self.num_sealed = end
        self.append_tail(heads)
        kept = [{n: t for n, t in head.items() if n in CLUSTER_TENSORS} for head in heads]
        self._segments.append((start, kept))

    def fill(self, kv_head_idx: int, start: int, end: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy k, v, positions of one KV head to slots `start` to `end`, without sealing them."""
        for name in SLOT_TENSORS:
            self._slots[name][:, kv_head_idx, start:end].copy_(tensors[name])

    def slots(self, name: str, kv_head_idx: int, start: int, end: int) -> Tensor:
        """One KV head's slots `start` to `end` of "k", "v" or "positions": [Lf, S(, D)], a view."""
        return self._slots[name][:, kv_head_idx, start:end]

    def append_tail(self, heads: Sequence[Mapping[str, Tensor]]) -> None:
        """Roll the sliding-window tensors over those of the segment that ends at `num_sealed`."""
        if not self._tails["sliding_k"].shape[0]:
            return
        width = min(self.num_sealed, self.sliding_window)
        for name, old in self._tails.items():
            new = torch.stack([head[name] for head in heads], dim=1).to(old)
            tail = torch.cat([old, new], dim=2)
            self._tails[name] = tail[:, :, max(0, tail.shape[2] - width) :].contiguous()

    def freeze(self) -> None:
        """Build the cluster tables out of the appended segments; the document is complete.

        Errors: InvalidSegment while tokens are missing.
        """
        if self.num_sealed != self.num_tokens:
            raise InvalidSegment(
                f"{self.num_sealed} tokens resident, wanted {self.num_tokens}; append the others"
            )
        segments, self._segments = self._segments, []
        if segments and segments[0][1][0]:
            builder = self.table_builder(
                [start for start, _ in segments],
                [widest(count_columns(head) for head in heads) for _, heads in segments],
            )
            for segment_idx, (_, heads) in enumerate(segments):
                for kv_head_idx, head in enumerate(heads):
                    builder.put(segment_idx, kv_head_idx, head)
            self.clusters = builder.finish(device=self.device)

    def table_builder(
        self, first_slots: Sequence[int], widths: Sequence[tuple[int, int]]
    ) -> TableBuilder:
        """Empty cluster tables for segments of that many clusters and groups."""
        num_layers, num_kv_heads, _, head_dim = self._slots["k"].shape
        return TableBuilder(
            first_slots,
            widths,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )


def widest(columns: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Clusters and groups of the fullest KV head of a segment."""
    clusters, groups = zip(*columns, strict=True)
    return max(clusters), max(groups)

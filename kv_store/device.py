"""The KV of one document, or of a shard of it, in the memory of one device.

Owns the resident tensors, which an ingest fills segment by segment and `load.py` at once from disk.
Refuses to know files, attention, budgets and ranks: a `Holding` says what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kv_store import fp8
from kv_store.clusters import ClusterTables, TableBuilder, count_columns
from kv_store.errors import InvalidSegment
from kv_store.holding import Holding
from kv_store.host import empty_host
from kv_store.layout import CLUSTER_TENSORS

SLOT_TENSORS = ("k", "v", "positions")


class ResidentDocument:
    """KV of the sealed segments that are held, per full-attention layer in slot order.

    `k[l]`, `v[l]` [N, D] `dtype`, contiguous; `positions[l]` [N] int32, the document token of each
    slot, N = `holding.num_slots`; slots of segments that are not sealed are not filled yet.
    Of a document in fp8 k and v are e4m3, to be multiplied by `scales[l]` [G, 2] float32, of a
    head's keys and of its values; `scales[l]` is None of others.
    `sliding_k[l]`, `sliding_v[l]` [G, W', D]: the last min(num_sealed, W) tokens of all of the
    holding's KV heads in token order, per sliding-window layer. `clusters[l]`: one table a
    full-attention layer after `freeze` or `load_clusters`, empty before it or if the document has
    no clusters.
    """

    def __init__(self, holding: Holding, *, dtype: torch.dtype, device: torch.device | str) -> None:
        """Allocate for all that will be held; nothing is filled. dtype: of keys as they are used,
        and as they are resident unless the document is in fp8.
        """
        layout = holding.layout
        self.holding, self.layout = holding, layout
        self.num_sealed = 0
        self.dtype = dtype
        self.device = torch.device(device)
        self.clusters: tuple[ClusterTables, ...] = ()
        self.slot_dtype = fp8.DTYPE if layout.is_fp8 else dtype
        slots = (layout.num_full_layers, holding.num_slots)
        self._slots = {
            "k": self._empty((*slots, layout.head_dim), self.slot_dtype),
            "v": self._empty((*slots, layout.head_dim), self.slot_dtype),
            "positions": self._empty(slots, torch.int32),
        }
        self.k = list(self._slots["k"])
        self.v = list(self._slots["v"])
        self.positions = list(self._slots["positions"])
        self._scales: Tensor | None = None
        if layout.is_fp8:
            of_heads = (layout.num_full_layers, self.num_kv_heads, 2)
            self._scales = torch.ones(of_heads, device=self.device)
        # Of a document in fp8: keys and values of the steady zone, by (segment, KV head).
        self._steady: dict[tuple[int, int], dict[str, Tensor]] = {}
        shape = (layout.num_sliding_layers, self.num_kv_heads, 0, layout.head_dim)
        no_tail = torch.empty(shape, dtype=dtype, device=self.device)
        self._tails = {"sliding_k": no_tail, "sliding_v": no_tail}
        self._kept: dict[tuple[int, int], dict[str, Tensor]] = {}

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu":
            return empty_host(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the holding."""
        return len(self.holding.segments)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole document."""
        return self.layout.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of everything resident."""
        tables = [table.num_bytes for table in self.clusters]
        tensors = [*self._slots.values(), *self._tails.values()]
        tensors += [x for rows in self._steady.values() for x in rows.values()]
        tensors += [] if self._scales is None else [self._scales]
        return sum(tensor.nbytes for tensor in tensors) + sum(tables)

    @property
    def scales(self) -> list[Tensor] | list[None]:
        """What each layer's keys and values are multiplied by, [G, 2]; None where by nothing."""
        if self._scales is None:
            return [None] * self.layout.num_full_layers
        return list(self._scales)

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
        return self.num_sealed - min(self.num_sealed, self.layout.sliding_window)

    def append(self, segment_idx: int, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take the next sealed segment in: the named tensors of each KV head, by its number.

        Of a head whose segment is not held, only scales and sliding-window tensors are needed and
        used.
        Errors: InvalidSegment if it is not the next one, or a head is missing.
        """
        wanted = self.layout.segment_span(segment_idx) if segment_idx >= 0 else (0, 0)
        if wanted[0] != self.num_sealed or self.num_sealed >= self.num_tokens:
            raise InvalidSegment(
                f"segment {segment_idx} after {self.num_sealed} of {self.num_tokens} tokens; limit "
                "the next one; append segments in order"
            )
        if any(kv_head_idx not in heads for kv_head_idx in self.holding.kv_heads):
            raise InvalidSegment(
                f"segment {segment_idx} with KV heads {sorted(heads)}; limit all of "
                f"{list(self.holding.kv_heads)}; append what was sealed"
            )
        for kv_head_idx in self.holding.kv_heads:
            if "scales" in heads[kv_head_idx]:
                self.set_scales(kv_head_idx, heads[kv_head_idx]["scales"])
            if self.holding.holds(segment_idx, kv_head_idx):
                self.fill(segment_idx, kv_head_idx, heads[kv_head_idx])
        self.num_sealed = wanted[1]
        self.append_tail([heads[kv_head_idx] for kv_head_idx in self.holding.kv_heads])

    def fill(self, segment_idx: int, kv_head_idx: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy k, v, positions of a held segment to their slots and keep its steady and cluster
        tensors, without sealing it; floats are converted.
        """
        for name in SLOT_TENSORS:
            self.slots(name, segment_idx, kv_head_idx).copy_(tensors[name])
        if self._scales is not None:
            self.keep_steady(segment_idx, kv_head_idx, tensors)
        kept = {name: tensor for name, tensor in tensors.items() if name in CLUSTER_TENSORS}
        self._kept[segment_idx, kv_head_idx] = kept

    def slots(self, name: str, segment_idx: int, kv_head_idx: int) -> Tensor:
        """A held segment's part of "k", "v" or "positions": [Lf, S(, D)], a view."""
        start, end = self.holding.slots_of(segment_idx, kv_head_idx)
        return self._slots[name][:, start:end]

    def set_scales(self, kv_head_idx: int, scales: Tensor) -> None:
        """What every layer's keys and values of a KV head are multiplied by: [Lf, 2]."""
        assert self._scales is not None
        self._scales[:, kv_head_idx - self.holding.first_kv_head] = scales.to(self.device)

    def keep_steady(
        self, segment_idx: int, kv_head_idx: int, tensors: Mapping[str, Tensor]
    ) -> None:
        """Keep what a document in fp8 stores of the steady zone of a held segment."""
        if self.layout.steady_tokens(segment_idx):
            self._steady[segment_idx, kv_head_idx] = {
                name: tensors[f"steady_{name}"].to(self.device, self.dtype) for name in ("k", "v")
            }

    def steady_rows(self, name: str, segment_idx: int, kv_head_idx: int) -> Tensor:
        """A held segment's keys or values in the steady zone, token order: [Lf, n, D] `dtype`."""
        if (segment_idx, kv_head_idx) in self._steady:
            return self._steady[segment_idx, kv_head_idx][name]
        first, last = self.layout.clustered_span(segment_idx)
        rows = self.slots(name, segment_idx, kv_head_idx)
        return torch.cat([rows[:, :first], rows[:, last:]], dim=1).to(self.dtype)

    def wide_head(self, name: str, full_layer: int, kv_head_idx: int, num_slots: int) -> Tensor:
        """The first slots of a KV head as they are used: [num_slots, D] `dtype`, a copy if the
        document is in fp8. Ends where a segment ends.
        """
        head = kv_head_idx - self.holding.first_kv_head
        start = self.holding.head_bounds[head]
        rows = self._slots[name][full_layer, start : start + num_slots]
        if self._scales is None:
            return rows
        wide = fp8.widen(rows, self._scales[full_layer, head, "kv".index(name)], self.dtype)
        for segment_idx in self.holding.segments[head]:
            first, last = (x - start for x in self.holding.slots_of(segment_idx, kv_head_idx))
            if last <= num_slots and (segment_idx, kv_head_idx) in self._steady:
                steady = self._steady[segment_idx, kv_head_idx][name][full_layer]
                body = slice(*(x - start for x in self.holding.body_of(segment_idx, kv_head_idx)))
                wide[first : body.start] = steady[: body.start - first]
                wide[body.stop : last] = steady[body.start - first :]
        return wide

    def append_tail(self, heads: Sequence[Mapping[str, Tensor]]) -> None:
        """Roll the sliding-window tensors over those of the segment that ends at `num_sealed`."""
        if not self._tails["sliding_k"].shape[0]:
            return
        width = min(self.num_sealed, self.layout.sliding_window)
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
        kept, self._kept = self._kept, {}
        if not any(kept.values()):
            return
        widths = {file: count_columns(kept[file]) for file in kept}
        builder = TableBuilder(self.holding, widths, device=self.device)
        for file, tensors in kept.items():
            builder.put(*file, tensors)
        self.clusters = builder.finish(device=self.device)

    def table_builder(self, widths: Mapping[tuple[int, int], tuple[int, int]]) -> TableBuilder:
        """Empty cluster tables in host memory, for what is read from disk; widths: clusters and
        groups of each held (segment, KV head).
        """
        return TableBuilder(self.holding, widths, device=torch.device("cpu"))

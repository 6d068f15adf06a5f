"""What a chunk of a document's prefill attends to.

Owns the keys of the open (not yet sealed) segment and the rule that later chunks attend to the
stored form of sealed segments. Full-attention layers merge three parts: sealed segments in slot
order | the open segment's earlier chunks | the chunk itself, causally; with `--prefill sparse` the
first is `sparse_prefill.py`'s. Knows no files, clusters and decoder.

Over ranks: sealed segments are attended where they lie, and the parts pushed to the owners of the
query heads; every context rank has the open segment and attends to it for the query heads that it
owns, while the parts of the others are in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from collectives.overlap import Steps
from kv_store import Holding, ResidentDocument
from orchestrator.model.decoder import Attend, Store
from orchestrator.place import Place
from orchestrator.sparse_prefill import SealedBlocks, SparseParams
from sparse_attn.api import Backend
from sparse_attn.state import Part, merge_parts


class PrefillAttention:
    """`attend` of an ingest. Call `advance` after each chunk, `restart` after each seal.

    open_k, open_v: [L, G, segment_tokens, D], the open segment of every layer in token order, for
    all KV heads of the head group.
    """

    def __init__(
        self,
        resident: ResidentDocument,
        backend: Backend,
        place: Place,
        *,
        scale: float,
        windows: tuple[int | None, ...],
        sparse: SparseParams | None = None,
    ) -> None:
        self._resident, self._backend, self._place = resident, backend, place
        self._scale, self._windows = scale, windows
        self._blocks = (
            None if sparse is None else SealedBlocks(resident, backend, place, sparse, scale=scale)
        )
        self.full_layers = [layer for layer, window in enumerate(windows) if window is None]
        self.sliding_layers = [layer for layer, window in enumerate(windows) if window is not None]
        self._index_of = {
            layer: i
            for kind in (self.full_layers, self.sliding_layers)
            for i, layer in enumerate(kind)
        }
        layout = resident.layout
        self._is_whole = resident.holding == Holding.whole(layout)
        shape = (len(windows), resident.num_kv_heads, layout.segment_tokens, layout.head_dim)
        self.open_k = torch.empty(shape, dtype=resident.dtype, device=resident.device)
        self.open_v = torch.empty_like(self.open_k)
        self._runs = place.runs()
        self._own_run = self._runs[place.context.rank]
        self._num_open = 0

    def at(self, offset: int) -> tuple[Attend, Store]:
        """`attend` and `store` of tokens that begin `offset` after what is in the open segment."""
        start = self._num_open + offset
        return partial(self._attend, start=start), partial(self._store, start=start)

    def advance(self, num_tokens: int) -> None:
        """The chunk's keys are in the open segment of every layer."""
        self._num_open += num_tokens

    def restart(self) -> None:
        """The open segment was sealed and appended to the resident document."""
        self._num_open = 0
        if self._blocks is not None:
            self._blocks.append()

    def _store(self, layer_idx: int, k: Tensor, v: Tensor, *, start: int) -> None:
        chunk = slice(start, start + k.shape[0])
        self.open_k[layer_idx][:, chunk] = k.transpose(0, 1)
        self.open_v[layer_idx][:, chunk] = v.transpose(0, 1)

    def _attend(
        self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, *, start: int
    ) -> Tensor | Steps[Tensor]:
        """Attention output for rotated q [T, H, D] and the tokens' own k, v [T, G, D]."""
        self._store(layer_idx, k, v, start=start)
        if self._place.is_alone:
            if self._windows[layer_idx] is not None:
                return self._attend_sliding(layer_idx, q, start).out.to(q.dtype)
            parts = self._attend_open(layer_idx, q, start)
            if self._resident.num_sealed:
                parts += self._attend_sealed(self._index_of[layer_idx], q, start)
            return merge_parts(parts).out.to(q.dtype)
        return self._attend_steps(layer_idx, q, start)

    def _attend_steps(self, layer_idx: int, q: Tensor, start: int) -> Steps[Tensor]:
        if self._windows[layer_idx] is not None:
            own = self._attend_sliding(layer_idx, q, start)
        elif not self._resident.num_sealed:
            own = merge_parts(self._attend_open(layer_idx, q, start))
        else:
            sealed = self._attend_sealed(self._index_of[layer_idx], q, start)
            if self._place.context.size == 1:
                own = merge_parts([*self._attend_open(layer_idx, q, start), *sealed])
            else:
                pending = self._place.context.start_all_to_all(self._pack(*sealed))
                parts = self._attend_open(layer_idx, q, start)
                received = yield pending
                own = merge_parts([*parts, *self._unpack(received)])
        return (yield from self._gather_heads(own.out.to(q.dtype)))

    def _attend_open(self, layer_idx: int, q: Tensor, start: int) -> list[Part]:
        """The tokens themselves and what is before them in the open segment, own query heads."""
        stop, backend = start + q.shape[0], self._backend
        k, v = self.open_k[layer_idx], self.open_v[layer_idx]
        causal, before = [], []
        for heads, kv in self._own_heads():
            rows = q[:, heads]
            now = k[kv, start:stop], v[kv, start:stop]
            causal.append(backend.attend_causal(rows, *now, scale=self._scale))
            if start:
                earlier = k[kv, :start], v[kv, :start]
                before.append(backend.attend(rows, *earlier, scale=self._scale))
        return [_beside(parts) for parts in (causal, before) if parts]

    def _attend_sealed(self, full_layer: int, q: Tensor, start: int) -> list[Part]:
        """What this rank holds of the sealed segments, for all query heads of the head group: one
        part, but where a sparse ingest makes two.
        """
        if self._blocks is not None:
            return self._blocks.attend(full_layer, q, num_before=start)
        spans, kv_heads = self._sealed_spans(), self._resident.holding.kv_heads
        if self._is_whole and not self._resident.layout.is_fp8:
            sealed = slice(0, self._resident.num_sealed)
            k, v = self._resident.k[full_layer], self._resident.v[full_layer]
            k, v = (x.view(len(spans), -1, x.shape[1])[:, sealed] for x in (k, v))
            return [self._backend.attend(q, k, v, scale=self._scale)]
        per_group, parts = self._place.group_size, []
        for head, (first, last) in enumerate(spans):
            rows, kv_head = q[:, head * per_group : (head + 1) * per_group], kv_heads[head]
            wide = partial(self._resident.wide_head, full_layer=full_layer, kv_head_idx=kv_head)
            own = [wide(name, num_slots=last - first)[None] for name in ("k", "v")]
            parts.append(self._backend.attend(rows, *own, scale=self._scale))
        return [_beside(parts)]

    def _sealed_spans(self) -> list[tuple[int, int]]:
        """Slots of each KV head that are filled: those of its held segments that are sealed."""
        holding, num_sealed = self._resident.holding, self._resident.num_sealed
        spans = []
        for first, segments in zip(holding.head_bounds, holding.segments, strict=False):
            ends = (holding.layout.segment_span(s) for s in segments)
            spans.append((first, first + sum(e - s for s, e in ends if e <= num_sealed)))
        return spans

    def _attend_sliding(self, layer_idx: int, q: Tensor, start: int) -> Part:
        index, window = self._index_of[layer_idx], self._windows[layer_idx]
        assert window is not None
        stop = start + q.shape[0]
        k = torch.cat([self._resident.sliding_k[index], self.open_k[layer_idx][:, :stop]], dim=1)
        v = torch.cat([self._resident.sliding_v[index], self.open_v[layer_idx][:, :stop]], dim=1)
        first = max(0, k.shape[1] - q.shape[0] - window + 1)
        key = torch.arange(first, k.shape[1], device=q.device)
        query = torch.arange(k.shape[1] - q.shape[0], k.shape[1], device=q.device).unsqueeze(1)
        mask = (key <= query) & (key > query - window)
        return _beside(
            [
                self._backend.attend(
                    q[:, heads], k[kv, first:], v[kv, first:], scale=self._scale, mask=mask
                )
                for heads, kv in self._own_heads()
            ]
        )

    def _own_heads(self) -> Iterator[tuple[slice, slice]]:
        """The query heads that this rank owns and their KV heads, as few runs as fit together."""
        run, per_group = self._own_run, self._place.group_size
        if run.start % per_group == 0 and run.stop % per_group == 0 and run:
            yield slice(run.start, run.stop), slice(run.start // per_group, run.stop // per_group)
            return
        for head in range(run.start // per_group, -(-run.stop // per_group)):
            first, last = head * per_group, (head + 1) * per_group
            heads = slice(max(run.start, first), min(run.stop, last))
            if heads.start < heads.stop:
                yield heads, slice(head, head + 1)

    def _pack(self, part: Part) -> Tensor:
        """A row [T, widest run, D + 1] for each context rank: the part for the heads it owns."""
        both = torch.cat([part.out, part.lse.unsqueeze(-1)], dim=2)
        widest = max(len(run) for run in self._runs)
        rows = [
            functional.pad(both[:, run.start : run.stop], (0, 0, 0, widest - len(run)))
            for run in self._runs
        ]
        return torch.stack(rows)

    def _unpack(self, received: Tensor) -> list[Part]:
        own = received[:, :, : len(self._own_run)]
        return [Part(rows[..., :-1], rows[..., -1]) for rows in own]

    def _gather_heads(self, own: Tensor) -> Steps[Tensor]:
        """Outputs [T, all heads, D] on every rank, from each rank's own heads."""
        place = self._place
        widths = [
            len(
                place.mesh.query_heads_of(
                    rank, num_heads=place.num_heads, num_kv_heads=place.num_kv_heads
                )
            )
            for rank in range(place.flat.size)
        ]
        columns = [width * own.shape[2] for width in widths]
        joined = yield place.flat.start_gather_columns(own.flatten(1).contiguous(), columns)
        return joined.view(own.shape[0], place.num_heads, -1)


def _beside(parts: list[Part]) -> Part:
    """Parts of other query heads, side by side."""
    if len(parts) == 1:
        return parts[0]
    return Part(torch.cat([p.out for p in parts], dim=1), torch.cat([p.lse for p in parts], dim=1))

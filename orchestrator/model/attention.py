"""A question's attention: the meeting place of stored KV and parts (keys in, part out).

Owns, for one question on one document: the steady keys (sinks, last window, question, answer so
far), which parts are computed in which layer, and what is told to the recorder. Knows no decoder
and no files: the decoder calls it with rotated queries and keys and gets the attention output back.

Full-attention layers merge  steady | retrieved | estimated  (or steady | body when `exact`);
sliding-window layers attend to the last `window` keys and are neither selected nor recorded.

Over ranks: every context rank of a head group has the steady keys and the queries, and its shard of
the body. Ranks exchange the parts of their shards, the masses that a selection needs and the lists
of their best clusters, so that each goes on as if it held everything; where the number of context
ranks divides 8, the bits are those of one rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from collectives import Group
from orchestrator.model.context import DocumentContext
from orchestrator.model.lookup import Lookup
from orchestrator.model.recorder import Recorder
from orchestrator.recall import QuerySample
from orchestrator.steps import AttentionPlan
from sparse_attn.api import Backend
from sparse_attn.estimate import Missed, add_missed, bound_of, log_most, recall_of
from sparse_attn.folds import Kept
from sparse_attn.state import Part
from sparse_attn.step import UnitsRead


class Attention(Protocol):
    """A question's attention, called once per layer and forward, in layer order.

    is_static: whether a forward of one token decides nothing on the host, but in `prepare` and
    `advance`.
    """

    is_static: bool

    def prepare(self, num_tokens: int) -> None:
        """A forward of num_tokens comes next."""
        ...

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def advance(self, num_tokens: int) -> None:
        """A forward of num_tokens is over."""
        ...


class QuestionAttention:
    """Attention of one question: call it once per layer and forward, in layer order.

    windows: per layer, the sliding window in tokens or None; capacity_tokens: question plus answer.
    """

    is_static = False

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
        self._ranks = context.place.context
        # Samples of ranks are independent of each other; one rank draws as it always did.
        self._generator = torch.Generator().manual_seed(plan.seed + (self._ranks.rank << 32))
        self._num_strata = max(1, plan.num_strata // self._ranks.size)
        if plan.mode != "exact":
            context.require_clusters()
        self._lookup = Lookup(context, plan, backend, scale=scale)
        self._queries = QuerySample(period=plan.recall_period, seed=plan.seed)
        self._places = count_per_kind(windows)
        self._tails = [self._make_tail(layer, capacity_tokens) for layer in range(len(windows))]
        self._filled = [int(tail[2]) for tail in self._tails]

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output [T, all heads, D] in q's dtype, for q [T, H, D] and the new k, v [T, G,
        D] of this rank's heads.
        """
        past = self._append(layer_idx, k, v)
        window = self._windows[layer_idx]
        if window is not None:
            return self._join_heads(
                self._attend_sliding(layer_idx, q, past, window).out.to(q.dtype)
            )
        steady = self._attend_steady(layer_idx, q, past)
        full_layer = self._places[layer_idx]
        if self._plan.mode == "exact":
            out = self._attend_exact(full_layer, q, steady, past)
        else:
            out = self._attend_tiles(full_layer, q, steady, past)
        return self._join_heads(out.to(q.dtype))

    def prepare(self, num_tokens: int) -> None:
        """Nothing is to be done before a forward."""

    def advance(self, num_tokens: int) -> None:
        """Nothing is left to do after a forward."""

    def _attend_tiles(self, full_layer: int, q: Tensor, steady: Part, past: int) -> Tensor:
        """Question tokens read together, `tile_tokens` at a time."""
        num_tokens, tile = q.shape[0], self._plan.tile_tokens
        outs = []
        for start in range(0, num_tokens, tile):
            stop = min(start + tile, num_tokens)
            own = Part(steady.out[start:stop], steady.lse[start:stop])
            is_last = stop == num_tokens
            outs.append(
                self._attend_selected(full_layer, q[start:stop], own, past + stop, is_last=is_last)
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _make_tail(self, layer_idx: int, capacity_tokens: int) -> tuple[Tensor, Tensor, int]:
        """Buffers [G, kept + capacity, D] that begin with the document keys this layer always
        reads.
        """
        place, resident = self._places[layer_idx], self._context.resident
        if self._windows[layer_idx] is None:
            k, v = self._context.steady_keys(place)
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
        part, kept = self._attend_body(full_layer, q, keeps=True)
        whole = self._merge([steady, merge_over(self._ranks, part, self._backend)])
        assert kept is not None
        self._backend.spread_evidence(self._recorder.mass(full_layer), kept, whole.lse[-1])
        num_body = self._context.num_tokens - self._context.num_steady
        self._recorder.add_exact(q.shape[0], past + q.shape[0] + num_body)
        return whole.out

    def _attend_selected(
        self, full_layer: int, q: Tensor, steady: Part, num_steady: int, *, is_last: bool
    ) -> Tensor:
        """One tile: select, read, estimate the rest, and tell the recorder what was missed."""
        resident, backend = self._context.resident, self._backend
        found = self._lookup.find(full_layer, q, steady.lse)
        read = backend.attend_units(
            q,
            resident.k[full_layer],
            resident.v[full_layer],
            found.units,
            found.scores,
            found.taken,
            scale=self._scale,
            is_estimating=self._plan.mode != "window",
            keeps=is_last,
            closed=found.closed,
            scales=resident.scales[full_layer],
        )
        body, lse_body = _merge_reads(self._ranks, read, backend)
        lse_read = backend.merge_tree_lse(torch.stack([steady.lse, lse_body]))
        if read.kept is not None:
            backend.spread_evidence(self._recorder.mass(full_layer), read.kept, lse_read[-1])
        first_query = num_steady - q.shape[0] - self._context.num_steady
        num_sampled = self._sample_recall(full_layer, q, read, lse_read, first_query=first_query)
        self._recorder.add_read(
            full_layer,
            num_steady,
            read,
            lookup_bytes=found.lookup_bytes,
            num_sampled=num_sampled,
        )
        if self._plan.audit:
            self._audit(full_layer, q, read, steady, lse_read)
        return self._merge([steady, body]).out

    def _sample_recall(
        self, full_layer: int, q: Tensor, read: UnitsRead, lse_read: Tensor, *, first_query: int
    ) -> int:
        """Sample the recall of the tile's chosen queries; returns keys read for it here."""
        chosen = self._queries.chosen(full_layer, first_query, q.shape[0])
        if not chosen:
            return 0
        tail = read.tail
        if len(chosen) < q.shape[0]:
            rows = torch.tensor(chosen, device=q.device)
            q, lse_read, tail = q[rows], lse_read[rows], tail.of_queries(rows)
        missed = self._backend.sample_missed(
            q,
            self._context.resident.k[full_layer],
            tail,
            lse_read,
            scale=self._scale,
            num_strata=self._num_strata,
            generator=self._generator,
            scales=self._context.resident.scales[full_layer],
        )
        missed = _add_over(self._ranks, missed)
        self._recorder.add_recall(
            full_layer,
            [first_query + t for t in chosen],
            recall_of(missed.mean, missed.variance),
            bound_of(missed.log_most, lse_read),
        )
        return 2 * self._num_strata * q.shape[0] * q.shape[1]

    def _audit(
        self, full_layer: int, q: Tensor, read: UnitsRead, steady: Part, lse_read: Tensor
    ) -> None:
        part, _ = self._attend_body(full_layer, q, keeps=False)
        total = self._merge([steady, merge_over(self._ranks, part, self._backend)])
        nothing = torch.zeros_like(lse_read)
        most = log_most(q, read.tail, scale=self._scale)
        missed = _add_over(self._ranks, Missed(nothing, nothing, most))
        recall = torch.exp(lse_read - total.lse).clamp_(max=1.0)
        self._recorder.add_audit(full_layer, recall, bound_of(missed.log_most, lse_read))

    def _attend_body(self, full_layer: int, q: Tensor, *, keeps: bool) -> tuple[Part, Kept | None]:
        """This rank's keys of the body, read one and all."""
        resident = self._context.resident
        return self._backend.attend_runs(
            q,
            resident.k[full_layer],
            resident.v[full_layer],
            self._context.runs,
            scale=self._scale,
            keeps=keeps,
            scales=resident.scales[full_layer],
        )

    def _merge(self, parts: list[Part]) -> Part:
        outs, lses = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        return self._backend.merge_tree(outs, lses)

    def _join_heads(self, own: Tensor) -> Tensor:
        """Outputs [T, all heads, D] from those of each head group [T, H, D]."""
        heads = self._context.place.heads
        if heads.size == 1:
            return own
        gathered = heads.all_gather(own.contiguous())
        return gathered.transpose(0, 1).reshape(own.shape[0], -1, own.shape[2])


def make_attention(
    context: DocumentContext,
    plan: AttentionPlan,
    backend: Backend,
    recorder: Recorder,
    *,
    scale: float,
    windows: tuple[int | None, ...],
    capacity_tokens: int,
) -> Attention:
    """A question's attention: by plans where the backend has them and one rank holds everything."""
    options: dict[str, Any] = {
        "scale": scale,
        "windows": windows,
        "capacity_tokens": capacity_tokens,
    }
    if backend.makes_plans and context.place.is_alone:
        from orchestrator.model.device_attention import DeviceAttention
        from orchestrator.model.device_question import DeviceQuestion
        from sparse_attn.kernels.backend import TritonBackend

        assert isinstance(backend, TritonBackend)
        return DeviceAttention(DeviceQuestion(context, plan, backend, recorder, **options))
    return QuestionAttention(context, plan, backend, recorder, **options)


def merge_over(ranks: Group, part: Part, backend: Backend) -> Part:
    """The part over the keys of all ranks, from each rank's own, on every rank."""
    if ranks.size == 1:
        return part
    message = torch.cat([part.out, part.lse.unsqueeze(-1)], dim=2)
    gathered = ranks.all_gather(message)
    return backend.merge_tree(gathered[..., :-1].contiguous(), gathered[..., -1].contiguous())


def _merge_reads(ranks: Group, read: UnitsRead, backend: Backend) -> tuple[Part, Tensor]:
    """`merge_over`, and the mass of what was read alone, [T, H]."""
    if ranks.size == 1:
        return read.part, read.lse_read
    masses = torch.stack([read.part.lse, read.lse_read], dim=-1)
    gathered = ranks.all_gather(torch.cat([read.part.out, masses], dim=2))
    out, lse, lse_read = gathered[..., :-2], gathered[..., -2], gathered[..., -1]
    part = backend.merge_tree(out.contiguous(), lse.contiguous())
    return part, backend.merge_tree_lse(lse_read.contiguous())


def _add_over(ranks: Group, missed: Missed) -> Missed:
    """What all ranks missed together."""
    if ranks.size == 1:
        return missed
    return add_missed([Missed(*rows) for rows in ranks.all_gather(torch.stack(list(missed)))])


def count_per_kind(windows: tuple[int | None, ...]) -> list[int]:
    """For each layer, its index among the layers of its own kind (full or sliding)."""
    counts = {True: 0, False: 0}
    places = []
    for window in windows:
        places.append(counts[window is None])
        counts[window is None] += 1
    return places

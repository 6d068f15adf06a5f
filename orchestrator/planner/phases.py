"""Seconds of whole phases: a chunk of prefill, an ingest, opening, a first token, a later token.

Owns how the pieces of `cost.py` follow each other, the overlap of two half chunks included
(docs/cost_model.md, sections 5 to 7). Refuses to choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from orchestrator.planner.cost import TILE, Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of one layer of some tokens: what the rank computes, and what it waits for."""

    compute_s: float
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPace:
    """A number of tokens in one layer, wherever in the document they stand.

    base: without attention; sliding: of a whole sliding-window layer; exchange_s: of the parts of
    sealed segments; ends_s: before the first layer and in the last, which stops at keys and values.
    """

    base: Pace
    sliding: Pace
    exchange_s: float
    ends_s: float


Paces = dict[tuple[int, int], LayerPace]
"""By tokens, and tokens of the chunk that they are of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestTime:
    """Seconds of an ingest, by what they are spent on."""

    start_s: float
    prefill_s: float
    cluster_s: float
    write_s: float

    @property
    def total_s(self) -> float:
        """All of it: nothing of it overlaps."""
        return self.start_s + self.prefill_s + self.cluster_s + self.write_s


def ingest_time(cost: Cost) -> IngestTime:
    """Read the document: every chunk of every segment, and what sealing each segment takes."""
    prefill_s = cluster_s = write_s = 0.0
    paces: Paces = {}
    for segment_idx in range(cost.layout.num_segments):
        sealed = cost.slots.sealed[segment_idx]
        for T, open_tokens in chunks_of(cost, segment_idx):
            prefill_s += chunk_s(cost, T, open_tokens, sealed, paces)
        cluster_s += cost.cluster_s(segment_idx) + cost.reorder_s(segment_idx)
        write_s += cost.seal_s(segment_idx)
    return IngestTime(
        start_s=cost.topology.start_s, prefill_s=prefill_s, cluster_s=cluster_s, write_s=write_s
    )


def chunks_of(cost: Cost, segment_idx: int) -> Iterator[tuple[int, int]]:
    """Tokens of each chunk of a segment, and of the segment before it."""
    start, end = cost.layout.segment_span(segment_idx)
    step = cost.choice.chunk_tokens
    for first in range(0, end - start, step):
        yield min(step, end - start - first), first


def chunk_s(cost: Cost, T: int, open_tokens: int, sealed_slots: int, paces: Paces) -> float:
    """One chunk through every layer; the last layer gives keys and values alone.

    paces: of what was met before; filled here.
    """
    cfg, split = cost.workload.cfg, cost.choice.split_tokens
    pieces = [(T, open_tokens)]
    if split is not None and 0 < split < T:
        pieces = [(split, open_tokens), (T - split, open_tokens + split)]
    for tokens, _ in pieces:
        if (tokens, T) not in paces:
            paces[tokens, T] = layer_pace(cost, tokens, T)
    full = [_full_pace(cost, paces[tokens, T], tokens, at, sealed_slots) for tokens, at in pieces]
    sliding = [paces[tokens, T].sliding for tokens, _ in pieces]
    num_full, num_sliding = len(cfg.full_layers), len(cfg.sliding_layers)
    is_last_full = cfg.windows[-1] is None
    attended_s = (num_full - is_last_full) * overlap_s(cost, full)
    attended_s += (num_sliding - (not is_last_full)) * overlap_s(cost, sliding)
    return attended_s + sum(paces[tokens, T].ends_s for tokens, _ in pieces)


def layer_pace(cost: Cost, T: int, chunk_tokens: int) -> LayerPace:
    """T tokens of a chunk: all of it, or one half."""
    products_s = cost.products_s(cost.matrices.layer, T)
    if chunk_tokens > T:
        products_s *= wave_stretch(cost, chunk_tokens, [T, chunk_tokens - T])
    base_s = products_s + cost.elementwise_s(T) + cost.rates.exact_layer_s
    gathers_s = cost.gathers_s(T)
    return LayerPace(
        base=Pace(compute_s=base_s, wait_s=gathers_s),
        sliding=Pace(compute_s=base_s + cost.sliding_attention_s(T), wait_s=gathers_s),
        exchange_s=cost.exchange_s(T),
        ends_s=cost.embedding_s(T) + cost.products_s(cost.matrices.qkv, T),
    )


def _full_pace(cost: Cost, pace: LayerPace, T: int, open_tokens: int, sealed_slots: int) -> Pace:
    attention_s = cost.prefill_attention_s(T, open_tokens, sealed_slots)
    return Pace(
        compute_s=pace.base.compute_s + attention_s,
        wait_s=pace.base.wait_s + (pace.exchange_s if sealed_slots else 0.0),
    )


def overlap_s(cost: Cost, paces: list[Pace]) -> float:
    """One layer of a whole chunk, or of two halves of which each computes while the other waits."""
    total_s = sum(pace.compute_s + pace.wait_s for pace in paces)
    if len(paces) == 1:
        return total_s
    first, second = paces
    hidden = min(first.wait_s, second.compute_s) + min(second.wait_s, first.compute_s)
    return total_s - cost.topology.overlap_share * hidden


def wave_stretch(cost: Cost, T: int, halves: list[int]) -> float:
    """How much longer a layer's products take in halves: waves of tiles over the GPU's processors
    are whole, so two halves may need more of them than the chunk. 1 where there are no waves.

    w(M) = ceil(ceil(M / tile) ceil(N / tile) / processors), summed over the layer's products.
    """
    sms, shard = cost.topology.num_sms, cost.matrices
    if not sms or len(halves) == 1:
        return 1.0
    E, H = cost.workload.cfg.model_dim, cost.workload.cfg.num_heads * cost.workload.cfg.head_dim
    columns = (shard.qkv // E, shard.o // H, shard.gate_up // E, shard.o // H)

    def waves(tokens: int) -> int:
        return sum(ceil(ceil(tokens / TILE) * ceil(n / TILE) / sms) for n in columns)

    return sum(waves(tokens) for tokens in halves) / waves(T)


def open_s(cost: Cost) -> float:
    """Bring the document from disk, and its tables where the question selects; ranks share the
    disk's rate.
    """
    num_bytes = cost.layout.kv_bytes
    if cost.choice.reading.mode == "centroid":
        columns = sum(cost.slots.columns) + sum(cost.slots.groups)
        num_bytes += len(cost.workload.cfg.full_layers) * columns * cost.column_bytes
    return num_bytes / cost.topology.disk.read_bytes_per_s * cost.contention.stream


def first_token_s(cost: Cost) -> float:
    """From the question to the first token, with the document open."""
    return forward_s(cost, cost.workload.question_tokens)


def token_s(cost: Cost) -> float:
    """One later token."""
    return forward_s(cost, 1)


def forward_s(cost: Cost, T: int) -> float:
    """T question tokens through every layer, and the logits after the last."""
    cfg = cost.workload.cfg
    is_exact = cost.choice.reading.mode == "exact"
    full_s = cost.exact_attention_s(T) if is_exact else cost.selected_attention_s(T)
    full_s += cost.question_exchange_s(T)
    layer_s = cost.question_products_s(cost.matrices.layer, T) + cost.elementwise_s(T)
    layer_s += cost.gathers_s(T, is_question=True)
    layer_s += cost.host_s(T)
    attention_s = len(cfg.full_layers) * full_s
    attention_s += len(cfg.sliding_layers) * cost.sliding_attention_s(T)
    ends_s = cost.embedding_s(T) + cost.head_s() + cost.logits_s()
    return cfg.num_layers * layer_s + attention_s + ends_s

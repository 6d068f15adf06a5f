"""Seconds of what a rank does, from what there is to do and what the machine can do.

Owns the formulas, one small function each; docs/cost_model.md derives them and works them through.
Refuses to know memory and to choose. `Cost` is a workload on a machine in one way of running it;
each of its methods counts the fullest rank, for which all others wait at the next collective.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kv_store.layout import Layout
from orchestrator.planner.shards import (
    HeadShare,
    MatrixShare,
    SlotShare,
    head_share,
    matrix_share,
    slot_share,
    widest_shard,
)
from orchestrator.planner.topology import Contention, Operation, Rates, Topology
from orchestrator.planner.workload import Choice, Workload

_FLOAT, _HALF, _INT, _LONG = 4, 2, 4, 8
# Rows and columns of the tile of a matrix product on a GPU (cuBLAS's usual one on Hopper).
TILE = 128
# The two-level look-up opens groups that hold this many times the keys to be read
# (`sparse_attn/select/centroid.py`).
_OPEN_FACTOR = 4
# Copies of a segment between the open segment and the resident document: its full layers, its own
# heads, slot order, one head's files, residence (`prefill.py`).
_REORDER_COPIES = 5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One way of running one workload on one machine; methods return seconds unless they say
    otherwise. T: tokens of a forward.
    """

    workload: Workload
    choice: Choice
    topology: Topology

    @cached_property
    def rates(self) -> Rates:
        """Rates of one rank alone."""
        return self.topology.rates_of(self.choice.threads)

    @cached_property
    def contention(self) -> Contention:
        """How much longer everything takes while all ranks compute."""
        return self.topology.contention_of(self.choice.mesh.num_ranks)

    @cached_property
    def layout(self) -> Layout:
        """Of the document."""
        return self.workload.layout(self.topology.dtype)

    @cached_property
    def heads(self) -> HeadShare:
        """Heads of a rank."""
        return head_share(self.workload.cfg, self.choice.mesh)

    @cached_property
    def matrices(self) -> MatrixShare:
        """Matrix elements of the widest rank."""
        return matrix_share(self.workload.cfg, self.choice.mesh, 0)

    @cached_property
    def slots(self) -> SlotShare:
        """Slots of every rank."""
        return slot_share(self.layout, self.choice.mesh, self.workload.clusters)

    # ---- matrix products ----

    def products_s(self, elements: float, T: int) -> float:
        """T document tokens times matrices of that many elements: 2 T flops an element."""
        if T == 1:
            return self.streamed_s(elements)
        flops = 2.0 * T * elements
        return flops / self.rates.matrix_flops_per_s.at(T) * self.contention.compute

    def question_products_s(self, elements: float, T: int) -> float:
        """The same for question tokens, whose products are cut so that bits hold on every mesh."""
        if T == 1:
            return self.streamed_s(elements)
        flops = 2.0 * T * elements
        return flops / self.rates.question_flops_per_s.at(T) * self.contention.compute

    def streamed_s(self, elements: float) -> float:
        """One token: the time to read the weights."""
        num_bytes = elements * self.topology.item_bytes
        return num_bytes / self.rates.weight_bytes_per_s * self.contention.stream

    def head_s(self) -> float:
        """LM head of the last token."""
        return self.streamed_s(self.matrices.embedding)

    # ---- attention ----

    def prefill_attention_s(self, T: int, open_tokens: int, sealed_slots: int) -> float:
        """One full-attention layer of a chunk: itself causally and the open segment before it, for
        own query heads; what the rank holds of sealed segments, for every head of its group.
        """
        D, rates = self.workload.cfg.head_dim, self.rates
        causal = 2.0 * T * T * D * self.heads.own_heads / rates.causal_flops_per_s.at(T)
        pairs = T * open_tokens * self.heads.own_heads + T * sealed_slots * self._per_group
        return (causal + 4.0 * D * pairs / rates.attention_flops_per_s.at(T)) * (
            self.contention.compute
        )

    def sliding_attention_s(self, T: int) -> float:
        """One sliding-window layer of T tokens, own query heads, masked scores in full."""
        cfg = self.workload.cfg
        keys = T + min(self.layout.sliding_window, self.workload.num_tokens)
        flops = 4.0 * T * keys * cfg.head_dim * self.heads.own_heads
        return flops / self.rates.attention_flops_per_s.at(T) * self.contention.compute

    def exact_attention_s(self, T: int) -> float:
        """One full-attention layer of T question tokens over everything the rank holds.

        Bound by reading KV for one token, by arithmetic for many; the last of several tokens reads
        the keys once more, for the evidence.
        """
        D, held = self.workload.cfg.head_dim, max(self.slots.held)
        kv_bytes = 2.0 * held * D * self.layout.slot_bytes(self.topology.item_bytes)
        read_s = kv_bytes / self.rates.kv_bytes_per_s * self.contention.stream
        if T == 1:
            return read_s
        flops = 4.0 * T * held * self._per_group * D
        computed_s = flops / self.rates.attention_flops_per_s.at(T)
        computed_s += self.runs * self.rates.run_s
        return max(computed_s * self.contention.compute, read_s) + 0.5 * read_s

    @property
    def runs(self) -> float:
        """Segments of KV heads that the fullest rank holds."""
        return max(self.slots.held) / min(self.layout.segment_tokens, self.layout.num_tokens)

    def selected_attention_s(self, T: int) -> float:
        """One full-attention layer of T question tokens that look up and read what they chose.

        Tables once a tile and chosen KV once a query, by bytes; or, for several queries, 6 D flops
        for every unit scored and 4 D for every key read, whichever is longer.
        """
        D, reading = self.workload.cfg.head_dim, self.choice.reading
        units = self.lookup_units()
        share = max(self.slots.held) / max(1, self.layout.num_tokens * self.heads.group_kv_heads)
        keys = min(reading.keys, self.layout.num_tokens) * share * self.heads.group_kv_heads
        table_bytes = 3.0 * D * _HALF * units
        kv_bytes = 2.0 * D * self.layout.slot_bytes(self.topology.item_bytes) * keys * T
        read_s = (table_bytes + kv_bytes) / self.rates.lookup_bytes_per_s
        if T == 1:
            return read_s * self.contention.stream
        flops = T * self._per_group * D * (6.0 * units + 4.0 * keys)
        computed_s = flops / self.rates.lookup_flops_per_s.at(D)
        return max(computed_s * self.contention.compute, read_s * self.contention.stream)

    def lookup_units(self) -> float:
        """Clusters and groups that one query scores on the fullest rank, over its KV heads."""
        columns, groups = max(self.slots.columns), max(self.slots.groups)
        if self.choice.reading.levels == 1:
            return columns
        share = columns / max(1, sum(self.slots.columns)) * self.workload.cfg.num_kv_heads
        opened = _OPEN_FACTOR * self.choice.reading.keys / self.workload.clusters.keys_per_cluster
        return groups + min(columns, opened * share)

    @property
    def _per_group(self) -> int:
        """Query heads of a KV head."""
        return self.workload.cfg.num_heads // self.workload.cfg.num_kv_heads

    # ---- the rest of a layer ----

    def elementwise_s(self, T: int) -> float:
        """Norms, residuals, rotation, copies of keys, parts and their merge, activation, and the
        tensors made of gathered pieces: what they take in, once each, of one layer.
        """
        cfg, heads = self.workload.cfg, self.heads
        E, D = cfg.model_dim, cfg.head_dim
        rotated = 1.5 * (heads.group_heads + heads.group_kv_heads) * D
        stored = 4 * heads.group_kv_heads * D
        parts = (5 * heads.own_heads + 2 * heads.group_heads) * D
        inner = 3 * widest_shard(cfg, self.choice.mesh).mlp.width
        gathered = 0 if self.is_alone else 2 * (cfg.num_heads * D + 2 * E + cfg.mlp_dim)
        floats = 6 * E + rotated + stored + parts + inner + gathered
        num_bytes = float(T * floats * self.topology.item_bytes)
        return num_bytes / self.rates.elementwise_bytes_per_s * self.contention.stream

    def host_s(self, T: int) -> float:
        """What the host takes for a question's layer, whatever there is to compute."""
        rates, is_exact = self.rates, self.choice.reading.mode == "exact"
        if T == 1:
            return rates.exact_layer_s if is_exact else rates.centroid_layer_s
        return rates.exact_tile_s if is_exact else rates.centroid_tile_s

    # ---- communication ----

    @property
    def is_alone(self) -> bool:
        """Whether there is one rank, which communicates with nobody."""
        return self.choice.mesh.num_ranks == 1

    def collective_s(self, operation: Operation, argument_bytes: float, ranks: int) -> float:
        """One call; argument_bytes: of what each rank brings (all_to_all: of one row)."""
        if ranks == 1:
            return 0.0
        received = {
            "all_gather": (ranks - 1) * argument_bytes,
            "all_reduce": 2.0 * (ranks - 1) / ranks * argument_bytes,
            "all_to_all": (ranks - 1) * argument_bytes,
        }[operation]
        return self.topology.link_of(operation, ranks).seconds(received)

    def gathers_s(self, T: int, *, is_question: bool = False) -> float:
        """The four all-gathers of a layer: heads, attention output, MLP activation, MLP output.

        Heads come from the owner of each in prefill; in a question every context rank has those of
        its head group, and one rank of each group is asked.
        """
        cfg, item, mesh = self.workload.cfg, self.topology.item_bytes, self.choice.mesh
        shard, heads = widest_shard(cfg, mesh), self.heads
        own, ranks = (heads.own_heads, mesh.num_ranks)
        if is_question:
            own, ranks = (heads.group_heads, mesh.heads)
        joined_s = self.collective_s("all_gather", T * own * cfg.head_dim * item, ranks)
        widths = (shard.model.width, shard.mlp.width, shard.model.width)
        return joined_s + sum(
            self.collective_s("all_gather", T * width * item, mesh.num_ranks) for width in widths
        )

    def exchange_s(self, T: int) -> float:
        """In prefill, attention parts of sealed segments (out and lse in float32) go to the owners
        of the query heads, on the context axis.
        """
        row_bytes = T * self.heads.own_heads * (self.workload.cfg.head_dim + 1) * _FLOAT
        return self.collective_s("all_to_all", row_bytes, self.choice.mesh.context)

    def question_exchange_s(self, T: int) -> float:
        """In a question, parts go to every context rank, and before them, for each level of a
        look-up, masses and the lists of the best units; the longest list's length where they are
        others for every token, below what was opened.
        """
        cfg, context, reading = self.workload.cfg, self.choice.mesh.context, self.choice.reading
        parts_bytes = T * self.heads.group_heads * (cfg.head_dim + 2) * _FLOAT
        parts_s = self.collective_s("all_gather", parts_bytes, context)
        if reading.mode == "exact" or context == 1:
            return parts_s
        per_head = max(self.slots.columns) / self.heads.group_kv_heads
        listed = min(reading.keys, per_head) * self.heads.group_kv_heads
        level_s = self.collective_s("all_gather", T * self.heads.group_heads * _FLOAT, context)
        level_s += self.collective_s("all_gather", 3 * T * listed * _FLOAT, context)
        units = T * per_head * self.heads.group_kv_heads
        level_s += units / self.rates.list_units_per_s.at(units) * self.contention.compute
        agreed_s = (reading.levels - 1) * self.collective_s("all_reduce", 2 * _FLOAT, context)
        return parts_s + reading.levels * level_s + agreed_s

    def embedding_s(self, T: int) -> float:
        """The sum of embedding rows over ranks."""
        num_bytes = T * self.workload.cfg.model_dim * self.topology.item_bytes
        return self.collective_s("all_reduce", num_bytes, self.choice.mesh.num_ranks)

    def logits_s(self) -> float:
        """The gather of the last token's logits."""
        width = widest_shard(self.workload.cfg, self.choice.mesh).vocab.width
        return self.collective_s("all_gather", width * _FLOAT, self.choice.mesh.num_ranks)

    # ---- a segment's clusters and files ----

    def cluster_s(self, segment_idx: int) -> float:
        """K-means over a segment's keys, then over its clusters: 2 n C D flops an assignment; every
        context rank takes as many problems, and all get the tables of all.
        """
        rule, D = self.workload.clusters, self.workload.cfg.head_dim
        first, last = self.layout.clustered_span(segment_idx)
        n = last - first
        if n == 0:
            return 0.0
        clusters, columns, groups = rule.clusters_of(n), rule.columns_of(n), rule.groups_of(n)
        per_problem = (rule.iterations + 1) * 2.0 * D * (n * clusters + columns * groups)
        problems = self.heads.own_problems
        rate = self.rates.cluster_flops_per_s.at(n)
        computed_s = problems * per_problem / rate * self.contention.compute
        tables = problems * ((columns + groups) * self.column_bytes + n * _LONG)
        return computed_s + self.collective_s("all_gather", tables, self.choice.mesh.context)

    def segment_file_bytes(self, segment_idx: int) -> int:
        """Bytes of a segment's files, of all KV heads."""
        start, end = self.layout.segment_span(segment_idx)
        first, last = self.layout.clustered_span(segment_idx)
        rule, cfg = self.workload.clusters, self.workload.cfg
        columns = rule.columns_of(last - first) + rule.groups_of(last - first)
        slots_bytes = (end - start) * self.layout.kv_bytes_per_token
        return slots_bytes + len(cfg.full_layers) * cfg.num_kv_heads * columns * self.column_bytes

    @property
    def column_bytes(self) -> int:
        """Bytes of one column of the cluster tables of one layer."""
        return 3 * self.workload.cfg.head_dim * _HALF + 3 * _INT

    def seal_s(self, segment_idx: int) -> float:
        """Write a segment's files. The store is one directory: ranks share the disk's rate."""
        return self.segment_file_bytes(segment_idx) / self.topology.disk.write_bytes_per_s

    def reorder_s(self, segment_idx: int) -> float:
        """Bring a segment's keys and values into slot order, cut by head, and to where later chunks
        read them: copies into memory that is new each time.
        """
        start, end = self.layout.segment_span(segment_idx)
        per_head = len(self.workload.cfg.full_layers) * (end - start) * 2
        copied = self.slots.owned_heads[segment_idx] * per_head * self.workload.cfg.head_dim
        num_bytes = _REORDER_COPIES * copied * self.topology.item_bytes
        return num_bytes / self.rates.fresh_bytes_per_s * self.contention.stream

"""Bytes that one rank needs: what stays, and the most that is alive beside it at any moment.

Owns the list of buffers of each phase and the rule that turns it into a peak, one for GPUs
(allocated bytes) and one for CPUs (what the process keeps). docs/cost_model.md, section 3, derives
both. Refuses to know seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from collectives.mesh import Mesh
from orchestrator.planner.ingest_buffers import Phase, chunk_phase, cluster_phases
from orchestrator.planner.plan_buffers import PlanSizes, question_plan_bytes
from orchestrator.planner.shards import head_share, matrix_share, slot_share, widest_shard
from orchestrator.planner.topology import Topology
from orchestrator.planner.workload import Choice, Workload

_FLOAT, _INT, _LONG, _HALF = 4, 4, 8, 2
# glibc gives blocks up to this size from its heap, and the heap keeps what is freed inside it.
HEAP_BLOCK_BYTES = 32 << 20
# Vocabulary and merges of a tokenizer as Rust and Python hold them: measured on a vocabulary of
# 49,152 (docs/cost_model.md, section 3).
TOKENIZER_BYTES_PER_ENTRY = 480
# A quantised file is undone in pieces of this size (`model/gguf_file.py`).
_PIECE_BYTES = 1 << 26
# Pieces of a rank's outbox for tensors of one size, where it waits as it goes.
_PIECES = 2
# Tile in which question tokens look up together (`AttentionPlan.tile_tokens`).
_TILE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes of one rank. open_segment: of an ingest; tables: of the clusters; temporary: the peak
    of what comes and goes; process: libraries and tokenizer, and on a GPU what no tensor holds.
    """

    weights: int
    kv: int
    tables: int
    open_segment: int
    temporary: int
    process: int

    @property
    def tensors(self) -> int:
        """What an allocator has given out at its peak."""
        return self.weights + self.kv + self.tables + self.open_segment + self.temporary

    @property
    def total(self) -> int:
        """Everything."""
        return self.tensors + self.process

    def to_json(self) -> dict[str, int]:
        """Plain values, with the total."""
        parts = ("weights", "kv", "tables", "open_segment", "temporary", "process", "total")
        return {f"{name}_bytes": getattr(self, name) for name in parts}


def weight_bytes(workload: Workload, mesh: Mesh, rank: int, item_bytes: int) -> int:
    """Bytes of a rank's weights: matrices in `item_bytes`, norms in float32."""
    cfg = workload.cfg
    share = matrix_share(cfg, mesh, rank)
    embeddings = (1 if cfg.tie_embeddings else 2) * share.embedding
    return item_bytes * (cfg.num_layers * share.layer + embeddings) + _FLOAT * share.norms


def kv_bytes(workload: Workload, mesh: Mesh, rank: int, dtype: str, item_bytes: int) -> int:
    """Bytes of the k, v and positions that a rank holds, and of its sliding-window keys, which
    every rank of a head group keeps.
    """
    cfg, layout = workload.cfg, workload.layout(dtype)
    slots = slot_share(layout, mesh, workload.clusters).held[rank]
    per_slot = 2 * cfg.head_dim * layout.slot_bytes(item_bytes) + _INT
    scales = 2 * _FLOAT * head_share(cfg, mesh).group_kv_heads if layout.is_fp8 else 0
    sliding_tokens = min(workload.num_tokens, layout.sliding_window)
    sliding = 2 * cfg.head_dim * item_bytes * sliding_tokens * head_share(cfg, mesh).group_kv_heads
    per_layer = slots * per_slot + scales
    return layout.num_full_layers * per_layer + layout.num_sliding_layers * sliding


def table_bytes(workload: Workload, mesh: Mesh, rank: int, dtype: str, *, is_indexed: bool) -> int:
    """Bytes of a rank's cluster tables as files hold them; is_indexed: with what a look-up adds."""
    share = slot_share(workload.layout(dtype), mesh, workload.clusters)
    per_row = 3 * workload.cfg.head_dim * _HALF + 3 * _INT
    added = 3 * _FLOAT + 3 * _LONG if is_indexed else 0
    per_layer = share.columns[rank] * (per_row + added)
    per_layer += share.groups[rank] * (per_row + _INT + added)
    return len(workload.cfg.full_layers) * per_layer


def open_segment_bytes(workload: Workload, mesh: Mesh, item_bytes: int) -> int:
    """Bytes of the segment that is being filled: every layer, the head group's KV heads."""
    cfg = workload.cfg
    heads = head_share(cfg, mesh).group_kv_heads
    return cfg.num_layers * heads * workload.segment_tokens * 2 * cfg.head_dim * item_bytes


def staging_bytes(workload: Workload, choice: Choice, topology: Topology) -> int:
    """What the ranks of one machine keep of memory that they share, on CPUs: in every rank's outbox
    two pieces of the largest tensors, the MLP's activation, heads' outputs, and cluster tables.
    """
    cfg, mesh, rule = workload.cfg, choice.mesh, workload.clusters
    if not topology.is_cpu or mesh.num_ranks == 1:
        return 0
    columns = cfg.mlp_dim + cfg.num_heads * cfg.head_dim
    staged = choice.chunk_tokens * columns * topology.item_bytes
    if mesh.context > 1:
        units = rule.columns_of(min(workload.segment_tokens, workload.num_tokens))
        own = head_share(cfg, mesh).own_problems
        staged += mesh.context * own * units * cfg.head_dim * _HALF
    return _PIECES * staged


def ingest_memory(workload: Workload, choice: Choice, topology: Topology) -> MemoryUse:
    """The fullest rank's memory while it ingests."""
    staging = staging_bytes(workload, choice, topology)
    phases = [chunk_phase(workload, choice, topology), *cluster_phases(workload, choice, topology)]
    return max(
        (
            _use(
                workload,
                choice.mesh,
                rank,
                topology,
                phases=phases,
                staging=staging,
                tables=table_bytes(workload, choice.mesh, rank, topology.dtype, is_indexed=False),
                open_segment=open_segment_bytes(workload, choice.mesh, topology.item_bytes),
            )
            for rank in range(choice.mesh.num_ranks)
        ),
        key=lambda use: use.total,
    )


def question_memory(workload: Workload, choice: Choice, topology: Topology) -> MemoryUse:
    """The fullest rank's memory while it answers."""
    is_selecting = choice.reading.mode == "centroid"
    phases = [question_phase(workload, choice, topology)]
    return max(
        (
            _use(
                workload,
                choice.mesh,
                rank,
                topology,
                phases=phases,
                staging=0,
                tables=table_bytes(workload, choice.mesh, rank, topology.dtype, is_indexed=True)
                if is_selecting
                else 0,
                open_segment=0,
            )
            for rank in range(choice.mesh.num_ranks)
        ),
        key=lambda use: use.total,
    )


def question_phase(workload: Workload, choice: Choice, topology: Topology) -> Phase:
    """Buffers of a question: its own keys in every layer, evidence, logits, and a tile's look-up
    or, for one rank on a GPU, plans of kernels.
    """
    cfg, item = workload.cfg, topology.item_bytes
    heads, shard = head_share(cfg, choice.mesh), widest_shard(cfg, choice.mesh)
    slots = slot_share(workload.layout(topology.dtype), choice.mesh, workload.clusters)
    held, rule = max(slots.held), workload.clusters
    T = workload.question_tokens
    steady = workload.sinks + workload.window + T + workload.answer_tokens
    tails = cfg.num_layers * heads.group_kv_heads * steady * 2 * cfg.head_dim * item
    evidence = len(cfg.full_layers) * held * _FLOAT
    buffers = [tails, evidence, shard.vocab.total * _FLOAT, 3 * T * cfg.mlp_dim * item]
    if not topology.is_cpu and choice.mesh.num_ranks == 1:
        sizes = _plan_sizes(workload, topology.dtype, steady, item)
        return (*buffers, question_plan_bytes(sizes, choice.reading, T))
    if choice.reading.mode == "centroid":
        per_head = max(slots.columns) // heads.group_kv_heads
        if choice.reading.levels == 2:
            per_head = max(slots.groups) // heads.group_kv_heads
            opened = 4 * choice.reading.keys // rule.keys_per_cluster
            per_head += min(opened, max(slots.columns) // heads.group_kv_heads)
        # Scores with and without spread, their masked copy, and which units are taken.
        scores = min(T, _TILE_TOKENS) * heads.group_heads * per_head
        buffers += [scores * _FLOAT, scores * _FLOAT, scores * _FLOAT, scores]
    return tuple(buffers)


def _plan_sizes(workload: Workload, dtype: str, steady: int, item_bytes: int) -> PlanSizes:
    """What the plans of one rank go by."""
    cfg, layout, rule = workload.cfg, workload.layout(dtype), workload.clusters
    share = slot_share(layout, Mesh(heads=1, context=1), rule)
    return PlanSizes(
        num_layers=len(cfg.full_layers),
        num_kv_heads=cfg.num_kv_heads,
        per_group=cfg.num_heads // cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        item_bytes=item_bytes,
        keys=share.held[0] // cfg.num_kv_heads,
        segments=layout.num_segments,
        steady=steady,
        columns=share.columns[0] // cfg.num_kv_heads,
        groups=share.groups[0] // cfg.num_kv_heads,
    )


def loading_bytes(workload: Workload, mesh: Mesh, topology: Topology) -> int:
    """What is alive beside the weights while they are read: the mapped file, and of the largest
    matrix, which is the embedding, one piece of the rank's rows in float32.
    """
    if not topology.is_cpu or not workload.weights_file_bytes:
        return 0
    largest = matrix_share(workload.cfg, mesh, 0).embedding * _FLOAT
    return workload.weights_file_bytes + min(_PIECE_BYTES, largest)


def peak_bytes(phases: Iterable[Phase], *, is_cpu: bool) -> int:
    """The most that the phases' buffers take, one phase after another.

    On a GPU that is the largest sum. A CPU's process also keeps every small block that any phase
    ever had (the heap's high water), beside the large ones, which come from the kernel and go back.
    """
    phases = list(phases)
    if not is_cpu:
        return max(sum(phase) for phase in phases)
    heap = max(sum(b for b in phase if b < HEAP_BLOCK_BYTES) for phase in phases)
    return heap + max(sum(b for b in phase if b >= HEAP_BLOCK_BYTES) for phase in phases)


def limits(topology: Topology, num_ranks: int) -> int:
    """Bytes that one rank may use: a GPU, or its share of the machine."""
    return topology.memory_bytes // (num_ranks if topology.is_cpu else 1)


def _use(
    workload: Workload,
    mesh: Mesh,
    rank: int,
    topology: Topology,
    *,
    phases: list[Phase],
    staging: int,
    tables: int,
    open_segment: int,
) -> MemoryUse:
    kv = kv_bytes(workload, mesh, rank, topology.dtype, topology.item_bytes)
    temporary = peak_bytes(phases, is_cpu=topology.is_cpu) + staging
    # Weights are read before anything else is there, and before libraries have computed: what that
    # needs beside them is free again.
    later = kv + tables + open_segment + temporary + topology.process_bytes
    return MemoryUse(
        weights=weight_bytes(workload, mesh, rank, topology.item_bytes),
        kv=kv,
        tables=tables,
        open_segment=open_segment,
        temporary=temporary + max(0, loading_bytes(workload, mesh, topology) - later),
        process=topology.process_bytes + TOKENIZER_BYTES_PER_ENTRY * workload.cfg.vocab_size,
    )

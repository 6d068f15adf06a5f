"""How much of the model and of the document each rank of a mesh holds and computes.

Owns counting: matrix elements, slots, heads. Refuses to know bytes and seconds. Every rank waits
for the fullest one at each collective, so that is whose share a prediction counts; the sums over
all ranks are the whole, once, but for what is replicated by design (docs/cost_model.md, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from collectives.mesh import Mesh
from kv_store.layout import Layout
from orchestrator.model.config import ModelConfig
from orchestrator.model.shard import ModelShard, cut_model
from orchestrator.planner.workload import ClusterRule


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixShare:
    """Elements of what one rank holds: qkv, o, gate and up, down and biases of a layer; one
    embedding (the LM head has as many); norms of the whole model, which are float32.
    """

    qkv: int
    o: int
    gate_up: int
    down: int
    biases: int
    embedding: int
    norms: int

    @property
    def layer(self) -> int:
        """Elements of one layer's matrices and biases."""
        return self.qkv + self.o + self.gate_up + self.down + self.biases


def matrix_share(cfg: ModelConfig, mesh: Mesh, rank: int) -> MatrixShare:
    """What one rank holds: rows of its head group, columns of everything else."""
    shard = cut_model(cfg, mesh, rank)
    E, D = cfg.model_dim, cfg.head_dim
    qkv_rows = (len(shard.heads) + 2 * len(shard.kv_heads)) * D
    biases = cfg.qkv_bias * qkv_rows + cfg.o_bias * shard.model.width
    biases += cfg.mlp_bias * (2 * shard.mlp.width + shard.model.width)
    per_layer = 2 + 2 * cfg.gemma_norms
    qk_norm = (len(shard.heads) + len(shard.kv_heads)) * D if cfg.qk_norm else 0
    return MatrixShare(
        qkv=qkv_rows * E,
        o=shard.model.width * cfg.num_heads * D,
        gate_up=2 * shard.mlp.width * E,
        down=shard.model.width * cfg.mlp_dim,
        biases=biases,
        embedding=shard.vocab.width * E,
        norms=cfg.num_layers * (per_layer * E + qk_norm) + E,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShare:
    """Heads of one head group, the most query heads whose output one of its ranks owns, and the
    most KV heads of layers that one clusters of a segment.
    """

    group_heads: int
    group_kv_heads: int
    own_heads: int
    own_problems: int


def head_share(cfg: ModelConfig, mesh: Mesh) -> HeadShare:
    """The same for every head group; raises MeshInvalid where the mesh does not fit the heads."""
    group_kv_heads = len(mesh.kv_heads_of(0, num_kv_heads=cfg.num_kv_heads))
    group_heads = group_kv_heads * (cfg.num_heads // cfg.num_kv_heads)
    return HeadShare(
        group_heads=group_heads,
        group_kv_heads=group_kv_heads,
        own_heads=-(-group_heads // mesh.context),
        own_problems=-(-group_kv_heads * len(cfg.full_layers) // mesh.context),
    )


@lru_cache(maxsize=256)
def widest_shard(cfg: ModelConfig, mesh: Mesh) -> ModelShard:
    """The shard of a rank with the most columns: those come first."""
    return cut_model(cfg, mesh, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotShare:
    """Slots (one token of one KV head) of a document over the ranks of a mesh.

    held[rank]: slots that a rank holds in the end; sealed[s]: the most that any rank holds of the
    segments before s; owned_heads[s]: the most KV heads of segment s that one rank writes;
    columns[rank], groups[rank]: of the rank's cluster tables.
    """

    held: tuple[int, ...]
    sealed: tuple[int, ...]
    owned_heads: tuple[int, ...]
    columns: tuple[int, ...]
    groups: tuple[int, ...]


@lru_cache(maxsize=256)
def slot_share(layout: Layout, mesh: Mesh, rule: ClusterRule) -> SlotShare:
    """Count every (segment, KV head) for its owner."""
    held, columns, groups = ([0] * mesh.num_ranks for _ in range(3))
    sealed, owned_heads = [], []
    for segment_idx in range(layout.num_segments):
        sealed.append(max(held))
        start, end = layout.segment_span(segment_idx)
        first, last = layout.clustered_span(segment_idx)
        owned = [0] * mesh.num_ranks
        for kv_head_idx in range(layout.num_kv_heads):
            rank = mesh.owner_of(
                segment_idx=segment_idx, kv_head_idx=kv_head_idx, num_kv_heads=layout.num_kv_heads
            )
            owned[rank] += 1
            held[rank] += end - start
            columns[rank] += rule.columns_of(last - first)
            groups[rank] += rule.groups_of(last - first)
        owned_heads.append(max(owned))
    return SlotShare(
        held=tuple(held),
        sealed=tuple(sealed),
        owned_heads=tuple(owned_heads),
        columns=tuple(columns),
        groups=tuple(groups),
    )

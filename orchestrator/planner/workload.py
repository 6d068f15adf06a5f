"""What is to be done, and the one way of doing it that a prediction is about.

Owns the plain data that planner functions share. Refuses to know machines and seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from collectives.mesh import Mesh
from kv_store.layout import Layout
from orchestrator.model.config import ModelConfig

KeyMode = Literal["exact", "centroid"]
_LEAST_PER_GROUP, _GROUPED_TOKENS = 8, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRule:
    """How segments are clustered; the same fields, defaults and rule for a document's length as
    `sparse_attn.select.centroid_build.CentroidParams`.
    """

    keys_per_cluster: int = 4
    iterations: int = 5
    max_cluster_ratio: int = 4
    clusters_per_group: int | None = None

    def for_document(self, num_tokens: int) -> ClusterRule:
        """With the size of groups that a document of that length gets."""
        if self.clusters_per_group is not None:
            return self
        size = _LEAST_PER_GROUP * math.sqrt(max(1.0, num_tokens / _GROUPED_TOKENS))
        return replace(self, clusters_per_group=round(size))

    def clusters_of(self, num_keys: int) -> int:
        """Clusters that k-means looks for among num_keys keys."""
        return max(1, num_keys // self.keys_per_cluster) if num_keys else 0

    def columns_of(self, num_keys: int) -> int:
        """Columns of the cluster tables: clusters, and room for the pieces of oversized ones."""
        clusters = self.clusters_of(num_keys)
        if not clusters:
            return 1
        return clusters + num_keys // (self.max_cluster_ratio * -(-num_keys // clusters))

    def groups_of(self, num_keys: int) -> int:
        """Groups of clusters."""
        return max(1, self.columns_of(num_keys) // (self.clusters_per_group or _LEAST_PER_GROUP))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One document, ingested once, and one question of it.

    num_tokens: of the document, frame included; sinks, window: its steady zone;
    weights_file_bytes: of the largest file that weights are read from, which the process maps while
    it reads; 0 where there is none; kv_dtype: of what is stored, None for the machine's type.
    """

    cfg: ModelConfig
    num_tokens: int
    segment_tokens: int = 8192
    sinks: int = 4
    window: int = 64
    question_tokens: int = 48
    answer_tokens: int = 128
    weights_file_bytes: int = 0
    clusters: ClusterRule = ClusterRule()
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        """Groups are of the size that this document gets."""
        object.__setattr__(self, "clusters", self.clusters.for_document(self.num_tokens))

    def layout(self, dtype: str) -> Layout:
        """The document's shapes where the model computes in `dtype`."""
        cfg = self.cfg
        return Layout(
            num_tokens=self.num_tokens,
            segment_tokens=self.segment_tokens,
            sinks=self.sinks,
            window=self.window,
            num_full_layers=len(cfg.full_layers),
            num_sliding_layers=len(cfg.sliding_layers),
            sliding_window=max((w for w in cfg.windows if w is not None), default=0),
            num_kv_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            kv_dtype=self.kv_dtype or dtype,
            dtype=dtype,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a question reads: everything (`exact`), or keys retrieved per KV head and query by a
    look-up of one or two levels (`centroid`).
    """

    mode: KeyMode
    keys: int = 0
    levels: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way of running a workload. split_tokens: of a chunk's first half, None for no split;
    threads: of each rank, 0 on GPUs.
    """

    mesh: Mesh
    threads: int
    chunk_tokens: int
    split_tokens: int | None
    reading: Reading

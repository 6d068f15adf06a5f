"""Which rows of a model's matrices one rank holds.

Owns the cut: query, key and value rows by the rank's head group, every other matrix by output
columns over all ranks (DESIGN section 5). No product is ever cut along K, so no sum crosses ranks.
Refuses to know files, tensors and groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from collectives.mesh import NUM_VIRTUAL_SHARDS, Mesh, split_evenly
from orchestrator.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Columns:
    """`total` output columns over `size` ranks, in rank order.

    Where the number of ranks divides 8 the columns are cut into 8 pieces and a rank holds some of
    them whole: products are made piece by piece, so that their shapes, and with them their bits, do
    not depend on the number of ranks. Elsewhere each rank holds one piece.
    """

    total: int
    size: int
    rank: int

    @cached_property
    def _edges(self) -> tuple[int, ...]:
        return (0, *(run.stop for run in split_evenly(self.total, self._num_pieces)))

    @property
    def _num_pieces(self) -> int:
        return self.size if NUM_VIRTUAL_SHARDS % self.size else NUM_VIRTUAL_SHARDS

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """First column of each rank, and the end of the last."""
        return self._edges[:: self._num_pieces // self.size]

    @property
    def own(self) -> slice:
        """This rank's columns."""
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    @property
    def width(self) -> int:
        """Number of this rank's columns."""
        return self.widths[self.rank]

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Numbers of columns of all ranks."""
        return tuple(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))

    @cached_property
    def pieces(self) -> tuple[int, ...]:
        """Bounds of this rank's pieces, counted from its first column."""
        per_rank = self._num_pieces // self.size
        edges = self._edges[self.rank * per_rank : (self.rank + 1) * per_rank + 1]
        return tuple(edge - edges[0] for edge in edges)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShard:
    """One rank's rows: heads of its head group, and its columns of the model, MLP and vocabulary.

    Heads count in the whole model.
    """

    heads: range
    kv_heads: range
    model: Columns
    mlp: Columns
    vocab: Columns

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole model."""
        return self.model.size == 1


def cut_model(cfg: ModelConfig, mesh: Mesh, rank: int) -> ModelShard:
    """What `rank` holds; raises MeshInvalid where the mesh does not fit the model's heads."""
    kv_heads = mesh.kv_heads_of(rank, num_kv_heads=cfg.num_kv_heads)
    per_group = cfg.num_heads // cfg.num_kv_heads

    def columns(total: int) -> Columns:
        return Columns(total=total, size=mesh.num_ranks, rank=rank)

    return ModelShard(
        heads=range(kv_heads.start * per_group, kv_heads.stop * per_group),
        kv_heads=kv_heads,
        model=columns(cfg.model_dim),
        mlp=columns(cfg.mlp_dim),
        vocab=columns(cfg.vocab_size),
    )


def whole_model(cfg: ModelConfig) -> ModelShard:
    """Everything, on one rank."""
    return cut_model(cfg, Mesh(heads=1, context=1), 0)

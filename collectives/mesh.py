"""The rank grid `heads x context`, and who owns which KV head, query head and segment on it.

Owns the arithmetic of ranks, virtual shards and even splits. Refuses to know tensors, devices and
process groups: everything here is a pure function of ints, so that every rank computes the same.

A rank's place: `rank = head_idx * context + context_idx`, so that the ranks which merge with each
other at every layer are neighbours. Keys belong to `NUM_VIRTUAL_SHARDS` virtual shards whatever the
mesh is; the merge follows those, not the ranks, and that keeps its order fixed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from collectives.errors import MeshInvalid

NUM_VIRTUAL_SHARDS = 8
_MESH_FORM = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """A rank's place on the grid, both indices from zero."""

    head_idx: int
    context_idx: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """`heads` groups of KV heads, each shared by `context` ranks; both at least one."""

    heads: int
    context: int

    def __post_init__(self) -> None:
        if min(self.heads, self.context) < 1:
            raise MeshInvalid(
                f"mesh {self}: both axes count ranks; limit 1 or more; give HxC, for example 1x1"
            )

    def __str__(self) -> str:
        return f"{self.heads}x{self.context}"

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole grid."""
        return self.heads * self.context

    def coordinates_of(self, rank: int) -> Coordinates:
        """Place of a rank; raises MeshInvalid outside the grid."""
        self._check_below("rank", rank, self.num_ranks)
        head_idx, context_idx = divmod(rank, self.context)
        return Coordinates(head_idx=head_idx, context_idx=context_idx)

    def rank_of(self, *, head_idx: int, context_idx: int) -> int:
        """Inverse of `coordinates_of`; raises MeshInvalid outside the grid."""
        self._check_below("head_idx", head_idx, self.heads)
        self._check_below("context_idx", context_idx, self.context)
        return head_idx * self.context + context_idx

    def context_ranks(self, head_idx: int) -> range:
        """Ranks that share one group of KV heads, in order of `context_idx`."""
        first = self.rank_of(head_idx=head_idx, context_idx=0)
        return range(first, first + self.context)

    @property
    def context_groups(self) -> tuple[range, ...]:
        """`context_ranks` of every head group, in the order in which all ranks make subgroups."""
        return tuple(self.context_ranks(head_idx) for head_idx in range(self.heads))

    def check_kv_heads(self, num_kv_heads: int) -> None:
        """Raise MeshInvalid where the head axis does not divide the model's KV heads."""
        if num_kv_heads < 1 or num_kv_heads % self.heads:
            raise MeshInvalid(
                f"mesh {self}: {self.heads} head groups; limit a divisor of the model's "
                f"{num_kv_heads} KV heads; put the other ranks on the context axis"
            )

    def kv_heads_of(self, rank: int, *, num_kv_heads: int) -> range:
        """KV heads of the rank's head group."""
        self.check_kv_heads(num_kv_heads)
        per_group = num_kv_heads // self.heads
        first = self.coordinates_of(rank).head_idx * per_group
        return range(first, first + per_group)

    def query_heads_of(self, rank: int, *, num_heads: int, num_kv_heads: int) -> range:
        """Query heads whose merged output the rank owns: a contiguous run, possibly empty.

        The runs of one head group's context ranks differ in size by at most one.
        """
        kv_heads = self.kv_heads_of(rank, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise MeshInvalid(
                f"mesh {self}: {num_heads} query heads; limit a multiple of {num_kv_heads} KV "
                "heads; check the model's configuration"
            )
        group_size = num_heads // num_kv_heads
        first = kv_heads.start * group_size
        runs = split_evenly(len(kv_heads) * group_size, self.context)
        run = runs[self.coordinates_of(rank).context_idx]
        return range(first + run.start, first + run.stop)

    def owner_of(self, *, segment_idx: int, kv_head_idx: int, num_kv_heads: int) -> int:
        """Rank that holds and writes the keys of one KV head of one segment."""
        self.check_kv_heads(num_kv_heads)
        self._check_below("kv_head_idx", kv_head_idx, num_kv_heads)
        shard = virtual_shard(segment_idx=segment_idx, kv_head_idx=kv_head_idx)
        return self.rank_of(
            head_idx=kv_head_idx // (num_kv_heads // self.heads),
            context_idx=context_owner(shard, num_context=self.context),
        )

    def _check_below(self, what: str, value: int, limit: int) -> None:
        if not 0 <= value < limit:
            raise MeshInvalid(
                f"mesh {self}: {what} {value}; limit 0 to {limit - 1}; name a place on the grid"
            )


def parse_mesh(text: str) -> Mesh:
    """Mesh from `HxC`, or from `auto`, which is 1x1 in a single process; else MeshInvalid."""
    if text == "auto":
        return Mesh(heads=1, context=1)
    match = _MESH_FORM.fullmatch(text)
    if match is None:
        raise MeshInvalid(
            f"mesh {text!r}: not a grid; limit HxC with two counts from 1, or auto; "
            "give for example 1x1 or 2x4"
        )
    return Mesh(heads=int(match[1]), context=int(match[2]))


def virtual_shard(*, segment_idx: int, kv_head_idx: int) -> int:
    """Virtual shard of one KV head of one segment; the same on every mesh."""
    return (segment_idx + kv_head_idx) % NUM_VIRTUAL_SHARDS


def context_owner(shard: int, *, num_context: int) -> int:
    """Context index that holds a virtual shard; with more than 8 the last ones hold no keys."""
    return shard % num_context


def split_evenly(total: int, parts: int) -> tuple[range, ...]:
    """Contiguous runs that cover `range(total)`, the longer ones first, sizes at most one apart."""
    size, longer = divmod(total, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return tuple(range(starts[part], starts[part + 1]) for part in range(parts))

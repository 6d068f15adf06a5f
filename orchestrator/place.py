"""One rank's place in a mesh, for one model's heads: what it holds, and whom it merges with.

Owns the meeting of `collectives.mesh` (who owns what) with `kv_store.Holding` (what lies where) and
`sparse_attn`'s folds. Refuses to know attention and files. A place of one rank has groups of one.
"""

from __future__ import annotations

from dataclasses import dataclass

from collectives import Group, Mesh, SoloGroup, virtual_shard
from kv_store import Holding, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this rank stands.

    flat: all ranks; context: those that share its KV heads, in order of context index; heads: those
    of its context index, one of each head group, in order.
    """

    mesh: Mesh
    num_heads: int
    num_kv_heads: int
    flat: Group
    context: Group
    heads: Group

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.flat.size == 1

    @property
    def kv_heads(self) -> range:
        """KV heads of the head group, in the model's numbers."""
        return self.mesh.kv_heads_of(self.flat.rank, num_kv_heads=self.num_kv_heads)

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    def runs(self) -> list[range]:
        """Query heads whose output each context rank owns, counted within the head group."""
        first = self.kv_heads.start * self.group_size
        ranks = self.mesh.context_ranks(self.mesh.coordinates_of(self.flat.rank).head_idx)
        owned = (
            self.mesh.query_heads_of(rank, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
            for rank in ranks
        )
        return [range(run.start - first, run.stop - first) for run in owned]

    def owns(self, segment_idx: int, kv_head_idx: int) -> bool:
        """Whether this rank holds and writes that segment of that KV head."""
        owner = self.mesh.owner_of(
            segment_idx=segment_idx, kv_head_idx=kv_head_idx, num_kv_heads=self.num_kv_heads
        )
        return owner == self.flat.rank

    def holding(self, layout: Layout, *, by_fold: bool) -> Holding:
        """What this rank holds of a document, ordered by (virtual shard, segment) for questions, or
        by segment alone for an ingest, which appends.
        """
        segments = []
        for kv_head_idx in self.kv_heads:
            held = [s for s in range(layout.num_segments) if self.owns(s, kv_head_idx)]
            order = [(fold_of(s, kv_head_idx) if by_fold else 0, s) for s in held]
            segments.append(tuple(segment_idx for _, segment_idx in sorted(order)))
        return Holding(layout=layout, first_kv_head=self.kv_heads.start, segments=tuple(segments))


def fold_of(segment_idx: int, kv_head_idx: int) -> int:
    """The fold in which a segment of a KV head is summed up: its virtual shard."""
    return virtual_shard(segment_idx=segment_idx, kv_head_idx=kv_head_idx)


def alone(*, num_heads: int, num_kv_heads: int) -> Place:
    """The place of a single rank."""
    solo = SoloGroup()
    return Place(
        mesh=Mesh(heads=1, context=1),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        flat=solo,
        context=solo,
        heads=solo,
    )


def take_place(mesh: Mesh, group: Group, *, num_heads: int, num_kv_heads: int) -> Place:
    """The place of this rank of `group`; every rank must call it. Raises MeshInvalid, PeerLost."""
    mesh.check_kv_heads(num_kv_heads)
    context = _own_subgroup(group, [list(mesh.context_ranks(i)) for i in range(mesh.heads)])
    columns = [
        [mesh.rank_of(head_idx=h, context_idx=c) for h in range(mesh.heads)]
        for c in range(mesh.context)
    ]
    return Place(
        mesh=mesh,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        flat=group,
        context=context,
        heads=_own_subgroup(group, columns),
    )


def _own_subgroup(group: Group, members: list[list[int]]) -> Group:
    """Make every subgroup, as all ranks must; returns the one that this rank is in."""
    if len(members) == 1:
        return group
    if len(members) == group.size:
        return SoloGroup()
    made = [group.subgroup(ranks) for ranks in members]
    (own,) = [subgroup for subgroup in made if subgroup is not None]
    return own

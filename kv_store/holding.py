"""Which segments of which KV heads one memory holds, and where their slots lie: pure integers.

Owns the order of segments and the numbering of slots. Refuses to know why somebody holds what it
holds: whoever shards a document says so in a `Holding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kv_store.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A run of KV heads of a document, and the segments that are held of each.

    segments[i]: the segments of KV head `first_kv_head + i`, in the order in which they lie in
    memory. Slots number the tokens held, head after head, segment after segment in that order.
    """

    layout: Layout
    first_kv_head: int
    segments: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        last = self.first_kv_head + len(self.segments)
        if not 0 <= self.first_kv_head < last <= self.layout.num_kv_heads:
            raise ValueError(f"KV heads {self.first_kv_head} to {last} of {self.layout}")
        for held in self.segments:
            known = set(range(self.layout.num_segments))
            if len(set(held)) != len(held) or not known.issuperset(held):
                raise ValueError(f"segments {held} of {self.layout.num_segments}")

    @staticmethod
    def whole(layout: Layout) -> Holding:
        """Everything, in the document's order."""
        every = tuple(range(layout.num_segments))
        return Holding(layout=layout, first_kv_head=0, segments=(every,) * layout.num_kv_heads)

    @property
    def kv_heads(self) -> range:
        """The document's numbers of the KV heads."""
        return range(self.first_kv_head, self.first_kv_head + len(self.segments))

    @property
    def files(self) -> list[tuple[int, int]]:
        """(segment, KV head in the document) of everything held, by segment."""
        held = (
            (segment_idx, kv_head_idx)
            for kv_head_idx, segments in zip(self.kv_heads, self.segments, strict=True)
            for segment_idx in segments
        )
        return sorted(held)

    @property
    def num_slots(self) -> int:
        """Tokens held, over all heads."""
        return self.head_bounds[-1]

    @cached_property
    def head_bounds(self) -> tuple[int, ...]:
        """First slot of each head, and the end of the last."""
        bounds = [0]
        for held in self.segments:
            bounds.append(bounds[-1] + sum(self._length(segment_idx) for segment_idx in held))
        return tuple(bounds)

    @cached_property
    def _starts(self) -> tuple[dict[int, int], ...]:
        starts: list[dict[int, int]] = []
        for held, first in zip(self.segments, self.head_bounds, strict=False):
            offsets, place = {}, first
            for segment_idx in held:
                offsets[segment_idx] = place
                place += self._length(segment_idx)
            starts.append(offsets)
        return tuple(starts)

    def holds(self, segment_idx: int, kv_head_idx: int) -> bool:
        """Whether it holds that segment of that KV head of the document."""
        head = kv_head_idx - self.first_kv_head
        return 0 <= head < len(self.segments) and segment_idx in self._starts[head]

    def slots_of(self, segment_idx: int, kv_head_idx: int) -> tuple[int, int]:
        """First and past-the-end slot of a segment of a KV head that is held (KeyError if not)."""
        start = self._starts[kv_head_idx - self.first_kv_head][segment_idx]
        return start, start + self._length(segment_idx)

    def body_of(self, segment_idx: int, kv_head_idx: int) -> tuple[int, int]:
        """The same without the steady zone; empty, and then (x, x), where nothing else is there."""
        start, _ = self.slots_of(segment_idx, kv_head_idx)
        first, last = self.layout.clustered_span(segment_idx)
        return start + first, start + last

    def _length(self, segment_idx: int) -> int:
        start, end = self.layout.segment_span(segment_idx)
        return end - start

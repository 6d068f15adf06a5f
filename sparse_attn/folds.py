"""Folds: the fixed division of a document's keys that makes the bits of a sum independent of who
adds it up.

The keys of each KV head are divided into `NUM_FOLDS` folds, and each fold lies in one run of slots
and of units. Whatever is accumulated over keys is accumulated within a fold in a fixed order, and
the folds meet in a fixed tree (`state.merge_tree`). A caller holds all folds, or those of one
residue modulo a power of two: then its own tree is a subtree, and the tree over such callers is the
rest of it. Knows no ranks and no attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

NUM_FOLDS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Runs:
    """The slots that dense attention reads, as runs: one for each segment of each fold.

    first, count: [n] int64, flat slots, head after head and fold after fold; bounds: [G, 9] int64,
    the runs of head g's fold v are bounds[g, v] to bounds[g, v + 1].
    """

    first: Tensor
    count: Tensor
    bounds: Tensor
    _spans: list[tuple[int, int]] = field(init=False, repr=False)
    _bounds: list[list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        spans = zip(self.first.tolist(), self.count.tolist(), strict=True)
        object.__setattr__(self, "_spans", list(spans))
        object.__setattr__(self, "_bounds", self.bounds.tolist())

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the caller."""
        return len(self._bounds)

    @property
    def num_keys(self) -> int:
        """Keys of all runs of all heads."""
        return sum(count for _, count in self._spans)

    def of_fold(self, head: int, fold: int) -> list[slice]:
        """The slots of one head's fold, run after run; runs without a slot are left out."""
        first, last = self._bounds[head][fold : fold + 2]
        return [slice(at, at + count) for at, count in self._spans[first:last] if count]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Scores of one query over what it read, kept until the whole of its mass is known.

    first, count: [n] int64, runs of flat slots, head after head; bounds: [G + 1] int64, the runs of
    head g; scores: [H/G, keys of all runs] float32, in the order of the runs.
    """

    first: Tensor
    count: Tensor
    bounds: Tensor
    scores: Tensor


def each_fold(bounds: list[list[int]]) -> Iterator[tuple[int, int, slice]]:
    """(head, fold, columns) of every fold that has columns; bounds: [G][9]."""
    for head, row in enumerate(bounds):
        for fold in range(NUM_FOLDS):
            if row[fold] < row[fold + 1]:
                yield head, fold, slice(row[fold], row[fold + 1])

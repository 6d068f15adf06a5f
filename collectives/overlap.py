"""Two halves of one step, one half's communication beside the other half's computation.

Owns the schedule of TokenWeave (arXiv 2505.11329): the tokens of a large prefill chunk are cut in
two, and the halves take turns. Refuses to know what the halves compute: each is a generator, which
starts a collective, yields it, and gets its result sent back.

    first   compute 0 | start a0 |           | wait a0, compute 1 | start a1 |           | wait a1
    second            |          compute 0, start b0 |            | wait b0, compute 1, start b1
    on the wire         a0 a0 a0 a0 a0 a0 ... b0 b0 b0 b0 b0 b0 b0 ...a1 a1 a1 a1 a1

While one half computes, at most the other's one collective is in flight; while neither computes,
both are. The order of all that is started is a pure function of what the two generators yield:
ranks whose halves yield the same collectives in the same order issue one common order, whatever
their clocks do. The first half is never behind: when the second computes its step k, the first has
computed its own step k. So the second may read, without further care, what the first wrote in the
same step, as its keys of the same layer.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Generic, TypeAlias, TypeVar

import torch

from collectives.group import Pending

T = TypeVar("T")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
Steps: TypeAlias = Generator[Pending, torch.Tensor, T]


def run_steps(steps: Steps[T]) -> T:
    """Run a computation alone: each collective is waited for at once."""
    with closing(steps):
        turn = _Turn(steps)
        while not turn.is_done:
            turn.resume()
        return turn.result


def run_pair(first: Steps[T1], second: Steps[T2]) -> tuple[T1, T2]:
    """Run two computations in turns; results of both. Either may have fewer steps.

    What is started, in order: `first` up to its first collective, `second` up to its first, `first`
    up to its second, and so on; the longer one ends alone. Where one raises, or a collective of it
    does, both are closed (their `finally` runs) and the error goes on; what is then in flight is
    not waited for, and the rank is out of step with those that did not raise.
    """
    with closing(first), closing(second):
        a = _Turn(first)
        b = _Turn(second)
        while not (a.is_done and b.is_done):
            if not a.is_done:
                a.resume()
            if not b.is_done:
                b.resume()
        return a.result, b.result


class _Turn(Generic[T]):
    """A computation and the collective that it waits for; it begins to compute when made."""

    __slots__ = ("_pending", "_result", "_steps")

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self._result: list[T] = []
        self._pending: Pending | None = None
        self._compute(None)

    @property
    def is_done(self) -> bool:
        """Whether the computation has returned."""
        return bool(self._result)

    @property
    def result(self) -> T:
        """What the computation returned, once it has."""
        return self._result[0]

    def resume(self) -> None:
        """Wait for the collective, and compute until the next one is in flight."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self._compute(pending.wait())

    def _compute(self, sent: torch.Tensor | None) -> None:
        try:
            self._pending = next(self._steps) if sent is None else self._steps.send(sent)
        except StopIteration as end:
            self._result.append(end.value)

"""The host's deadline for what a device does: progress extends it, a failure is named."""

from __future__ import annotations

import time
from collections import deque

import pytest

from collectives.watch import Launched, Unfinished, await_all, drop_completed


class Work:
    """Ends at a moment of the monotonic clock."""

    def __init__(self, *, ends_at: float = 0.0, fails_at: float = float("inf")) -> None:
        self._ends_at = ends_at
        self._fails_at = fails_at

    def is_completed(self) -> bool:
        return time.monotonic() >= self._ends_at

    def has_failed(self) -> bool:
        return time.monotonic() >= self._fails_at


def launch(*works: Work) -> deque[Launched]:
    return deque(
        Launched(operation=f"operation {idx}", peer=idx, work=work)
        for idx, work in enumerate(works)
    )


def test_nothing_and_everything_done_return_at_once() -> None:
    await_all(launch(), timeout_s=0)
    await_all(launch(Work(), Work()), timeout_s=0)


def test_a_queue_that_moves_may_be_longer_than_the_deadline() -> None:
    now = time.monotonic()
    works = launch(*(Work(ends_at=now + 0.1 * step) for step in range(1, 6)))
    await_all(works, timeout_s=0.3)
    assert time.monotonic() >= now + 0.5


def test_the_first_that_does_not_end_is_named() -> None:
    now = time.monotonic()
    works = launch(Work(ends_at=now + 0.05), Work(ends_at=now + 60), Work(ends_at=now + 60))
    with pytest.raises(Unfinished, match="timed out") as caught:
        await_all(works, timeout_s=0.1)
    assert (caught.value.operation, caught.value.peer) == ("operation 1", 1)


def test_a_failure_that_becomes_known_while_the_last_ends_is_named() -> None:
    now = time.monotonic()
    works = launch(Work(), Work(fails_at=now + 0.05), Work(ends_at=now + 0.1))
    with pytest.raises(Unfinished, match="its communicator failed") as caught:
        await_all(works, timeout_s=5)
    assert caught.value.operation == "operation 1"


def test_only_what_ended_well_is_forgotten_and_only_above_the_limit() -> None:
    far = time.monotonic() + 60
    works = launch(Work(), Work(), Work(ends_at=far), Work())
    drop_completed(works, max_left=3)
    assert [each.operation for each in works] == ["operation 1", "operation 2", "operation 3"]
    drop_completed(works, max_left=0)
    assert [each.operation for each in works] == ["operation 2", "operation 3"]
    failed = launch(Work(fails_at=0), Work())
    drop_completed(failed, max_left=0)
    assert len(failed) == 2

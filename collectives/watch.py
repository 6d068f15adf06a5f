"""A deadline for work that a device does behind the host's back.

Owns how long the host waits for operations that were launched, and which of them it names. Refuses
to know groups and backends: it sees things that can say whether they have ended, and how.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

_PAUSE_S = 20e-6


class Watched(Protocol):
    """What is asked of a launched operation."""

    def is_completed(self) -> bool:
        """Whether it has ended, well or not."""

    def has_failed(self) -> bool:
        """Whether it is known to have ended badly; that may be known a while after the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """An operation on its way, and the one rank that it needs where that is known."""

    operation: str
    peer: int | None
    work: Watched


class Unfinished(Exception):
    """An operation failed, or nothing has ended for as long as the deadline allows."""

    def __init__(self, launched: Launched, cause: str) -> None:
        self.operation = launched.operation
        self.peer = launched.peer
        super().__init__(cause)


def await_all(launched: Collection[Launched], *, timeout_s: float) -> None:
    """Wait until all have ended, in the order of their launch; Unfinished names the first bad one.

    The deadline starts again whenever one has ended: a long queue that moves is no failure. How
    each ended is asked last, when also the failures have had their time to become known.
    """
    for each in launched:
        deadline = time.monotonic() + timeout_s
        while not each.work.is_completed():
            if time.monotonic() > deadline:
                raise Unfinished(each, "timed out")
            time.sleep(_PAUSE_S)
    for each in launched:
        if each.work.has_failed():
            raise Unfinished(each, "its communicator failed")


def drop_completed(launched: deque[Launched], *, max_left: int) -> None:
    """Forget the first ones that have ended well, where there are more than `max_left`."""
    while len(launched) > max_left:
        work = launched[0].work
        if not work.is_completed() or work.has_failed():
            return
        launched.popleft()

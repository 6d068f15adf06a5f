"""Whether children have come as far as they said they would: one pipe each.

Owns the pipes. A child that ends closes its end, so that nobody waits for the dead. Refuses to know
what the children are ready for.
"""

from __future__ import annotations

import os
import select
import time
from types import TracebackType
from typing import Self


class Readiness:
    """Pipes to children that are about to be started.

    writers: what each child inherits, to write a byte to when it is ready.
    """

    def __init__(self, num_children: int) -> None:
        pipes = [os.pipe() for _ in range(num_children)]
        self._readers = [reader for reader, _ in pipes]
        self.writers = [writer for _, writer in pipes]

    def __enter__(self) -> Self:
        """The pipes are open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the pipes."""
        _close_all(self.writers)
        _close_all(self._readers)

    def await_all(self, *, timeout_s: float) -> bool:
        """Wait for all children, once they run; False where one has ended instead, or is late."""
        _close_all(self.writers)
        deadline_s = time.monotonic() + timeout_s
        return all(_is_ready(reader, deadline_s) for reader in self._readers)


def _is_ready(reader: int, deadline_s: float) -> bool:
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    left_s = max(0.0, deadline_s - time.monotonic())
    return bool(poll.poll(left_s * 1e3)) and os.read(reader, 1) != b""


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())

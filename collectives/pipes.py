"""Short messages between the ranks of one machine, from the thread that computes to the other.

Owns each rank's inbox, a pipe that the others write to, and how a message that does not come
becomes `Silence`. Refuses to know what messages mean.

A collective of a few hundred bytes over gloo passes three threads on either side; here a write
wakes the reader itself. A message is at most what a pipe takes whole (POSIX, `PIPE_BUF`), so that
writers do not mix. Messages of an operation that nobody waits for yet are kept.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from collectives.liveness import find_ended

_HEADER = struct.Struct("<QIH")  # operation, rank, bytes that follow
MAX_MESSAGE_BYTES = 4096 - _HEADER.size
_READ_BYTES = 1 << 16
_TICK_S = 0.05
_LEFT = (1 << 64) - 1  # in place of an operation: this rank takes part in none any more


class Silence(RuntimeError):
    """A rank's message will not come, or did not in time; `rank` where that is one alone."""

    def __init__(self, text: str, rank: int | None) -> None:
        super().__init__(text)
        self.rank = rank


class Inbox:
    """One rank's inbox and the others' as it writes to them.

    file: end of the own pipe to read from; peers: ends of the others' to write to, by rank; all are
    non-blocking, and closed by `close`. processes: all ranks, as `liveness` describes them.
    """

    __slots__ = (
        "_file",
        "_kept",
        "_left",
        "_peers",
        "_poll",
        "_processes",
        "_rank",
        "_rest",
        "_timeout_s",
    )

    def __init__(
        self,
        file: int,
        peers: Mapping[int, int],
        *,
        rank: int,
        processes: Sequence[bytes],
        timeout_s: float,
    ) -> None:
        self._file, self._peers, self._rank = file, dict(peers), rank
        self._processes, self._timeout_s = processes, timeout_s
        self._poll = select.poll()
        self._poll.register(file, select.POLLIN)
        self._kept: dict[int, dict[int, bytes]] = {}
        self._left: set[int] = set()
        self._rest = b""

    def send(self, operation: int, content: bytes) -> None:
        """Put a message into every other rank's inbox; raises Silence where one stays full."""
        message = _HEADER.pack(operation, self._rank, len(content)) + content
        for peer, file in self._peers.items():
            self._write(peer, file, message)

    def receive(self, operation: int) -> dict[int, bytes]:
        """The message of every other rank for an operation; raises Silence. Once an operation."""
        kept = self._kept.setdefault(operation, {})
        deadline = time.monotonic() + self._timeout_s
        while len(kept) < len(self._peers):
            if not self._read():
                missing = [peer for peer in self._peers if peer not in kept]
                self._check(missing, is_late=time.monotonic() > deadline)
        return self._kept.pop(operation)

    def close(self) -> None:
        """Tell the others that this rank is leaving, and close everything."""
        goodbye = _HEADER.pack(_LEFT, self._rank, 0)
        for file in self._peers.values():
            with suppress(OSError):
                os.write(file, goodbye)
            os.close(file)
        self._peers.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, peer: int, file: int, message: bytes) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                os.write(file, message)
            except BlockingIOError:
                # It is full of what that rank has not come to yet; ours may be what it waits for.
                self._read()
                self._check([peer], is_late=time.monotonic() > deadline)
            except BrokenPipeError:
                return  # nobody reads there any more: who waits for that rank will hear of it
            else:
                return

    def _read(self) -> bool:
        """Take in what has come, waiting a moment for something; whether anything has."""
        if not self._poll.poll(1e3 * _TICK_S):
            return False
        data = os.read(self._file, _READ_BYTES)
        if not data:  # every other rank has closed its end
            self._left.update(self._peers)
            return False
        data, start = self._rest + data, 0
        while start + _HEADER.size <= len(data):
            operation, rank, num_bytes = _HEADER.unpack_from(data, start)
            end = start + _HEADER.size + num_bytes
            if end > len(data):
                break
            if operation == _LEFT:
                self._left.add(rank)
            else:
                content = data[start + _HEADER.size : end]
                self._kept.setdefault(operation, {})[rank] = content
            start = end
        self._rest = data[start:]
        return True

    def _check(self, missing: Sequence[int], *, is_late: bool) -> None:
        """Raise Silence where one of those is known to be gone, or all have had their time."""
        left = [peer for peer in missing if peer in self._left]
        ended = [missing[i] for i in find_ended([self._processes[peer] for peer in missing])]
        for gone, text in ((ended, "its process has ended"), (left, "it has left the group")):
            if gone:
                raise Silence(text, gone[0] if len(gone) == 1 else None)
        if is_late:
            raise Silence("no message in time", missing[0] if len(missing) == 1 else None)

"""Messages between this process and a child of its own: JSON objects, one a line, both ways.

Owns the framing over an inherited socket. Refuses to know what is said.
"""

from __future__ import annotations

import json
import select
import socket
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

Message = dict[str, Any]


class Channel:
    """One end. The two speak in turns: there is never more than one message on its way."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = end.makefile("r", encoding="utf-8")

    @classmethod
    def inherited(cls, fd: int) -> Self:
        """The end that this process was started with."""
        return cls(socket.socket(fileno=fd))

    def __enter__(self) -> Self:
        """The channel is open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close this end."""
        self._reader.close()
        self._socket.close()

    def send(self, message: Message) -> None:
        """Send; where nobody listens any more, `receive` tells."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, *, timeout_s: float | None = None) -> Message | None:
        """The next message; None once the other end says no more, or not in time."""
        if not self.is_readable(wait_s=timeout_s):
            return None
        line = ""
        with suppress(ConnectionResetError):
            line = self._reader.readline()
        message: Message | None = json.loads(line) if line.endswith("\n") else None
        return message

    def is_readable(self, *, wait_s: float | None = 0.0) -> bool:
        """Whether `receive` would return at once; None waits for that."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(None if wait_s is None else wait_s * 1e3))

    def end(self) -> None:
        """Say that nothing more will be sent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)


def open_channel() -> tuple[Channel, socket.socket]:
    """This process's end, and the one that a child inherits."""
    ours, theirs = socket.socketpair()
    return Channel(ours), theirs

"""Tensors between the ranks of one machine without a socket: inboxes and outboxes together.

Owns how the ranks of a group come to see each other's, and which way a tensor goes: a small one
inside the message, a large one through shared memory, its notice in the message. Refuses to know
torch.distributed. What a rank shows is without a name (a pipe, and a file of `memfd_create`): the
others open it through /proc, nobody else finds it, and it ends with the last process that has it
open, however that ended.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from collectives.group import Group
from collectives.liveness import find_place
from collectives.pipes import MAX_MESSAGE_BYTES, Inbox
from collectives.shared_memory import Outboxes, fill

_NOTICE = struct.Struct("<QQQ")
_NONCE_BYTES = 16
# Room for what others have started and this rank has not come to.
_PIPE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Brought:
    """What this rank has brought to an operation: its message, and the post that it announces."""

    operation: int
    message: bytes
    post_idx: int | None


class Neighbours:
    """The ranks of a group that is on one machine; made by `open_neighbours`.

    Operations are counted: all ranks bring to the same ones in the same order, and may collect in
    any. Both raise `pipes.Silence`.
    """

    __slots__ = ("_inbox", "_num_operations", "_outboxes", "_rank")

    def __init__(self, inbox: Inbox, outboxes: Outboxes, rank: int) -> None:
        self._inbox, self._outboxes, self._rank = inbox, outboxes, rank
        self._num_operations = 0

    def bring(self, tensor: torch.Tensor, *, most_bytes: int) -> Brought:
        """Give a contiguous tensor to all others; most_bytes: the most that any rank brings."""
        operation = self._num_operations
        self._num_operations += 1
        if most_bytes <= MAX_MESSAGE_BYTES:
            brought = Brought(operation, _to_bytes(tensor), None)
        else:
            post_idx, notice = self._outboxes.post(tensor)
            brought = Brought(operation, _NOTICE.pack(*notice), post_idx)
        self._inbox.send(operation, brought.message)
        return brought

    def collect(self, brought: Brought, places: Sequence[torch.Tensor], *, row: int = 0) -> None:
        """Fill each rank's place with what it brought; row: as in `Outboxes.read`."""
        messages = self._inbox.receive(brought.operation)
        messages[self._rank] = brought.message
        if brought.post_idx is None:
            for rank, place in enumerate(places):
                if place.numel():
                    data = torch.frombuffer(bytearray(messages[rank]), dtype=torch.uint8)
                    fill(place, data, row=row)
            return
        notices = [_NOTICE.unpack(messages[rank]) for rank in range(len(places))]
        self._outboxes.read(notices, places, row=row)
        self._outboxes.take(brought.post_idx)

    def close(self) -> None:
        """Tell the others that this rank is leaving, and let go of everything."""
        self._inbox.close()
        self._outboxes.close()


def open_neighbours(
    control: Group, *, processes: Sequence[bytes], timeout_s: float
) -> Neighbours | None:
    """The neighbours of a CPU group's ranks, which `processes` describes; None, on all ranks, where
    one cannot see another's. Collective over `control`: two gathers of a few bytes.
    """
    here = find_place()
    with _own_files() as own:
        shown = f"{here} {os.getpid()} {own}" if here and own is not None else ""
        seen = [_open(there, here) for there in control.all_gather_bytes(shown.encode())]
        opened = [files for files in seen if files is not None]
        sees_all = len(opened) == len(seen)
        if not all(control.all_gather_bytes(b"\1" if sees_all else b"")):
            for file in (file for files in opened for file in files):
                os.close(file)
            return None
        assert own is not None
        memory, pipes = ([files[i] for files in opened] for i in (0, 1))
        os.close(pipes[control.rank])
        peers = {rank: file for rank, file in enumerate(pipes) if rank != control.rank}
        inbox = Inbox(
            os.dup(own.reader),
            peers,
            rank=control.rank,
            processes=processes,
            timeout_s=timeout_s,
        )
        return Neighbours(inbox, Outboxes(memory, control.rank), control.rank)


@dataclass(frozen=True, slots=True)
class _OwnFiles:
    memory: int
    writer: int
    reader: int
    nonce: bytes

    def __str__(self) -> str:
        return f"{self.memory} {self.writer} {self.nonce.hex()}"


@contextmanager
def _own_files() -> Iterator[_OwnFiles | None]:
    """A nameless file that begins with a nonce, and a pipe, closed at the end of the block."""
    if not hasattr(os, "memfd_create"):
        yield None
        return
    memory = os.memfd_create("longspan-outbox")
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with suppress(OSError):  # some users may not have that much
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    try:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        os.write(memory, nonce)
        yield _OwnFiles(memory, writer, reader, nonce)
    finally:
        for file in (memory, writer, reader):
            os.close(file)


def _open(shown: bytes, here: str | None) -> tuple[int, int] | None:
    """A rank's file and the end of its pipe to write to; None where they are not of this machine,
    or not for us to open.
    """
    if not shown:
        return None
    there, pid, memory, writer, nonce = shown.decode().rsplit(" ", maxsplit=4)
    if there != here:
        return None
    opened: list[int] = []
    with suppress(OSError):
        opened.append(os.open(f"/proc/{pid}/fd/{memory}", os.O_RDWR | os.O_CLOEXEC))
        if os.pread(opened[0], _NONCE_BYTES, 0) == bytes.fromhex(nonce):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
            opened.append(os.open(f"/proc/{pid}/fd/{writer}", flags))
            return opened[0], opened[1]
    for file in opened:
        os.close(file)
    return None


def _to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()

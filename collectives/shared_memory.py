"""Large tensors between the ranks of one machine, through memory that all of them map.

Owns each rank's outbox, how the others come to see it, and when a piece of it may be written again.
Refuses to know how ranks tell each other that something lies there, and deadlines: the group sends
a *notice* with every post, over what notices a lost rank, and nothing is read before it came.

An outbox is a file without a name (`memfd_create`) that the others open through /proc: it needs no
place on a disk or in /dev/shm, nobody else finds it, and it ends with the last process that has it
open, however that ended. Beside a loopback socket it saves the kernel's copies and its buffers: a
post is one copy into the outbox and one out of it a reader.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from collectives.group import Group
from collectives.liveness import find_place

# A smaller tensor costs less in the message that would be its notice.
MIN_BYTES = 32 * 1024
NOTICE_WIDTH = 3
_GRAIN = 1 << 20  # of pieces; a multiple of every page size
_NONCE_BYTES = 16


@dataclass(slots=True)
class _Piece:
    """A run of the own outbox, and the last post that lay in it."""

    offset: int
    memory: torch.Tensor
    post_idx: int = -1


class Outboxes:
    """The outboxes of all ranks of a group, as one rank sees them; made by `open_outboxes`.

    Posts are counted, and every rank makes the same ones in the same order. A notice is
    `[offset, bytes of the piece, posts that this rank has taken]`: once all have taken a post, its
    piece is free. So a rank that waits as it goes has two pieces in use.
    """

    __slots__ = ("_files", "_mapped", "_num_posts", "_open_posts", "_pieces", "_rank", "_taken")

    def __init__(self, files: list[int], rank: int) -> None:
        self._files, self._rank = files, rank
        self._pieces: list[_Piece] = []
        self._mapped: dict[tuple[int, int], torch.Tensor] = {}
        self._num_posts = 0
        self._open_posts: set[int] = set()
        self._taken = 0

    def post(self, tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Copy a contiguous tensor into the outbox; number of the post, and its notice."""
        data = tensor.view(-1).view(torch.uint8)
        piece = self._find_piece(data.numel())
        piece.memory[: data.numel()].copy_(data)
        post_idx = piece.post_idx = self._num_posts
        self._num_posts += 1
        self._open_posts.add(post_idx)
        notice = (piece.offset, piece.memory.numel(), min(self._open_posts))
        return post_idx, torch.tensor(notice, device="cpu")

    def read(self, notices: torch.Tensor, places: Sequence[torch.Tensor], *, row: int = 0) -> None:
        """Fill each rank's place from its outbox, by the notices `[size, 3]` of one post.

        row: which of the tensors of a place's shape that lie there one after another.
        """
        found = notices.tolist()
        self._taken = max(self._taken, min(taken for _, _, taken in found))
        for rank, ((offset, width, _), place) in enumerate(zip(found, places, strict=True)):
            posted = self._map(rank, offset, width)[row * place.nbytes : (row + 1) * place.nbytes]
            place.copy_(posted.view(place.dtype).view(place.shape))

    def take(self, post_idx: int) -> None:
        """Everything of a post was read."""
        self._open_posts.discard(post_idx)

    def close(self) -> None:
        """Let go of all memory; the outbox ends when all ranks have."""
        self._pieces.clear()
        self._mapped.clear()
        while self._files:
            os.close(self._files.pop())

    def _find_piece(self, num_bytes: int) -> _Piece:
        free = (
            p for p in self._pieces if p.post_idx < self._taken and p.memory.numel() >= num_bytes
        )
        smallest = min(free, key=lambda piece: piece.memory.numel(), default=None)
        if smallest is not None:
            return smallest
        offset = sum(piece.memory.numel() for piece in self._pieces)
        width = max(1, -(-num_bytes // _GRAIN)) * _GRAIN
        os.ftruncate(self._files[self._rank], offset + width)
        piece = _Piece(offset, self._map(self._rank, offset, width))
        self._pieces.append(piece)
        return piece

    def _map(self, rank: int, offset: int, width: int) -> torch.Tensor:
        key = rank, offset
        if key not in self._mapped:
            memory = mmap.mmap(self._files[rank], width, offset=offset)
            self._mapped[key] = torch.frombuffer(memory, dtype=torch.uint8)
        return self._mapped[key]


def open_outboxes(control: Group) -> Outboxes | None:
    """Outboxes of the ranks of a CPU group; None, on all of them, where one cannot see another's.

    Collective: two gathers of a few bytes.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    with _own_file(nonce) as own:
        here = find_place()
        seen = f"{here} {os.getpid()} {own} {nonce.hex()}" if here and own is not None else ""
        files = [_open_file(there, here) for there in control.all_gather_bytes(seen.encode())]
        sees_all = None not in files
        if all(control.all_gather_bytes(b"\1" if sees_all else b"")):
            return Outboxes([file for file in files if file is not None], control.rank)
        for file in files:
            if file is not None:
                os.close(file)
        return None


@contextmanager
def _own_file(nonce: bytes) -> Iterator[int | None]:
    """A new nameless file that begins with the nonce; this descriptor of it ends with the block."""
    if not hasattr(os, "memfd_create"):
        yield None
        return
    file = os.memfd_create("longspan-outbox")
    try:
        os.write(file, nonce)
        yield file
    finally:
        os.close(file)


def _open_file(seen: bytes, here: str | None) -> int | None:
    """A rank's file; None where it is not on this machine, or not for us to open."""
    if not seen:
        return None
    there, pid, descriptor, nonce = seen.decode().rsplit(" ", maxsplit=3)
    if there != here:
        return None
    with suppress(OSError):
        file = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        if os.pread(file, _NONCE_BYTES, 0) == bytes.fromhex(nonce):
            return file
        os.close(file)
    return None

"""Large tensors between the ranks of one machine, through memory that all of them map.

Owns each rank's outbox, and when a piece of it may be written again. Refuses to know how ranks find
each other's (`neighbours.py`) and tell each other that something lies there: a *notice* goes with
every post, and nothing is read before it came. Beside a loopback socket it saves the kernel's
copies and its buffers: a post is one copy into the outbox and one out of it a reader.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Notice = tuple[int, int, int]
"""Offset of a post's piece, the piece's bytes, and how many posts its rank has taken."""

_GRAIN = 1 << 20  # of pieces; a multiple of every page size


@dataclass(slots=True)
class _Piece:
    """A run of the own outbox, and the last post that lay in it."""

    offset: int
    memory: torch.Tensor
    post_idx: int = -1


class Outboxes:
    """The outboxes of all ranks of a group, as one rank sees them: a file each, by descriptors that
    are closed by `close`.

    Posts are counted, and every rank makes the same ones in the same order. Once all have taken a
    post, its piece is free. So a rank that waits as it goes has two pieces in use.
    """

    __slots__ = ("_files", "_mapped", "_num_posts", "_open_posts", "_pieces", "_rank", "_taken")

    def __init__(self, files: list[int], rank: int) -> None:
        self._files, self._rank = files, rank
        self._pieces: list[_Piece] = []
        self._mapped: dict[tuple[int, int], torch.Tensor] = {}
        self._num_posts = 0
        self._open_posts: set[int] = set()
        self._taken = 0

    def post(self, tensor: torch.Tensor) -> tuple[int, Notice]:
        """Copy a contiguous tensor into the outbox; number of the post, and its notice."""
        data = tensor.view(-1).view(torch.uint8)
        piece = self._find_piece(data.numel())
        piece.memory[: data.numel()].copy_(data)
        post_idx = piece.post_idx = self._num_posts
        self._num_posts += 1
        self._open_posts.add(post_idx)
        return post_idx, (piece.offset, piece.memory.numel(), min(self._open_posts))

    def read(
        self, notices: Sequence[Notice], places: Sequence[torch.Tensor], *, row: int = 0
    ) -> None:
        """Fill each rank's place from its outbox, by all ranks' notices of one post.

        row: which of the tensors of a place's shape that lie there one after another.
        """
        self._taken = max(self._taken, min(taken for _, _, taken in notices))
        for rank, ((offset, width, _), place) in enumerate(zip(notices, places, strict=True)):
            fill(place, self._map(rank, offset, width), row=row)

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


def fill(place: torch.Tensor, data: torch.Tensor, *, row: int) -> None:
    """Copy the row-th tensor of the place's shape and dtype out of bytes."""
    num_bytes = place.nbytes
    if num_bytes:
        own = data[row * num_bytes : (row + 1) * num_bytes]
        place.copy_(own.view(place.dtype).view(place.shape))

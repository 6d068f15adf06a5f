"""Bytes of any length over any group that moves CPU tensors: plans, names, small answers.

Owns how bytes become tensors: first the length, then the content. Refuses to know what they mean
and how a group moves anything. Every group inherits both calls from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from collectives.errors import GroupMisuse

if TYPE_CHECKING:
    from collectives.group import Group


class ByteMessages:
    """The calls of a `Group` that move bytes, in terms of those that move tensors."""

    __slots__ = ()

    def broadcast_bytes(self: Group, data: bytes | None, *, source: int = 0) -> bytes:
        """Give every rank the bytes of rank `source`; what others bring as `data` is not read."""
        is_source = self.rank == source
        if is_source and data is None:
            raise GroupMisuse(
                f"broadcast_bytes: None on rank {source}; limit bytes on the source; give it bytes"
            )
        brought = data if is_source and data is not None else b""
        length = torch.tensor([len(brought)], device="cpu")
        self.broadcast_(length, source=source)
        num_bytes = int(length)
        content = _to_tensor(brought, num_bytes)
        if num_bytes:
            self.broadcast_(content, source=source)
        return _to_bytes(content, num_bytes)

    def all_gather_bytes(self: Group, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, in rank order; each may have its own length."""
        mine = torch.tensor([len(data)], device="cpu")
        lengths = self.all_gather(mine).flatten().tolist()
        widest = max(lengths)
        if not widest:
            return [b""] * self.size
        rows = self.all_gather(_to_tensor(data, widest))
        return [_to_bytes(row, num_bytes) for row, num_bytes in zip(rows, lengths, strict=True)]


def _to_tensor(data: bytes, width: int) -> torch.Tensor:
    """`[width]` uint8: the bytes, then zeros."""
    tensor = torch.zeros(width, dtype=torch.uint8, device="cpu")
    if data:
        tensor[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return tensor


def _to_bytes(tensor: torch.Tensor, num_bytes: int) -> bytes:
    return tensor[:num_bytes].numpy().tobytes()

"""Collectives as methods of a Group, which every caller gets as an argument.

Owns what a collective promises (shapes, effects, who must call) and the group of one rank. Refuses
to know attention and the mesh's meaning. There is no default group and no ambient state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from collectives.checks import (
    Reduction,
    check_columns,
    check_members,
    check_peer,
    check_reduction,
    check_rows,
    check_source,
    check_tensor,
)
from collectives.messages import ByteMessages


class Pending(Protocol):
    """A collective that was started, and whose tensors are not touched before `wait`."""

    def wait(self) -> torch.Tensor:
        """Result, once it may be used; raises PeerLost. A second call gives the same.

        On a CPU the result is there when this returns. On a GPU what the caller launches afterwards
        on the stream that started the collective sees it; the host goes on at once.
        """


class Group(Protocol):
    """Ranks that call the same collectives in the same order; every one must call each of them.

    Tensors are contiguous, on the group's device, of one shape and one dtype of `MOVABLE` on all
    ranks. A sum's order of addition is the group's own: who needs the same bits on another number
    of ranks gathers, and adds in an order of his own. `max` promises nothing about NaN.

    A `start_` form returns at once and runs beside what the caller does next; started collectives
    may be waited for in any order, and the order that must agree on all ranks is that of starting.
    Until `wait` its argument is neither written nor, for `start_all_reduce_`, read. On a CPU each
    call or `wait` raises PeerLost itself; on a GPU that may be left to a later call, at the latest
    to `settle`, which therefore comes before the host reads what was computed from a result.
    """

    @property
    def rank(self) -> int:
        """This rank's place, from 0 to `size - 1`."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_reduce_(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> None:
        """Overwrite `tensor` on every rank with the reduction over all ranks."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every rank the tensors of all: `[...]` becomes `[size, ...]`, in rank order."""

    def reduce_scatter(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> torch.Tensor:
        """Reduce `[size, ...]` over the ranks and give rank r row r, `[...]`."""

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send row r of `[size, ...]` to rank r; row r of the result came from rank r."""

    def send(self, tensor: torch.Tensor, *, target: int) -> None:
        """Give `tensor` to rank `target`, which must call `receive_`; the two alone take part.

        It may wait for the receiver: two ranks that exchange must not both send first.
        """

    def receive_(self, tensor: torch.Tensor, *, source: int) -> None:
        """Overwrite `tensor` with what rank `source` sent; sends of one source keep their order."""

    def broadcast_(self, tensor: torch.Tensor, *, source: int = 0) -> None:
        """Overwrite `tensor` on every rank with that of rank `source`."""

    def barrier(self) -> None:
        """Return once every rank has called it."""

    def start_all_reduce_(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> Pending:
        """Begin `all_reduce_`; the result is `tensor` itself."""

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """Begin `all_gather`."""

    def start_all_to_all(self, tensor: torch.Tensor) -> Pending:
        """Begin `all_to_all`."""

    def start_gather_columns(self, tensor: torch.Tensor, widths: Sequence[int]) -> Pending:
        """Begin to put `[T, widths[r]]` of every rank r side by side: `[T, sum(widths)]` for all.

        Every rank gives the widths of all. The result may be `tensor` itself where one has all.
        """

    def settle(self) -> None:
        """Return once all that was started on this group is done; PeerLost after the deadline."""

    def subgroup(self, ranks: Sequence[int]) -> Group | None:
        """Group of some of the ranks, ascending; None on a rank that is not among them.

        Every rank of the whole job must call it, with the same ranks and in the same order, the
        other ranks included; so a subgroup has no subgroups. Raises GroupMisuse and PeerLost.
        """

    @property
    def control(self) -> Group:
        """Group of the same ranks for small messages on the CPU, which never queue behind data.

        Its deadline counts while a rank idles, too: who has nothing to say must say so in time.
        """

    def broadcast_bytes(self, data: bytes | None, *, source: int = 0) -> bytes:
        """Give every rank the bytes of rank `source`, where `data` must not be None; CPU groups."""

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, in rank order, lengths free; CPU groups alone."""


class SoloGroup(ByteMessages):
    """The group of one rank: moves nothing, and checks what a larger group would check."""

    __slots__ = ()

    @property
    def rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def size(self) -> int:
        """Always 1."""
        return 1

    def all_reduce_(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> None:
        """Leave `tensor` as it is."""
        check_reduction("all_reduce_", tensor, op)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy of `[...]` as `[1, ...]`."""
        check_tensor("all_gather", tensor)
        return tensor.unsqueeze(0).clone()

    def reduce_scatter(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> torch.Tensor:
        """Copy of the only row of `[1, ...]`."""
        check_reduction("reduce_scatter", tensor, op)
        check_rows("reduce_scatter", tensor, self.size)
        return tensor[0].clone()

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy of `[1, ...]`."""
        check_rows("all_to_all", tensor, self.size)
        return tensor.clone()

    def send(self, tensor: torch.Tensor, *, target: int) -> None:
        """Raise GroupMisuse: there is no other rank."""
        check_peer("send", tensor, target, rank=0, size=1)

    def receive_(self, tensor: torch.Tensor, *, source: int) -> None:
        """Raise GroupMisuse: there is no other rank."""
        check_peer("receive_", tensor, source, rank=0, size=1)

    def broadcast_(self, tensor: torch.Tensor, *, source: int = 0) -> None:
        """Leave `tensor` as it is."""
        check_source("broadcast_", tensor, source, self.size)

    def barrier(self) -> None:
        """Return at once."""

    def start_all_reduce_(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> Pending:
        """`all_reduce_`, which is done at once."""
        self.all_reduce_(tensor, op=op)
        return Done(tensor)

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """`all_gather`, which is done at once."""
        return Done(self.all_gather(tensor))

    def start_all_to_all(self, tensor: torch.Tensor) -> Pending:
        """`all_to_all`, which is done at once."""
        return Done(self.all_to_all(tensor))

    def start_gather_columns(self, tensor: torch.Tensor, widths: Sequence[int]) -> Pending:
        """`tensor` itself, at once."""
        check_columns("gather_columns", tensor, widths, rank=self.rank)
        return Done(tensor)

    def settle(self) -> None:
        """Return at once."""

    def subgroup(self, ranks: Sequence[int]) -> Group | None:
        """Itself: `ranks` can only be `[0]`."""
        check_members(ranks, range(self.size), is_whole=True)
        return self

    @property
    def control(self) -> Group:
        """Itself."""
        return self


class Done:
    """A collective that was complete when it was started."""

    __slots__ = ("_result",)

    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def wait(self) -> torch.Tensor:
        """Result, at once."""
        return self._result

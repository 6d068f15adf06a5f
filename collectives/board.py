"""Where threads that stand for ranks meet: on a board all post, and from it all read.

Owns which posts belong together (a rank's n-th post belongs to round n), and what the others see
when a rank fails, leaves or is late. Refuses to know what is computed from the posts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from collectives.errors import GroupMisuse, PeerLost

Call = tuple[str, object, tuple[int, ...], torch.dtype]


class Posted:
    """One round: what each rank called and brought; guarded by its board, and never changed."""

    __slots__ = ("by_rank", "num_ranks")

    def __init__(self, num_ranks: int) -> None:
        self.by_rank: dict[int, tuple[Call, torch.Tensor]] = {}
        self.num_ranks = num_ranks

    @property
    def is_full(self) -> bool:
        """Whether every rank has posted."""
        return len(self.by_rank) == self.num_ranks


class Board:
    """Meeting point of the ranks of one group, and of the groups made from it.

    `ranks` are the members in the whole job's numbering. All state is guarded by one condition,
    which the boards made from this one share: a rank that fails or leaves does so on all of them.
    """

    def __init__(self, ranks: Sequence[int], timeout_s: float, whole: Board | None = None) -> None:
        self.ranks = tuple(ranks)
        self._whole = self if whole is None else whole
        self._timeout_s = timeout_s
        self._changed: threading.Condition = (
            threading.Condition() if whole is None else whole._changed
        )
        self._control: Board | None = None
        self._parts: dict[int, Board] = {}
        self._num_parts = [0] * len(ranks)
        self._failure: BaseException | None = None
        self._left: set[int] = set()
        self._is_broken = False
        self._num_posted = [0] * len(ranks)
        self._open: dict[int, Posted] = {}
        self._in_flight: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def is_whole(self) -> bool:
        """Whether all ranks of the job are members."""
        return self.size == self._whole.size

    @property
    def failure(self) -> BaseException | None:
        """First error that a rank of the job ended with."""
        return self._whole._failure

    @property
    def control(self) -> Board:
        """Board of the same ranks for their small messages; its own on such a board."""
        with self._changed:
            if self._control is None:
                self._control = Board(self.ranks, self._timeout_s, self._whole)
                self._control._control = self._control
            return self._control

    def make_part(self, rank: int, members: Sequence[int]) -> Board:
        """Board of some of the ranks: the n-th that one rank makes is the n-th of all."""
        with self._changed:
            part_idx = self._num_parts[rank]
            self._num_parts[rank] += 1
            if part_idx not in self._parts:
                ranks = [self.ranks[member] for member in members]
                self._parts[part_idx] = Board(ranks, self._timeout_s, self._whole)
            return self._parts[part_idx]

    def fail(self, error: BaseException) -> None:
        """Wake all that wait; the first error is kept."""
        with self._changed:
            if self._whole._failure is None:
                self._whole._failure = error
            self._changed.notify_all()

    def leave(self, rank: int) -> None:
        """Note that a rank of the whole job has ended and takes part in nothing any more."""
        with self._changed:
            self._whole._left.add(rank)
            self._changed.notify_all()

    def post(self, rank: int, call: Call, tensor: torch.Tensor) -> Posted:
        """Lay down a rank's part of its next round; GroupMisuse where the ranks disagree.

        On a board that has lost a rank nothing is laid down, and no round ends any more.
        """
        with self._changed:
            round_idx = self._num_posted[rank]
            self._num_posted[rank] += 1
            posted = self._open.setdefault(round_idx, Posted(self.size))
            if self._is_broken:
                return posted
            _check_agreement(posted, rank, call)
            posted.by_rank[rank] = (call, tensor)
            if posted.is_full:
                del self._open[round_idx]
                self._changed.notify_all()
            return posted

    def collect(self, rank: int, operation: str, posted: Posted) -> list[torch.Tensor]:
        """Wait until every rank has posted; their tensors, in rank order."""
        with self._changed:
            others = [peer for peer in range(self.size) if peer != rank]
            self._wait_for(
                lambda: posted.is_full,
                rank=rank,
                operation=operation,
                peers=others,
                find_late=lambda: [peer for peer in others if peer not in posted.by_rank],
            )
            return [posted.by_rank[peer][1] for peer in range(self.size)]

    def send(self, tensor: torch.Tensor, *, source: int, target: int) -> None:
        """Lay a tensor down for `target` and wait until it is taken."""
        with self._changed:
            self._in_flight[source, target] = tensor
            self._changed.notify_all()
            self._wait_for(
                lambda: self._in_flight.get((source, target)) is not tensor,
                rank=source,
                operation="send",
                peers=(target,),
                find_late=lambda: [target],
            )

    def receive_(self, tensor: torch.Tensor, *, source: int, target: int) -> None:
        """Wait for what `source` lays down, and take it into `tensor`."""
        with self._changed:
            self._wait_for(
                lambda: (source, target) in self._in_flight,
                rank=target,
                operation="receive_",
                peers=(source,),
                find_late=lambda: [source],
            )
            sent = self._in_flight.pop((source, target))
            self._changed.notify_all()
        if (sent.shape, sent.dtype) != (tensor.shape, tensor.dtype):
            raise GroupMisuse(
                f"receive_: {_describe(sent)} came from rank {source}; limit the receiver's "
                f"{_describe(tensor)}; use one shape and dtype on both"
            )
        tensor.copy_(sent)

    def _wait_for(
        self,
        is_done: Callable[[], bool],
        *,
        rank: int,
        operation: str,
        peers: Sequence[int],
        find_late: Callable[[], Sequence[int]],
    ) -> None:
        """Wait with the lock held; PeerLost when a peer has failed, left or is late."""

        def find_left() -> list[int]:
            return [peer for peer in peers if self.ranks[peer] in self._whole._left]

        def is_lost() -> bool:
            has_failed = self._is_broken or self.failure is not None
            return has_failed or bool(find_left())

        self._changed.wait_for(lambda: is_done() or is_lost(), self._timeout_s)
        if is_done():
            return
        known, cause = find_late(), "timed out"
        if find_left():
            known, cause = find_left(), "it ended"
        elif is_lost():
            known, cause = (), "another rank failed"
        # As with processes, a group that lost a rank is not used again.
        self._is_broken = True
        self._changed.notify_all()
        raise PeerLost(
            rank=self.ranks[rank],
            operation=operation,
            peer=self.ranks[known[0]] if len(known) == 1 else None,
            timeout_s=self._timeout_s,
            cause=cause,
        )


def _check_agreement(posted: Posted, rank: int, call: Call) -> None:
    for peer, (other, _) in sorted(posted.by_rank.items()):
        if call != other:
            raise GroupMisuse(
                f"{call[0]}: rank {rank} called {call} where rank {peer} called {other}; limit the "
                "same on all ranks; call the same collectives in the same order"
            )


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

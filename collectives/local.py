"""Ranks as threads of one process: the twin of the distributed group, for property tests.

Owns the meeting point of the threads (a board on which all post and from which all read) and what
happens when one of them fails. Refuses to know processes and the network. Sums add in rank order,
so that results do not depend on who came first. A send waits for its receive, which is the
strictest that a `Group` allows: what works here does not dead-lock elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import reduce
from typing import TypeVar

import torch

from collectives.errors import GroupMisuse, PeerLost
from collectives.group import (
    Group,
    Reduction,
    check_peer,
    check_reduction,
    check_rows,
    check_source,
    check_tensor,
)

T = TypeVar("T")
_DEFAULT_TIMEOUT_S = 30.0


def run_threads(
    size: int, work: Callable[[Group], T], *, timeout_s: float = _DEFAULT_TIMEOUT_S
) -> list[T]:
    """Run `work` once a rank, each in a thread of its own; results in rank order.

    Where a rank raises, all that wait for it are woken with PeerLost and the first error is raised.
    `timeout_s` is the deadline of each operation, and of the other ranks once one has failed.
    """
    if size < 1:
        raise GroupMisuse(f"run_threads: {size} ranks; limit 1 or more; give a positive size")
    board = _Board(size, timeout_s)
    executor = ThreadPoolExecutor(size, thread_name_prefix="rank")
    try:
        futures = [executor.submit(_run_rank, board, rank, work) for rank in range(size)]
        wait(futures, return_when=FIRST_EXCEPTION)
        if board.failure is not None:
            wait(futures, timeout=timeout_s)
            raise board.failure
        return [future.result() for future in futures]
    finally:
        executor.shutdown(wait=False)


def _run_rank(board: _Board, rank: int, work: Callable[[Group], T]) -> T:
    try:
        return work(ThreadGroup(board, rank))
    except BaseException as error:
        board.fail(error)
        raise
    finally:
        board.leave(rank)


class ThreadGroup:
    """One thread's view of the group; made by `run_threads` alone."""

    __slots__ = ("_board", "_rank")

    def __init__(self, board: _Board, rank: int) -> None:
        self._board = board
        self._rank = rank

    @property
    def rank(self) -> int:
        """This thread's place, from 0 to `size - 1`."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of threads."""
        return self._board.size

    def all_reduce_(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> None:
        """Overwrite `tensor` on every rank with the reduction, made in rank order."""
        check_reduction("all_reduce_", tensor, op)
        tensor.copy_(_reduce(self._exchange("all_reduce_", tensor, op), op))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every rank the tensors of all: `[...]` becomes `[size, ...]`, in rank order."""
        check_tensor("all_gather", tensor)
        return torch.stack(self._exchange("all_gather", tensor))

    def reduce_scatter(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> torch.Tensor:
        """Reduce `[size, ...]` in rank order and give rank r row r, `[...]`."""
        check_reduction("reduce_scatter", tensor, op)
        check_rows("reduce_scatter", tensor, self.size)
        posted = self._exchange("reduce_scatter", tensor, op)
        return _reduce([rows[self.rank] for rows in posted], op).clone()

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send row r of `[size, ...]` to rank r; row r of the result came from rank r."""
        check_rows("all_to_all", tensor, self.size)
        return torch.stack([rows[self.rank] for rows in self._exchange("all_to_all", tensor)])

    def send(self, tensor: torch.Tensor, *, target: int) -> None:
        """Give `tensor` to rank `target` and return once that has taken it."""
        check_peer("send", tensor, target, self)
        self._board.send(tensor.detach().clone(), source=self.rank, target=target)

    def receive_(self, tensor: torch.Tensor, *, source: int) -> None:
        """Overwrite `tensor` with what rank `source` sent."""
        check_peer("receive_", tensor, source, self)
        self._board.receive_(tensor, source=source, target=self.rank)

    def broadcast_(self, tensor: torch.Tensor, *, source: int = 0) -> None:
        """Overwrite `tensor` on every rank with that of rank `source`."""
        check_source("broadcast_", tensor, source, self.size)
        tensor.copy_(self._exchange("broadcast_", tensor, source)[source])

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._exchange("barrier", torch.empty(0))

    def _exchange(
        self, operation: str, tensor: torch.Tensor, option: object = None
    ) -> list[torch.Tensor]:
        call = (operation, option, tuple(tensor.shape), tensor.dtype)
        return self._board.exchange(self.rank, call, tensor.detach().clone())


_Call = tuple[str, object, tuple[int, ...], torch.dtype]


class _Board:
    """Where the threads meet. All state is guarded by `_changed`; tensors on it are never written.

    A rank reads `_read` before it posts again, and no round ends before all have posted: the last
    round's tensors stand until everyone has read them.
    """

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self.failure: BaseException | None = None
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._left: set[int] = set()
        self._is_broken = False
        self._num_rounds = 0
        self._posted: dict[int, tuple[_Call, torch.Tensor]] = {}
        self._read: list[torch.Tensor] = []
        self._in_flight: dict[tuple[int, int], torch.Tensor] = {}

    def fail(self, error: BaseException) -> None:
        """Wake all that wait; the first error is kept."""
        with self._changed:
            if self.failure is None:
                self.failure = error
            self._changed.notify_all()

    def leave(self, rank: int) -> None:
        """Note that a rank has ended and takes part in nothing any more."""
        with self._changed:
            self._left.add(rank)
            self._changed.notify_all()

    def exchange(self, rank: int, call: _Call, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Post a tensor and return those of all ranks, in rank order."""
        with self._changed:
            this_round = self._num_rounds
            self._posted[rank] = (call, tensor)
            if len(self._posted) == self.size and not self._is_broken:
                self._end_round()
            others = tuple(peer for peer in range(self.size) if peer != rank)
            self._wait_for(
                lambda: self._num_rounds > this_round, rank=rank, operation=call[0], peers=others
            )
            return self._read

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
            )

    def receive_(self, tensor: torch.Tensor, *, source: int, target: int) -> None:
        """Wait for what `source` lays down, and take it into `tensor`."""
        with self._changed:
            self._wait_for(
                lambda: (source, target) in self._in_flight,
                rank=target,
                operation="receive_",
                peers=(source,),
            )
            sent = self._in_flight.pop((source, target))
            self._changed.notify_all()
        if (sent.shape, sent.dtype) != (tensor.shape, tensor.dtype):
            raise GroupMisuse(
                f"receive_: {_describe(sent)} came from rank {source}; limit the receiver's "
                f"{_describe(tensor)}; use one shape and dtype on both"
            )
        tensor.copy_(sent)

    def _end_round(self) -> None:
        first, _ = self._posted[0]
        for rank, (call, _) in sorted(self._posted.items()):
            if call != first:
                raise GroupMisuse(
                    f"{call[0]}: rank {rank} called {call} where rank 0 called {first}; limit the "
                    "same on all ranks; call the same collectives in the same order"
                )
        self._read = [self._posted[rank][1] for rank in range(self.size)]
        self._posted = {}
        self._num_rounds += 1
        self._changed.notify_all()

    def _wait_for(
        self, is_done: Callable[[], bool], *, rank: int, operation: str, peers: Sequence[int]
    ) -> None:
        """Wait with the lock held; PeerLost when a peer has failed, left or is late."""

        def is_lost() -> bool:
            has_failed = self._is_broken or self.failure is not None
            return has_failed or not self._left.isdisjoint(peers)

        self._changed.wait_for(lambda: is_done() or is_lost(), self._timeout_s)
        if is_done():
            return
        late: Sequence[int] = (
            [peer for peer in peers if peer not in self._posted] if len(peers) > 1 else peers
        )
        known, cause = late, "timed out"
        if not self._left.isdisjoint(peers):
            known, cause = sorted(self._left.intersection(peers)), "it ended"
        elif is_lost():
            known, cause = (), "another rank failed"
        # As with processes, a group that lost a rank is not used again.
        self._is_broken = True
        self._changed.notify_all()
        raise PeerLost(
            rank=rank,
            operation=operation,
            peer=known[0] if len(known) == 1 else None,
            timeout_s=self._timeout_s,
            cause=cause,
        )


def _reduce(tensors: Sequence[torch.Tensor], op: Reduction) -> torch.Tensor:
    return reduce(torch.add if op == "sum" else torch.maximum, tensors)


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

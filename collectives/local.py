"""Ranks as threads of one process: the twin of the distributed group, for property tests.

Owns what the group computes from what all have posted on its board (`board.py`). Refuses to know
processes and the network. Sums add in rank order, so that results do not depend on who came first.
A send waits for its receive, which is the strictest that a `Group` allows: what works here does not
dead-lock elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import reduce
from typing import TypeVar

import torch

from collectives.board import Board
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
from collectives.columns import SideBySide
from collectives.errors import GroupMisuse
from collectives.group import Group, Pending, SoloGroup
from collectives.messages import ByteMessages

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
    board = Board(range(size), timeout_s)
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


def _run_rank(board: Board, rank: int, work: Callable[[Group], T]) -> T:
    try:
        return work(ThreadGroup(board, rank))
    except BaseException as error:
        board.fail(error)
        raise
    finally:
        board.leave(rank)


class ThreadGroup(ByteMessages):
    """One thread's view of the group; made by `run_threads`, and by `subgroup` of such a group."""

    __slots__ = ("_board", "_rank")

    def __init__(self, board: Board, rank: int) -> None:
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

    @property
    def control(self) -> Group:
        """Group of the same threads with a board of its own."""
        return ThreadGroup(self._board.control, self.rank)

    def all_reduce_(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> None:
        """Overwrite `tensor` on every rank with the reduction, made in rank order."""
        self.start_all_reduce_(tensor, op=op).wait()

    def start_all_reduce_(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> Pending:
        """Begin `all_reduce_`; the result is `tensor` itself."""
        check_reduction("all_reduce_", tensor, op)
        return self._start(
            "all_reduce_", tensor, lambda posted: tensor.copy_(_reduce(posted, op)), option=op
        )

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every rank the tensors of all: `[...]` becomes `[size, ...]`, in rank order."""
        return self.start_all_gather(tensor).wait()

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """Begin `all_gather`."""
        check_tensor("all_gather", tensor)
        return self._start("all_gather", tensor, torch.stack)

    def reduce_scatter(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> torch.Tensor:
        """Reduce `[size, ...]` in rank order and give rank r row r, `[...]`."""
        check_reduction("reduce_scatter", tensor, op)
        check_rows("reduce_scatter", tensor, self.size)
        return self._start(
            "reduce_scatter",
            tensor,
            lambda posted: _reduce([rows[self.rank] for rows in posted], op).clone(),
            option=op,
        ).wait()

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send row r of `[size, ...]` to rank r; row r of the result came from rank r."""
        return self.start_all_to_all(tensor).wait()

    def start_all_to_all(self, tensor: torch.Tensor) -> Pending:
        """Begin `all_to_all`."""
        check_rows("all_to_all", tensor, self.size)
        return self._start(
            "all_to_all",
            tensor,
            lambda posted: torch.stack([rows[self.rank] for rows in posted]),
        )

    def start_gather_columns(self, tensor: torch.Tensor, widths: Sequence[int]) -> Pending:
        """Begin to put the tensors of all side by side."""
        check_columns("gather_columns", tensor, widths, rank=self.rank)
        return SideBySide(self, tensor, widths)

    def send(self, tensor: torch.Tensor, *, target: int) -> None:
        """Give `tensor` to rank `target` and return once that has taken it."""
        check_peer("send", tensor, target, rank=self.rank, size=self.size)
        self._board.send(tensor.detach().clone(), source=self.rank, target=target)

    def receive_(self, tensor: torch.Tensor, *, source: int) -> None:
        """Overwrite `tensor` with what rank `source` sent."""
        check_peer("receive_", tensor, source, rank=self.rank, size=self.size)
        self._board.receive_(tensor, source=source, target=self.rank)

    def broadcast_(self, tensor: torch.Tensor, *, source: int = 0) -> None:
        """Overwrite `tensor` on every rank with that of rank `source`."""
        check_source("broadcast_", tensor, source, self.size)
        self._start(
            "broadcast_", tensor, lambda posted: tensor.copy_(posted[source]), option=source
        ).wait()

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._start("barrier", torch.empty(0), torch.stack).wait()

    def settle(self) -> None:
        """Return at once: what was waited for is done."""

    def subgroup(self, ranks: Sequence[int]) -> Group | None:
        """Group of some of the ranks, ascending; None on a rank that is not among them.

        Every rank of the whole job must call it, with the same ranks and in the same order.
        """
        check_members(ranks, self._board.ranks, is_whole=self._board.is_whole)
        members = tuple(ranks)
        # Ranks that disagree are told, as they would not be by separate processes.
        self._start("subgroup", torch.empty(0), torch.stack, option=members).wait()
        board = self._board.make_part(self.rank, members)
        if self.rank not in members:
            return None
        if len(members) == 1:
            return SoloGroup()
        return ThreadGroup(board, members.index(self.rank))

    def _start(
        self,
        operation: str,
        tensor: torch.Tensor,
        combine: Callable[[list[torch.Tensor]], torch.Tensor],
        *,
        option: object = None,
    ) -> _Flight:
        call = (operation, option, tuple(tensor.shape), tensor.dtype)
        posted = self._board.post(self.rank, call, tensor.detach().clone())
        return _Flight(lambda: combine(self._board.collect(self.rank, operation, posted)))


class _Flight:
    """What a rank has posted; the others' posts are awaited, and combined, in `wait`."""

    __slots__ = ("_finish", "_result")

    def __init__(self, finish: Callable[[], torch.Tensor]) -> None:
        self._finish: Callable[[], torch.Tensor] | None = finish
        self._result: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """Result; raises PeerLost. A second call gives the same."""
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        assert self._result is not None
        return self._result


def _reduce(tensors: Sequence[torch.Tensor], op: Reduction) -> torch.Tensor:
    return reduce(torch.add if op == "sum" else torch.maximum, tensors)

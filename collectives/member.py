"""What a rank of torch.distributed is in a group, whatever it then does there.

Owns the life of a process group, its subgroups and neighbours, how an operation is begun and ended,
and that a lost or late rank becomes `PeerLost`. Refuses to know which operations there are.
After a loss the group is not used again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self, cast

import torch
import torch.distributed as dist

from collectives import backend
from collectives.checks import check_members
from collectives.errors import GroupMisuse, PeerLost
from collectives.flight import Flight
from collectives.group import Group, SoloGroup
from collectives.liveness import await_gone
from collectives.messages import ByteMessages
from collectives.neighbours import Brought, Neighbours, open_neighbours
from collectives.pipes import Silence
from collectives.watch import Launched, Unfinished, await_all, drop_completed

_MAX_UNSETTLED = 256
# For the ranks of this machine: connections close a moment before their process has ended.
_PATIENCE_S = 1.0


class GroupMember(ByteMessages):
    """Ranks as processes; made by `bootstrap.join`, and by `subgroup` of such a group.

    `ranks` are the members in the whole job's numbering, ascending. `processes` are all ranks of
    the job, as `liveness` describes them. `control` is the gloo group of the same ranks; a control
    group is made without one and is its own. One thread calls a group.
    """

    __slots__ = (
        "_control",
        "_device",
        "_handle",
        "_is_device_apart",
        "_lost",
        "_made",
        "_neighbours",
        "_processes",
        "_rank",
        "_ranks",
        "_timeout_s",
        "_unsettled",
    )

    def __init__(
        self,
        handle: dist.ProcessGroup,
        *,
        ranks: Sequence[int],
        device: torch.device,
        timeout_s: float,
        processes: Sequence[bytes] = (),
        control: Self | None = None,
    ) -> None:
        self._handle = handle
        self._rank = handle.rank()
        self._ranks = tuple(ranks)
        self._device = device
        self._is_device_apart = device.type == "cuda"
        self._timeout_s = timeout_s
        self._processes = processes
        self._control = control
        self._neighbours: Neighbours | None = None
        self._made = [] if control is None else [control]
        self._lost: PeerLost | None = None
        self._unsettled: deque[Launched] = deque()

    @property
    def rank(self) -> int:
        """This rank's place in the group, from 0 to `size - 1`."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self._ranks)

    @property
    def device(self) -> torch.device:
        """Device that the tensors of every call must be on."""
        return self._device

    @property
    def is_broken(self) -> bool:
        """Whether a rank was lost, after which every call raises the same PeerLost."""
        return self._lost is not None

    @property
    def control(self) -> Self:
        """Gloo group of the same ranks, for small messages; its own on a control group."""
        return self if self._control is None else self._control

    def settle(self) -> None:
        """Return once all that was started is done; on a CPU what was waited for already is."""
        if self._lost is not None:
            raise self._lost
        if self._is_device_apart:
            self._unsettled.append(
                Launched(operation="settle", peer=None, work=backend.StreamEnd())
            )
        try:
            await_all(self._unsettled, timeout_s=self._timeout_s)
        except Unfinished as error:
            raise self._lose(error.operation, error, peer=error.peer) from error
        finally:
            self._unsettled.clear()

    def subgroup(self, ranks: Sequence[int]) -> Self | SoloGroup | None:
        """Group of some of the ranks, ascending; None on a rank that is not among them.

        Every rank of the whole job must call it, with the same ranks and in the same order, the
        other ranks included; so a subgroup has no subgroups. Raises GroupMisuse and PeerLost.
        """
        check_members(ranks, self._ranks, is_whole=self.size == dist.get_world_size())
        if len(ranks) == 1:
            return SoloGroup() if self.rank == ranks[0] else None
        control = self._make(ranks, backend.CPU, control=None)
        return self._make(ranks, self._device, control=control)

    def find_neighbours(self) -> None:
        """Go past gloo from now on, where all ranks are on one machine; every rank must call it."""
        if not self._is_device_apart:
            self._neighbours = open_neighbours(
                cast(Group, self.control),  # which has the operations of its class
                processes=[self._processes[rank] for rank in self._ranks],
                timeout_s=self._timeout_s,
            )

    def forget(self) -> None:
        """Let go of the process groups, this one's and its subgroups', which are destroyed.

        While something holds one, its threads live on, and may outlive the interpreter.
        """
        for group in self._made:
            group.forget()
        self._made.clear()
        if self._neighbours is not None:
            self._neighbours.close()
        if hasattr(self, "_handle"):
            del self._handle

    def _make(
        self, ranks: Sequence[int], device: torch.device, *, control: Self | None
    ) -> Self | None:
        if self._lost is not None:
            raise self._lost
        try:
            handle = backend.make_handle(ranks, device=device, timeout_s=self._timeout_s)
        except RuntimeError as error:
            raise self._lose("subgroup", error) from error
        if handle is None:
            return None
        made = type(self)(
            handle,
            ranks=ranks,
            device=device,
            timeout_s=self._timeout_s,
            processes=self._processes,
            control=control,
        )
        made.find_neighbours()
        self._made.append(made)
        return made

    def _start(
        self,
        operation: str,
        call: Callable[[], dist.Work | None],
        tensor: torch.Tensor,
        *,
        result: torch.Tensor,
        peer: int | None = None,
    ) -> Flight:
        """Begin an operation of torch.distributed whose other arguments are known to be right."""
        self._check_open(operation, tensor)
        try:
            work = call()
        except RuntimeError as error:
            raise self._lose(operation, error, peer=peer) from error
        assert work is not None
        # A captured operation has not run: the graph's replay is watched by its stream's end.
        if self._is_device_apart and not torch.cuda.is_current_stream_capturing():
            self._unsettled.append(
                Launched(operation=operation, peer=peer, work=backend.NcclWork(work))
            )
            drop_completed(self._unsettled, max_left=_MAX_UNSETTLED)
        finish = partial(self._finish, operation, work, peer=peer)
        return Flight(result=result, held=tensor, finish=finish)

    def _check_open(self, operation: str, tensor: torch.Tensor) -> None:
        if tensor.device != self._device:
            raise GroupMisuse(
                f"{operation}: tensor on {tensor.device}; limit {self._device}, the group's "
                "device; move the tensor there, and let bytes go over the control group"
            )
        if self._lost is not None:
            raise self._lost
        if not hasattr(self, "_handle"):
            raise GroupMisuse(
                f"{operation}: the group was left; limit the time between join and its end; "
                "join again"
            )

    def _start_near(
        self,
        operation: str,
        tensor: torch.Tensor,
        result: torch.Tensor,
        places: Sequence[torch.Tensor],
        *,
        row: int = 0,
        most_bytes: int | None = None,
        then: Callable[[], None] | None = None,
    ) -> Flight:
        """Begin to fill each rank's place with the row of what it brings, and `then` go on.

        most_bytes: the most that a rank brings, where that is not what all do.
        """
        self._check_open(operation, tensor)
        assert self._neighbours is not None
        most = tensor.nbytes if most_bytes is None else most_bytes
        try:
            brought = self._neighbours.bring(tensor, most_bytes=most)
        except Silence as error:
            raise self._lose(operation, error, peer=error.rank) from error
        finish = partial(self._collect, operation, brought, places, row, then)
        return Flight(result=result, held=None, finish=finish)

    def _collect(
        self,
        operation: str,
        brought: Brought,
        places: Sequence[torch.Tensor],
        row: int,
        then: Callable[[], None] | None,
    ) -> None:
        if self._lost is not None:
            raise self._lost
        assert self._neighbours is not None
        try:
            self._neighbours.collect(brought, places, row=row)
        except Silence as error:
            raise self._lose(operation, error, peer=error.rank) from error
        if then is not None:
            then()

    def _finish(self, operation: str, work: dist.Work, *, peer: int | None) -> None:
        if self._lost is not None:
            raise self._lost
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lose(operation, error, peer=peer) from error

    def _lose(self, operation: str, error: Exception, *, peer: int | None = None) -> PeerLost:
        """Note that the group is broken; the error to raise, now and from every later call."""
        self._lost = PeerLost(
            rank=self._ranks[self.rank],
            operation=operation,
            peer=self._find_lost() if peer is None else self._ranks[peer],
            timeout_s=self._timeout_s,
            cause=backend.first_sentence(error),
        )
        return self._lost

    def _find_lost(self) -> int | None:
        """The one rank of the job that must be, or can be seen to be, lost; None if unknown."""
        if self.size == 2:
            return self._ranks[1 - self.rank]
        members = [rank for rank in self._ranks if rank < len(self._processes)]
        gone = await_gone([self._processes[rank] for rank in members], patience_s=_PATIENCE_S)
        return members[gone[0]] if len(gone) == 1 else None

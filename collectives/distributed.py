"""The group over torch.distributed: gloo between processes on CPUs, NCCL between GPUs.

Owns the mapping of a `Group` onto a process group, and that a lost or late rank becomes `PeerLost`.
Refuses to make process groups other than subgroups of its own: `bootstrap.join` does that.

The deadline is the process group's: gloo and NCCL (with blocking wait, which `bootstrap` sets)
raise when it has passed. After that the connections are closed, so the group is not used again.
Sums are added in the backend's order, the same in every run on one number of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from collectives.errors import GroupMisuse, PeerLost
from collectives.group import (
    Group,
    Reduction,
    SoloGroup,
    check_peer,
    check_reduction,
    check_rows,
    check_source,
    check_tensor,
)

# torch 2.13 gave the two new names, and warns about the old ones; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_SOURCE_LINE = re.compile(r"^\[[^\]]*\] ?")


class DistributedGroup:
    """Ranks as processes; made by `bootstrap.join`, and by `subgroup` of such a group.

    `ranks` are the members in the whole job's numbering, ascending. All operations run on the
    caller's thread and, on a GPU, its current stream.
    """

    __slots__ = ("_device", "_handle", "_lost", "_rank", "_ranks", "_timeout_s")

    def __init__(
        self,
        handle: dist.ProcessGroup,
        *,
        ranks: Sequence[int],
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._handle = handle
        self._rank = handle.rank()
        self._ranks = tuple(ranks)
        self._device = device
        self._timeout_s = timeout_s
        self._lost: PeerLost | None = None

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

    def all_reduce_(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> None:
        """Overwrite `tensor` on every rank with the reduction over all ranks."""
        check_reduction("all_reduce_", tensor, op)
        self._check_device("all_reduce_", tensor)
        self._run("all_reduce_", lambda: dist.all_reduce(tensor, _OPS[op], group=self._handle))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every rank the tensors of all: `[...]` becomes `[size, ...]`, in rank order."""
        check_tensor("all_gather", tensor)
        self._check_device("all_gather", tensor)
        gathered = tensor.new_empty((self.size, *tensor.shape))
        self._run(
            "all_gather",
            lambda: _all_gather(gathered.view(-1), tensor.view(-1), group=self._handle),
        )
        return gathered

    def reduce_scatter(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> torch.Tensor:
        """Reduce `[size, ...]` over the ranks and give rank r row r, `[...]`."""
        check_reduction("reduce_scatter", tensor, op)
        check_rows("reduce_scatter", tensor, self.size)
        self._check_device("reduce_scatter", tensor)
        row = tensor.new_empty(tensor.shape[1:])
        self._run(
            "reduce_scatter",
            lambda: _reduce_scatter(row.view(-1), tensor.view(-1), _OPS[op], group=self._handle),
        )
        return row

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send row r of `[size, ...]` to rank r; row r of the result came from rank r."""
        check_rows("all_to_all", tensor, self.size)
        self._check_device("all_to_all", tensor)
        received = torch.empty_like(tensor)
        self._run(
            "all_to_all",
            lambda: dist.all_to_all_single(received.view(-1), tensor.view(-1), group=self._handle),
        )
        return received

    def send(self, tensor: torch.Tensor, *, target: int) -> None:
        """Give `tensor` to rank `target`; small ones may be on their way when it returns."""
        check_peer("send", tensor, target, self)
        self._check_device("send", tensor)
        self._run(
            "send", lambda: dist.send(tensor, group=self._handle, group_dst=target), peer=target
        )

    def receive_(self, tensor: torch.Tensor, *, source: int) -> None:
        """Overwrite `tensor` with what rank `source` sent."""
        check_peer("receive_", tensor, source, self)
        self._check_device("receive_", tensor)
        self._run(
            "receive_", lambda: dist.recv(tensor, group=self._handle, group_src=source), peer=source
        )

    def broadcast_(self, tensor: torch.Tensor, *, source: int = 0) -> None:
        """Overwrite `tensor` on every rank with that of rank `source`."""
        check_source("broadcast_", tensor, source, self.size)
        self._check_device("broadcast_", tensor)
        self._run(
            "broadcast_", lambda: dist.broadcast(tensor, group=self._handle, group_src=source)
        )

    def barrier(self) -> None:
        """Return once every rank has called it."""
        # A reduction rather than dist.barrier, which on NCCL guesses a device of its own.
        token = torch.zeros(1, device=self._device)
        self._run("barrier", lambda: dist.all_reduce(token, group=self._handle))
        token.item()

    def subgroup(self, ranks: Sequence[int]) -> Group | None:
        """Group of some of the ranks, ascending; None on a rank that is not among them.

        Every rank of the whole job must call it, with the same ranks and in the same order, the
        other ranks included; so a subgroup has no subgroups. Raises GroupMisuse and PeerLost.
        """
        self._check_members(ranks)
        if len(ranks) == 1:
            return SoloGroup() if self.rank == ranks[0] else None
        made: list[dist.ProcessGroup] = []
        timeout = timedelta(seconds=self._timeout_s)
        self._run("subgroup", lambda: made.append(dist.new_group(list(ranks), timeout=timeout)))
        if self.rank not in ranks:
            return None
        return DistributedGroup(
            made[0], ranks=ranks, device=self._device, timeout_s=self._timeout_s
        )

    def _run(self, operation: str, call: Callable[[], object], *, peer: int | None = None) -> None:
        """Make a call of torch.distributed whose arguments are known to be right."""
        if self._lost is not None:
            raise self._lost
        try:
            call()
        except RuntimeError as error:
            if peer is None and self.size == 2:
                peer = 1 - self.rank
            self._lost = PeerLost(
                rank=self._ranks[self.rank],
                operation=operation,
                peer=None if peer is None else self._ranks[peer],
                timeout_s=self._timeout_s,
                cause=first_sentence(error),
            )
            raise self._lost from error

    def _check_device(self, what: str, tensor: torch.Tensor) -> None:
        if tensor.device != self._device:
            raise GroupMisuse(
                f"{what}: tensor on {tensor.device}; limit {self._device}, the group's device; "
                "move the tensor there"
            )

    def _check_members(self, ranks: Sequence[int]) -> None:
        is_whole = len(self._ranks) == dist.get_world_size()
        is_ascending = list(ranks) == sorted(set(ranks)) and len(ranks) > 0
        if not is_whole or not is_ascending or not 0 <= ranks[0] <= ranks[-1] < self.size:
            raise GroupMisuse(
                f"subgroup: ranks {list(ranks)} of {list(self._ranks)}; limit ascending ranks of "
                "the whole job's group; make subgroups from the group that join gave"
            )


def first_sentence(error: Exception) -> str:
    """What a library's error says, without its source line, stack and advice."""
    text = _SOURCE_LINE.sub("", " ".join(str(error).split()))
    return text.split(". ", maxsplit=1)[0].rstrip(".") or type(error).__name__

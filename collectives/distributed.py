"""The group over torch.distributed: gloo between processes on CPUs, NCCL between GPUs.

Owns the mapping of a `Group`'s operations onto a process group and onto neighbours. Refuses to know
how a group begins and ends, and how ranks are lost (`member.py`).

Every operation is started asynchronously and waited for; the blocking forms do both. On a CPU gloo
works in threads of its own, and a wait raises when the deadline has passed; between the ranks of
one machine, gathers, all-to-all and sums go past it (`neighbours.py`). On a GPU NCCL runs on a
stream of its own beside the caller's: a wait orders the caller's stream after it and costs the host
nothing, so neither launching ahead nor overlap is lost. What became of it the host learns in
`settle`, which looks at each operation in turn and raises where nothing has ended within the
deadline; kernels that wait for a lost rank leave the GPU when `join` is left. After a loss the
group is not used again. Sums are added in the backend's order, the same in every run on one number
of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from collectives import backend
from collectives.checks import (
    Reduction,
    check_columns,
    check_peer,
    check_reduction,
    check_rows,
    check_source,
    check_tensor,
)
from collectives.columns import SideBySide
from collectives.group import Pending
from collectives.member import GroupMember


class DistributedGroup(GroupMember):
    """The operations; what becomes of a rank is `member.py`'s affair. One thread calls a group."""

    __slots__ = ()

    def all_reduce_(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> None:
        """Overwrite `tensor` on every rank with the reduction over all ranks."""
        self.start_all_reduce_(tensor, op=op).wait()

    def start_all_reduce_(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> Pending:
        """Begin `all_reduce_`; the result is `tensor` itself."""
        check_reduction("all_reduce_", tensor, op)
        if self._neighbours is not None:
            rows = tensor.new_empty((self.size, *tensor.shape))
            then = partial(_reduce, tensor, rows, op)
            return self._start_near("all_reduce_", tensor, tensor, list(rows), then=then)
        return self._start(
            "all_reduce_",
            lambda: dist.all_reduce(tensor, backend.OPS[op], group=self._handle, async_op=True),
            tensor,
            result=tensor,
        )

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every rank the tensors of all: `[...]` becomes `[size, ...]`, in rank order."""
        return self.start_all_gather(tensor).wait()

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """Begin `all_gather`."""
        check_tensor("all_gather", tensor)
        gathered = tensor.new_empty((self.size, *tensor.shape))
        if self._neighbours is not None:
            return self._start_near("all_gather", tensor, gathered, list(gathered))
        return self._start(
            "all_gather",
            lambda: backend.all_gather(
                gathered.view(-1), tensor.view(-1), group=self._handle, async_op=True
            ),
            tensor,
            result=gathered,
        )

    def reduce_scatter(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> torch.Tensor:
        """Reduce `[size, ...]` over the ranks and give rank r row r, `[...]`."""
        check_reduction("reduce_scatter", tensor, op)
        check_rows("reduce_scatter", tensor, self.size)
        row = tensor.new_empty(tensor.shape[1:])
        return self._start(
            "reduce_scatter",
            lambda: backend.reduce_scatter(
                row.view(-1), tensor.view(-1), backend.OPS[op], group=self._handle, async_op=True
            ),
            tensor,
            result=row,
        ).wait()

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send row r of `[size, ...]` to rank r; row r of the result came from rank r."""
        return self.start_all_to_all(tensor).wait()

    def start_all_to_all(self, tensor: torch.Tensor) -> Pending:
        """Begin `all_to_all`."""
        check_rows("all_to_all", tensor, self.size)
        received = torch.empty_like(tensor)
        if self._neighbours is not None:
            rows = list(received)
            return self._start_near("all_to_all", tensor, received, rows, row=self.rank)
        return self._start(
            "all_to_all",
            lambda: dist.all_to_all_single(
                received.view(-1), tensor.view(-1), group=self._handle, async_op=True
            ),
            tensor,
            result=received,
        )

    def start_gather_columns(self, tensor: torch.Tensor, widths: Sequence[int]) -> Pending:
        """Begin to put the tensors of all side by side."""
        check_columns("gather_columns", tensor, widths, rank=self.rank)
        if self._neighbours is None:
            return SideBySide(self, tensor, widths)
        num_tokens = tensor.shape[0]
        joined = tensor.new_empty(num_tokens, sum(widths))
        places = torch.split(joined, list(widths), dim=1)
        most_bytes = num_tokens * max(widths) * tensor.element_size()
        return self._start_near("gather_columns", tensor, joined, places, most_bytes=most_bytes)

    def send(self, tensor: torch.Tensor, *, target: int) -> None:
        """Give `tensor` to rank `target`; small ones may be on their way when it returns."""
        check_peer("send", tensor, target, rank=self.rank, size=self.size)
        self._start(
            "send",
            lambda: dist.isend(tensor, group=self._handle, group_dst=target),
            tensor,
            result=tensor,
            peer=target,
        ).wait()

    def receive_(self, tensor: torch.Tensor, *, source: int) -> None:
        """Overwrite `tensor` with what rank `source` sent."""
        check_peer("receive_", tensor, source, rank=self.rank, size=self.size)
        self._start(
            "receive_",
            lambda: dist.irecv(tensor, group=self._handle, group_src=source),
            tensor,
            result=tensor,
            peer=source,
        ).wait()

    def broadcast_(self, tensor: torch.Tensor, *, source: int = 0) -> None:
        """Overwrite `tensor` on every rank with that of rank `source`."""
        check_source("broadcast_", tensor, source, self.size)
        self._start(
            "broadcast_",
            lambda: dist.broadcast(tensor, group=self._handle, group_src=source, async_op=True),
            tensor,
            result=tensor,
        ).wait()

    def barrier(self) -> None:
        """Return once every rank has called it; on a GPU the host waits, too."""
        # A reduction rather than dist.barrier, which on NCCL guesses a device of its own.
        token = torch.zeros(1, device=self._device)
        if self._neighbours is not None:
            rows = list(token.new_empty(self.size, 1))
            self._start_near("barrier", token, token, rows).wait()
            return
        self._start(
            "barrier",
            lambda: dist.all_reduce(token, group=self._handle, async_op=True),
            token,
            result=token,
        ).wait()
        self.settle()


def _reduce(tensor: torch.Tensor, rows: torch.Tensor, op: Reduction) -> None:
    """Overwrite a tensor with the reduction of all ranks' `[size, ...]`, added in rank order."""
    tensor.copy_(rows[0])
    for row in rows[1:]:
        if op == "sum":
            tensor.add_(row)
        else:
            torch.maximum(tensor, row, out=tensor)

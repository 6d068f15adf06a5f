"""Collectives as methods of a Group, which every caller gets as an argument.

Owns what a collective promises (shapes, effects, who must call), the checks that every group makes
before it moves anything, and the group of one rank. Refuses to know attention and the mesh's
meaning. There is no default group and no ambient state.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from collectives.errors import GroupMisuse

Reduction = Literal["sum", "max"]
REDUCTIONS = ("sum", "max")
MOVABLE = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class Group(Protocol):
    """Ranks that call the same collectives in the same order; every one must call each of them.

    Tensors are contiguous, on the group's device, of one shape and one dtype of `MOVABLE` on all
    ranks. A sum's order of addition is the group's own: who needs the same bits on another number
    of ranks gathers, and adds in an order of his own. `max` promises nothing about NaN.
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


class SoloGroup:
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
        check_peer("send", tensor, target, self)

    def receive_(self, tensor: torch.Tensor, *, source: int) -> None:
        """Raise GroupMisuse: there is no other rank."""
        check_peer("receive_", tensor, source, self)

    def broadcast_(self, tensor: torch.Tensor, *, source: int = 0) -> None:
        """Leave `tensor` as it is."""
        check_source("broadcast_", tensor, source, self.size)

    def barrier(self) -> None:
        """Return at once."""


def check_tensor(what: str, tensor: torch.Tensor) -> None:
    """Raise GroupMisuse where no group could move the tensor."""
    if not tensor.is_contiguous():
        raise GroupMisuse(
            f"{what}: tensor with strides {tuple(tensor.stride())}; limit contiguous memory; "
            "call .contiguous() first"
        )
    if tensor.dtype not in MOVABLE:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in MOVABLE)
        raise GroupMisuse(
            f"{what}: dtype {tensor.dtype}; limit {names}; view the tensor as one of them"
        )


def check_reduction(what: str, tensor: torch.Tensor, op: str) -> None:
    """Raise GroupMisuse where the tensor cannot be reduced by `op`."""
    check_tensor(what, tensor)
    if op not in REDUCTIONS:
        raise GroupMisuse(
            f"{what}: reduction {op!r}; limit {' or '.join(REDUCTIONS)}; choose one of them"
        )
    if tensor.dtype == torch.bool:
        raise GroupMisuse(f"{what}: dtype torch.bool; limit numbers; reduce a uint8 tensor by max")


def check_rows(what: str, tensor: torch.Tensor, size: int) -> None:
    """Raise GroupMisuse unless the tensor can be moved and has one row a rank."""
    check_tensor(what, tensor)
    rows = tensor.shape[0] if tensor.dim() else 0
    if rows != size:
        raise GroupMisuse(
            f"{what}: {rows} rows; limit {size}, one a rank; reshape the tensor to [size, ...]"
        )


def check_source(what: str, tensor: torch.Tensor, source: int, size: int) -> None:
    """Raise GroupMisuse unless the tensor can be moved and `source` is a rank."""
    check_tensor(what, tensor)
    if not 0 <= source < size:
        raise GroupMisuse(
            f"{what}: source {source}; limit 0 to {size - 1}; name a rank of the group"
        )


def check_peer(what: str, tensor: torch.Tensor, peer: int, group: Group) -> None:
    """Raise GroupMisuse unless the tensor can be moved and `peer` is another rank."""
    check_tensor(what, tensor)
    if peer == group.rank or not 0 <= peer < group.size:
        raise GroupMisuse(
            f"{what}: peer {peer} of rank {group.rank}; limit 0 to {group.size - 1} but itself; "
            "name another rank of the group"
        )

"""Collectives as methods of a Group, which every caller gets as an argument.

Owns what a collective promises (shapes, effects, who must call) and the group of one rank. Refuses
to know attention and the mesh's meaning. There is no default group and no ambient state.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from collectives.errors import GroupMisuse

Reduction = Literal["sum", "max"]
REDUCTIONS = ("sum", "max")


class Group(Protocol):
    """Ranks that call the same collectives in the same order; every one must call each of them.

    Tensors are contiguous, on the group's device, and of one shape and dtype on all ranks.
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
        _check_contiguous("all_reduce_", tensor)
        _check_reduction("all_reduce_", op)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy of `[...]` as `[1, ...]`."""
        _check_contiguous("all_gather", tensor)
        return tensor.unsqueeze(0).clone()

    def reduce_scatter(self, tensor: torch.Tensor, *, op: Reduction = "sum") -> torch.Tensor:
        """Copy of the only row of `[1, ...]`."""
        _check_contiguous("reduce_scatter", tensor)
        _check_reduction("reduce_scatter", op)
        rows = tensor.shape[0] if tensor.dim() else 0
        if rows != self.size:
            raise GroupMisuse(
                f"reduce_scatter: {rows} rows; limit {self.size}, one a rank; "
                "reshape the tensor to [size, ...]"
            )
        return tensor[0].clone()

    def broadcast_(self, tensor: torch.Tensor, *, source: int = 0) -> None:
        """Leave `tensor` as it is."""
        _check_contiguous("broadcast_", tensor)
        if source != 0:
            raise GroupMisuse(
                f"broadcast_: source {source}; limit 0 to {self.size - 1}; name a rank of the group"
            )

    def barrier(self) -> None:
        """Return at once."""


def _check_contiguous(what: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise GroupMisuse(
            f"{what}: tensor with strides {tuple(tensor.stride())}; limit contiguous memory; "
            "call .contiguous() first"
        )


def _check_reduction(what: str, op: str) -> None:
    if op not in REDUCTIONS:
        raise GroupMisuse(
            f"{what}: reduction {op!r}; limit {' or '.join(REDUCTIONS)}; choose one of them"
        )

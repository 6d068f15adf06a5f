"""What every group checks before it moves anything, so that all refuse the same in the same words.

Owns which dtypes and reductions exist. Refuses to know any group: it sees tensors, ranks and sizes.
Each check raises GroupMisuse, and a group that has raised it stays usable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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


def check_columns(what: str, tensor: torch.Tensor, widths: Sequence[int], *, rank: int) -> None:
    """Raise GroupMisuse unless the tensor can be moved and has its rank's number of columns."""
    check_tensor(what, tensor)
    width = widths[rank] if rank < len(widths) else None
    if tensor.dim() != 2 or tensor.shape[1] != width:
        raise GroupMisuse(
            f"{what}: shape {tuple(tensor.shape)} on rank {rank}; limit [T, n] with n of "
            f"{list(widths)}, one a rank; give every rank the widths of all"
        )


def check_source(what: str, tensor: torch.Tensor, source: int, size: int) -> None:
    """Raise GroupMisuse unless the tensor can be moved and `source` is a rank."""
    check_tensor(what, tensor)
    if not 0 <= source < size:
        raise GroupMisuse(
            f"{what}: source {source}; limit 0 to {size - 1}; name a rank of the group"
        )


def check_peer(what: str, tensor: torch.Tensor, peer: int, *, rank: int, size: int) -> None:
    """Raise GroupMisuse unless the tensor can be moved and `peer` is another rank."""
    check_tensor(what, tensor)
    if peer == rank or not 0 <= peer < size:
        raise GroupMisuse(
            f"{what}: peer {peer} of rank {rank}; limit 0 to {size - 1} but itself; "
            "name another rank of the group"
        )


def check_members(ranks: Sequence[int], all_ranks: Sequence[int], *, is_whole: bool) -> None:
    """Raise GroupMisuse unless `ranks` are ascending members of the whole job's group."""
    is_ascending = list(ranks) == sorted(set(ranks)) and len(ranks) > 0
    if not is_whole or not is_ascending or not 0 <= ranks[0] <= ranks[-1] < len(all_ranks):
        raise GroupMisuse(
            f"subgroup: ranks {list(ranks)} of {list(all_ranks)}; limit ascending ranks of "
            "the whole job's group; make subgroups from the group that join gave"
        )

"""What every Group has to do, as checks that all of its ranks run together.

Values are small whole numbers, so that sums are exact in bfloat16 and in any order.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from collectives import Group, GroupMisuse
from collectives.group import Reduction

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (0, 3), (3, 5), (2, 1, 63), (65,))
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
OPS: tuple[Reduction, ...] = ("sum", "max")
Check = Callable[[Group, tuple[int, ...], torch.dtype], None]


def make_tensor(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings, known to all of them."""
    generator = torch.Generator().manual_seed(rank + 1)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def reduce_all(tensors: torch.Tensor, op: Reduction) -> torch.Tensor:
    """Reduction over the first axis, in whole numbers."""
    whole = tensors.to(torch.int64)
    return (whole.sum(0) if op == "sum" else whole.amax(0)).to(tensors.dtype)


def check_all_reduce(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    brought = torch.stack([make_tensor(rank, shape, dtype) for rank in range(group.size)])
    for op in OPS:
        tensor = brought[group.rank].clone()
        group.all_reduce_(tensor, op=op)
        assert torch.equal(tensor, reduce_all(brought, op))


def check_all_gather(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    brought = torch.stack([make_tensor(rank, shape, dtype) for rank in range(group.size)])
    mine = brought[group.rank].clone()
    gathered = group.all_gather(mine)
    assert gathered.dtype == dtype
    assert torch.equal(gathered, brought)
    gathered.zero_()
    assert torch.equal(mine, brought[group.rank])


def check_reduce_scatter(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = (group.size, *shape)
    brought = torch.stack([make_tensor(rank, rows, dtype) for rank in range(group.size)])
    for op in OPS:
        mine = brought[group.rank].clone()
        row = group.reduce_scatter(mine, op=op)
        assert row.shape == shape
        assert torch.equal(row, reduce_all(brought, op)[group.rank])
        assert torch.equal(mine, brought[group.rank])


def check_all_to_all(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = (group.size, *shape)
    brought = torch.stack([make_tensor(rank, rows, dtype) for rank in range(group.size)])
    received = group.all_to_all(brought[group.rank].clone())
    assert torch.equal(received, brought[:, group.rank])
    assert torch.equal(group.all_to_all(received), brought[group.rank])


def check_send_and_receive(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every ordered pair of ranks, two messages each, which must keep their order."""
    for source in range(group.size):
        for target in range(group.size):
            for message in range(2 if source != target else 0):
                sent = make_tensor(10 * source + message, shape, dtype)
                if group.rank == source:
                    group.send(sent, target=target)
                elif group.rank == target:
                    tensor = torch.zeros_like(sent)
                    group.receive_(tensor, source=source)
                    assert torch.equal(tensor, sent)


def check_broadcast(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for source in range(group.size):
        tensor = make_tensor(group.rank, shape, dtype)
        group.broadcast_(tensor, source=source)
        assert torch.equal(tensor, make_tensor(source, shape, dtype))
        group.barrier()


def check_masks_move(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Truth values are moved; minus infinity survives both moves and reductions."""
    mask = make_tensor(group.rank, shape, dtype) > 0
    gathered = group.all_gather(mask)
    assert torch.equal(gathered[group.rank], mask)
    if dtype.is_floating_point:
        lse = torch.full(shape, -torch.inf, dtype=dtype)
        group.all_reduce_(lse, op="max")
        assert bool((lse == -torch.inf).all())


def check_misuse(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What is refused is refused before anything moves: the group stays usable."""
    rows = torch.zeros((group.size, *shape), dtype=dtype)
    strided = torch.zeros(4, 6).t()
    calls: list[tuple[str, Callable[[], object]]] = [
        ("contiguous", lambda: group.all_reduce_(strided)),
        ("contiguous", lambda: group.all_gather(strided)),
        ("contiguous", lambda: group.reduce_scatter(strided)),
        ("contiguous", lambda: group.all_to_all(strided)),
        ("contiguous", lambda: group.broadcast_(strided)),
        ("contiguous", lambda: group.send(strided, target=0)),
        ("contiguous", lambda: group.receive_(strided, source=0)),
        ("complex64", lambda: group.all_gather(torch.zeros(1, dtype=torch.complex64))),
        ("torch.bool", lambda: group.all_reduce_(torch.zeros(1, dtype=torch.bool))),
        ("'mean'", lambda: group.reduce_scatter(rows, op="mean")),  # type: ignore[arg-type]
        ("one a rank", lambda: group.reduce_scatter(torch.zeros(group.size + 1))),
        ("one a rank", lambda: group.all_to_all(torch.zeros(()))),
        (f"source {group.size}", lambda: group.broadcast_(rows, source=group.size)),
        ("source -1", lambda: group.broadcast_(rows, source=-1)),
        ("but itself", lambda: group.send(rows, target=group.rank)),
        ("but itself", lambda: group.receive_(rows, source=group.rank)),
        ("another rank", lambda: group.send(rows, target=group.size)),
        ("another rank", lambda: group.receive_(rows, source=-1)),
    ]
    for text, call in calls:
        with pytest.raises(GroupMisuse, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)
    group.barrier()


CHECKS: tuple[Check, ...] = (
    check_all_reduce,
    check_all_gather,
    check_reduce_scatter,
    check_all_to_all,
    check_send_and_receive,
    check_broadcast,
    check_masks_move,
    check_misuse,
)


def check_contract(group: Group, check: Check) -> None:
    """One check at every shape and dtype."""
    for shape in SHAPES:
        for dtype in DTYPES:
            check(group, shape, dtype)

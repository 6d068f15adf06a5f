"""What every Group has to do, as checks that all of its ranks run together.

Values are small whole numbers, so that sums are exact in bfloat16 and in any order. The last shape
is large enough in two dtypes of three for memory that ranks of one machine share. Tensors are on
torch's default device, which a worker sets to its GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from collectives import Group, GroupMisuse, Pending, Reduction, SoloGroup

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (0, 3), (3, 5), (2, 1, 63), (65,), (9001,))
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
OPS: tuple[Reduction, ...] = ("sum", "max")
Check = Callable[[Group, tuple[int, ...], torch.dtype], None]


def make_tensor(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings, known to all of them."""
    generator = torch.Generator("cpu").manual_seed(rank + 1)
    values = torch.randint(-8, 9, shape, generator=generator, device="cpu")
    return values.to(dtype=dtype, device=torch.get_default_device())


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


def check_gather_columns(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Side by side, every rank with a width of its own, also none; two at a time."""
    num_tokens = torch.Size(shape).numel()
    widths = [(3 * rank + 2) % 5 for rank in range(group.size)]
    brought = [make_tensor(rank, (num_tokens, n), dtype) for rank, n in enumerate(widths)]
    mine = brought[group.rank]
    first, second = (group.start_gather_columns(x, widths) for x in (mine, mine + 1))
    expected = torch.cat(brought, dim=1)
    assert torch.equal(second.wait(), expected + 1)
    assert torch.equal(first.wait(), expected)
    assert first.wait() is first.wait()
    with pytest.raises(GroupMisuse, match="the widths of all"):
        group.start_gather_columns(mine, [width + 1 for width in widths])
    with pytest.raises(GroupMisuse, match="the widths of all"):
        group.start_gather_columns(mine.flatten(), widths)


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


def check_started(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """All in flight at once; waited for in another order, and twice."""
    rows = (group.size, *shape)
    brought = torch.stack([make_tensor(rank, rows, dtype) for rank in range(group.size)])
    mine = brought[group.rank]
    reduced = mine.clone()
    started: list[Pending] = [
        group.start_all_gather(mine),
        group.start_all_reduce_(reduced, op="max"),
        group.start_all_to_all(mine.clone()),
        group.start_all_gather(mine.clone()),
    ]
    expected = [brought, reduce_all(brought, "max"), brought[:, group.rank], brought]
    for idx in (2, 0, 3, 1, 0, 1):
        assert torch.equal(started[idx].wait(), expected[idx])
    assert started[1].wait() is reduced
    assert started[0].wait() is started[0].wait()
    group.settle()


def check_misuse(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What is refused is refused before anything moves: the group stays usable."""
    rows = torch.zeros((group.size, *shape), dtype=dtype)
    strided = torch.zeros(4, 6).t()
    calls: list[tuple[str, Callable[[], object]]] = [
        ("contiguous", lambda: group.start_all_reduce_(strided)),
        ("contiguous", lambda: group.start_all_gather(strided)),
        ("contiguous", lambda: group.start_all_to_all(strided)),
        ("one a rank", lambda: group.start_all_to_all(torch.zeros(group.size + 1))),
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
    if group.rank == 0:
        calls.append(("None on rank 0", lambda: group.broadcast_bytes(None)))
    for text, call in calls:
        with pytest.raises(GroupMisuse, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)
    group.barrier()


def check_bytes(group: Group) -> None:
    """Any bytes of any length, over the group and over its control group."""
    messages = [bytes(range(256)) * rank + b"\n" * (rank % 2) for rank in range(group.size)]
    is_on_cpu = torch.get_default_device().type == "cpu"
    for each in ((group,) if is_on_cpu else ()) + (group.control, group.control.control):
        assert (each.rank, each.size) == (group.rank, group.size)
        assert each.all_gather_bytes(messages[each.rank]) == messages
        assert each.all_gather_bytes(b"") == [b""] * each.size
        for source in range(each.size):
            is_source = each.rank == source
            received = each.broadcast_bytes(messages[source] if is_source else None, source=source)
            assert received == messages[source]
            assert each.broadcast_bytes(b"\0" * each.rank, source=source) == b"\0" * source


def check_control_does_not_queue(group: Group) -> None:
    """Messages pass while a collective of the data group is in flight, and in any order with it."""
    started = group.start_all_gather(torch.full((3,), group.rank))
    assert group.control.all_gather_bytes(b"x") == [b"x"] * group.size
    assert started.wait()[:, 0].tolist() == list(range(group.size))
    group.control.barrier()
    group.barrier()


def check_subgroups(group: Group) -> None:
    """All members, each alone, the two halves, and all but one; ranks count anew in each."""
    everyone = list(range(group.size))
    half = (group.size + 1) // 2
    choices = [everyone, *([rank] for rank in everyone), everyone[:half]]
    choices += [ranks for ranks in (everyone[half:], everyone[1:]) if ranks]
    for ranks in choices:
        part = group.subgroup(ranks)
        assert (part is None) == (group.rank not in ranks)
        if part is None:
            continue
        assert (part.rank, part.size) == (ranks.index(group.rank), len(ranks))
        assert part.all_gather(torch.tensor(group.rank)).tolist() == ranks
        assert part.start_all_gather(torch.tensor([group.rank])).wait().flatten().tolist() == ranks
        names = part.control.all_gather_bytes(str(group.rank).encode())
        assert names == [str(rank).encode() for rank in ranks]
        if len(ranks) == 1:
            assert isinstance(part, SoloGroup)
        elif len(ranks) < group.size:
            with pytest.raises(GroupMisuse, match="make subgroups from the group that join gave"):
                part.subgroup([0])
    for ranks in ([], [group.size], [0, 0], [1, 0], [-1]):
        with pytest.raises(GroupMisuse, match="ascending ranks"):
            group.subgroup(ranks)
    group.barrier()


CHECKS: tuple[Check, ...] = (
    check_all_reduce,
    check_all_gather,
    check_reduce_scatter,
    check_all_to_all,
    check_gather_columns,
    check_send_and_receive,
    check_broadcast,
    check_masks_move,
    check_started,
    check_misuse,
)
CHECKS_ONCE: tuple[Callable[[Group], None], ...] = (
    check_bytes,
    check_control_does_not_queue,
    check_subgroups,
)


def check_contract(group: Group, check: Check) -> None:
    """One check at every shape and dtype."""
    for shape in SHAPES:
        for dtype in DTYPES:
            check(group, shape, dtype)

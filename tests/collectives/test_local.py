"""Threads that fail, leave or disagree wake the others with an error that names what happened."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectives import Group, GroupMisuse, PeerLost, run_threads


@given(st.integers(min_value=1, max_value=4), st.lists(st.sampled_from("rgsab"), max_size=8))
def test_any_sequence_of_collectives_ends(size: int, sequence: list[str]) -> None:
    def work(group: Group) -> torch.Tensor:
        tensor = torch.full((size,), float(group.rank))
        for step in sequence:
            if step == "r":
                group.all_reduce_(tensor, op="max")
            elif step == "g":
                tensor = group.all_gather(tensor)[:, 0].contiguous()
            elif step == "s":
                tensor = group.reduce_scatter(tensor, op="max").expand(size).contiguous()
            elif step == "a":
                tensor = group.all_to_all(tensor)
            else:
                group.broadcast_(tensor, source=size - 1)
        return tensor

    results = run_threads(size, work)
    assert all(result.shape == (size,) for result in results)
    if "b" in sequence[-1:]:
        assert all(torch.equal(result, results[0]) for result in results)


def test_sums_add_in_rank_order() -> None:
    values = torch.tensor([1e8, 1.0, -1e8, 1.0])
    in_order = ((values[0] + values[1]) + values[2]) + values[3]

    def work(group: Group) -> torch.Tensor:
        tensor = values[group.rank : group.rank + 1].clone()
        group.all_reduce_(tensor)
        return tensor

    for result in run_threads(4, work):
        assert result.item() == in_order.item()


@given(
    st.integers(min_value=1, max_value=3),
    st.lists(st.tuples(st.sampled_from("rga"), st.integers(0, 9)), max_size=8),
)
def test_started_collectives_end_in_any_order_of_waiting(
    size: int, sequence: list[tuple[str, int]]
) -> None:
    """Each rank waits in an order of its own; what was started in which order is the same."""

    def work(group: Group) -> list[list[float]]:
        brought = [
            torch.full((size,), float(10 * idx + group.rank)) for idx in range(len(sequence))
        ]
        started = [
            group.start_all_reduce_(tensor, op="max")
            if step == "r"
            else group.start_all_gather(tensor)
            if step == "g"
            else group.start_all_to_all(tensor)
            for (step, _), tensor in zip(sequence, brought, strict=True)
        ]
        order = sorted(
            range(len(started)), key=lambda idx: (sequence[idx][1] * (group.rank + 1)) % 7
        )
        for idx in order:
            started[idx].wait()
        return [pending.wait().flatten().tolist() for pending in started]

    ranks = [float(rank) for rank in range(size)]
    for results in run_threads(size, work):
        for idx, ((step, _), result) in enumerate(zip(sequence, results, strict=True)):
            base = 10.0 * idx
            if step == "r":
                assert result == [base + ranks[-1]] * size
            elif step == "g":
                assert result == [base + rank for rank in ranks for _ in ranks]
            else:
                assert result == [base + rank for rank in ranks]


def test_a_loss_is_seen_in_subgroups_and_named_in_the_numbering_of_the_job() -> None:
    def work(group: Group) -> None:
        part = group.subgroup([1, 3])
        if group.rank != 3 and part is not None:
            part.start_all_gather(torch.zeros(3)).wait()

    with pytest.raises(PeerLost, match=r"rank 1 lost rank 3 \(it ended\)") as caught:
        run_threads(4, work)
    assert (caught.value.rank, caught.value.operation) == (1, "all_gather")


def test_a_failure_wakes_those_that_wait_on_the_control_group() -> None:
    def work(group: Group) -> None:
        if group.rank == 1:
            raise ZeroDivisionError
        group.control.broadcast_bytes(None, source=1)

    with pytest.raises(ZeroDivisionError):
        run_threads(2, work)


def test_subgroups_of_other_ranks_are_refused() -> None:
    def work(group: Group) -> None:
        group.subgroup([0, 1] if group.rank else [0, 2])

    with pytest.raises(GroupMisuse, match="same on all ranks"):
        run_threads(3, work, timeout_s=5)


def test_a_rank_that_raises_wakes_the_others() -> None:
    woken: list[str] = []

    def work(group: Group) -> None:
        if group.rank == 1:
            raise ZeroDivisionError("rank 1 is at fault")
        try:
            group.barrier()
        except PeerLost as error:
            woken.append(error.operation)
            raise

    with pytest.raises(ZeroDivisionError, match="rank 1 is at fault"):
        run_threads(3, work)
    assert woken == ["barrier", "barrier"]


def test_a_rank_that_leaves_early_is_named() -> None:
    def work(group: Group) -> None:
        if group.rank != 2:
            group.all_gather(torch.zeros(3))

    with pytest.raises(PeerLost, match=r"lost rank 2 \(it ended\)") as caught:
        run_threads(3, work)
    assert (caught.value.operation, caught.value.peer) == ("all_gather", 2)


def test_a_late_rank_is_named_after_the_deadline() -> None:
    release = threading.Event()

    def work(group: Group) -> None:
        if group.rank == 0:
            release.wait(20)
            return
        try:
            group.receive_(torch.zeros(3), source=0)
        finally:
            release.set()

    with pytest.raises(PeerLost, match=r"receive_: rank 1 lost rank 0 \(timed out\)") as caught:
        run_threads(2, work, timeout_s=0.1)
    assert (caught.value.rank, caught.value.peer) == (1, 0)


def test_a_group_that_lost_a_rank_is_not_used_again() -> None:
    done = threading.Barrier(2)

    def work(group: Group) -> int:
        if group.rank == 0:
            with pytest.raises(PeerLost):
                group.barrier()
        done.wait(20)
        with pytest.raises(PeerLost, match="another rank failed"):
            group.all_gather(torch.zeros(2))
        done.wait(20)
        return group.rank

    assert run_threads(2, work, timeout_s=0.1) == [0, 1]


def test_two_ranks_that_both_send_first_are_told() -> None:
    def work(group: Group) -> None:
        group.send(torch.zeros(1), target=1 - group.rank)
        group.receive_(torch.zeros(1), source=1 - group.rank)

    with pytest.raises(PeerLost, match="send: rank"):
        run_threads(2, work, timeout_s=0.1)


@pytest.mark.parametrize("what", ["operation", "shape", "dtype", "op"])
def test_ranks_that_disagree_are_refused(what: str) -> None:
    def work(group: Group) -> None:
        differs = group.rank == 1
        if differs and what == "operation":
            group.broadcast_(torch.zeros(2))
        group.all_reduce_(
            torch.zeros(
                3 if differs and what == "shape" else 2,
                dtype=torch.int64 if differs and what == "dtype" else torch.float32,
            ),
            op="max" if differs and what == "op" else "sum",
        )

    with pytest.raises(GroupMisuse, match="same on all ranks"):
        run_threads(2, work)


def test_a_message_of_another_shape_is_refused() -> None:
    def work(group: Group) -> None:
        if group.rank == 0:
            group.send(torch.zeros(3), target=1)
        else:
            group.receive_(torch.zeros(4), source=0)

    with pytest.raises(GroupMisuse, match=r"\[3\] float32 came from rank 0"):
        run_threads(2, work)


def test_no_rank_is_refused() -> None:
    with pytest.raises(GroupMisuse, match="0 ranks"):
        run_threads(0, lambda group: group.rank)

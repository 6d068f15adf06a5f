"""Outboxes: what was posted is what is read, however late; memory is used again, never early."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from collectives import Group, neighbours, run_threads
from collectives.liveness import describe_process
from collectives.neighbours import Neighbours, open_neighbours
from collectives.shared_memory import Notice, Outboxes

MIB = 1 << 20


def content(rank: int, post: int, num_bytes: int) -> torch.Tensor:
    """What a rank posts, known to all."""
    generator = torch.Generator().manual_seed(1000 * post + rank)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def meet(group: Group) -> Neighbours | None:
    processes = [describe_process()] * group.size
    return open_neighbours(group.control, processes=processes, timeout_s=5.0)


def opened(group: Group) -> Outboxes:
    met = meet(group)
    assert met is not None
    return met._outboxes


def exchange(group: Group, notice: Notice) -> list[Notice]:
    """The notices of all ranks."""
    return [(a, b, c) for a, b, c in group.all_gather(torch.tensor(notice)).tolist()]


def check(outboxes: Outboxes, notices: list[Notice], post: int, num_bytes: int) -> None:
    """What every rank posted is there."""
    places = torch.empty(len(notices), num_bytes, dtype=torch.uint8)
    outboxes.read(notices, list(places))
    for rank, place in enumerate(places):
        assert torch.equal(place, content(rank, post, num_bytes))


def num_pieces(outboxes: Outboxes) -> int:
    return len(outboxes._pieces)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_posts_are_read_whole_in_any_order(size: int, seed: int) -> None:
    """Every rank takes in an order of its own, and leaves up to three posts in flight."""

    def work(group: Group) -> int:
        outboxes, mine = opened(group), random.Random(f"{seed} {group.rank}")
        sizes = random.Random(seed)
        flights: list[tuple[int, int, list[Notice]]] = []
        for post in range(40):
            num_bytes = sizes.choice([1, 4097, MIB, MIB + 1, 3 * MIB])
            post_idx, notice = outboxes.post(content(group.rank, post, num_bytes))
            assert post_idx == post
            flights.append((post, num_bytes, exchange(group, notice)))
            mine.shuffle(flights)
            while len(flights) > mine.randrange(4):
                done, width, notices = flights.pop()
                check(outboxes, notices, done, width)
                outboxes.take(done)
        return num_pieces(outboxes)

    # Three in flight here, three elsewhere, what others have not said yet; of three widths.
    assert max(run_threads(size, work)) <= 24


def test_a_rank_that_waits_as_it_goes_has_two_pieces() -> None:
    def work(group: Group) -> int:
        outboxes = opened(group)
        for post in range(20):
            post_idx, notice = outboxes.post(content(group.rank, post, MIB))
            check(outboxes, exchange(group, notice), post, MIB)
            outboxes.take(post_idx)
        return num_pieces(outboxes)

    assert run_threads(2, work) == [2, 2]


def test_what_one_rank_has_not_taken_is_not_written_again() -> None:
    def work(group: Group) -> None:
        outboxes = opened(group)
        _, notice = outboxes.post(content(group.rank, 0, 5000))
        first = exchange(group, notice)
        for post in range(1, 6):
            post_idx, notice = outboxes.post(content(group.rank, post, 5000))
            notices = exchange(group, notice)
            if group.rank == 0:  # the other takes nothing at all
                check(outboxes, notices, post, 5000)
                outboxes.take(post_idx)
        check(outboxes, first, 0, 5000)

    run_threads(2, work)


def test_where_one_rank_cannot_see_another_none_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank has no place of its own (another machine, no /proc): all fall back, none leaks."""
    before = len(os.listdir("/proc/self/fd"))

    def elsewhere() -> str | None:
        places.append("machine")
        return f"machine {len(places)}"

    places: list[str] = []
    monkeypatch.setattr(neighbours, "find_place", elsewhere)
    assert run_threads(3, meet) == [None, None, None]
    monkeypatch.setattr(neighbours, "find_place", lambda: None)
    assert run_threads(2, meet) == [None, None]
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_file_under_the_same_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(reversed(data))))
    assert run_threads(2, meet) == [None, None]


def test_nothing_is_left_open_after_close() -> None:
    before = len(os.listdir("/proc/self/fd"))

    def work(group: Group) -> None:
        met = meet(group)
        assert met is not None
        met.bring(content(group.rank, 0, MIB), most_bytes=MIB)
        group.barrier()
        met.close()

    run_threads(3, work)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "longspan-outbox" not in Path("/proc/self/maps").read_text(encoding="utf-8")

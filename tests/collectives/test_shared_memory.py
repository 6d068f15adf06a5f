"""Outboxes: what was posted is what is read, however late; memory is used again, never early."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from collectives import Group, run_threads, shared_memory
from collectives.shared_memory import Outboxes, open_outboxes

MIB = 1 << 20


def content(rank: int, post: int, num_bytes: int) -> torch.Tensor:
    """What a rank posts, known to all."""
    generator = torch.Generator().manual_seed(1000 * post + rank)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def opened(group: Group) -> Outboxes:
    outboxes = open_outboxes(group.control)
    assert outboxes is not None
    return outboxes


def check(outboxes: Outboxes, notices: torch.Tensor, post: int, num_bytes: int) -> None:
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
        flights: list[tuple[int, int, torch.Tensor]] = []
        for post in range(40):
            num_bytes = sizes.choice([1, 4097, MIB, MIB + 1, 3 * MIB])
            post_idx, notice = outboxes.post(content(group.rank, post, num_bytes))
            assert post_idx == post
            flights.append((post, num_bytes, group.all_gather(notice)))
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
            check(outboxes, group.all_gather(notice), post, MIB)
            outboxes.take(post_idx)
        return num_pieces(outboxes)

    assert run_threads(2, work) == [2, 2]


def test_what_one_rank_has_not_taken_is_not_written_again() -> None:
    def work(group: Group) -> None:
        outboxes = opened(group)
        _, notice = outboxes.post(content(group.rank, 0, 5000))
        first = group.all_gather(notice)
        for post in range(1, 6):
            post_idx, notice = outboxes.post(content(group.rank, post, 5000))
            notices = group.all_gather(notice)
            if group.rank == 0:  # the other takes nothing at all
                check(outboxes, notices, post, 5000)
                outboxes.take(post_idx)
        check(outboxes, first, 0, 5000)

    run_threads(2, work)


def test_where_one_rank_cannot_see_another_none_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank has no place of its own (another machine, no /proc): all fall back, none leaks."""
    before = len(os.listdir("/proc/self/fd"))

    def work(group: Group) -> Outboxes | None:
        return open_outboxes(group.control)

    def elsewhere() -> str | None:
        places.append("machine")
        return f"machine {len(places)}"

    places: list[str] = []
    monkeypatch.setattr(shared_memory, "find_place", elsewhere)
    assert run_threads(3, work) == [None, None, None]
    monkeypatch.setattr(shared_memory, "find_place", lambda: None)
    assert run_threads(2, work) == [None, None]
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_file_under_the_same_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: Group) -> Outboxes | None:
        return open_outboxes(group.control)

    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(reversed(data))))
    assert run_threads(2, work) == [None, None]


def test_nothing_is_left_open_after_close() -> None:
    before = len(os.listdir("/proc/self/fd"))

    def work(group: Group) -> None:
        outboxes = opened(group)
        outboxes.post(content(group.rank, 0, MIB))
        group.barrier()
        outboxes.close()

    run_threads(3, work)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "longspan-outbox" not in Path("/proc/self/maps").read_text(encoding="utf-8")

"""Inboxes: messages arrive whole, once, in any order of waiting; silence has a name and a limit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from collectives import Group, run_threads
from collectives.liveness import describe_process
from collectives.neighbours import Neighbours, open_neighbours
from collectives.pipes import MAX_MESSAGE_BYTES, Inbox, Silence


def meet(group: Group, *, timeout_s: float = 10.0) -> Neighbours:
    met = open_neighbours(
        group.control, processes=[describe_process()] * group.size, timeout_s=timeout_s
    )
    assert met is not None
    return met


def content(rank: int, operation: int) -> bytes:
    chosen = random.Random(f"{rank} {operation}")
    return chosen.randbytes(chosen.choice([0, 1, 7, 500, MAX_MESSAGE_BYTES]))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_messages_arrive_whole_and_in_any_order_of_waiting(size: int) -> None:
    def work(group: Group) -> None:
        inbox, mine = meet(group)._inbox, random.Random(group.rank)
        waiting: list[int] = []
        for operation in range(200):
            inbox.send(operation, content(group.rank, operation))
            waiting.append(operation)
            mine.shuffle(waiting)
            while len(waiting) > mine.randrange(8):
                done = waiting.pop()
                others = [rank for rank in range(size) if rank != group.rank]
                assert inbox.receive(done) == {rank: content(rank, done) for rank in others}
        for done in waiting:
            inbox.receive(done)
        assert not inbox._kept

    run_threads(size, work)


def test_two_ranks_that_fill_each_others_inboxes_do_not_wait_for_ever() -> None:
    """Far more than a pipe holds, before anybody receives anything."""
    num_messages = 1000

    def work(group: Group) -> None:
        inbox = meet(group)._inbox
        for operation in range(num_messages):
            inbox.send(operation, bytes([group.rank]) * MAX_MESSAGE_BYTES)
        other = 1 - group.rank
        for operation in range(num_messages):
            assert inbox.receive(operation) == {other: bytes([other]) * MAX_MESSAGE_BYTES}

    run_threads(2, work)


@pytest.mark.parametrize("num_values", [1, 1000, 1024, 100_000])
def test_small_and_large_tensors_take_their_own_way(num_values: int) -> None:
    def work(group: Group) -> bool:
        met = meet(group)
        brought = met.bring(torch.full((num_values,), float(group.rank)), most_bytes=4 * num_values)
        places = torch.empty(group.size, num_values)
        met.collect(brought, list(places))
        for rank, place in enumerate(places):
            assert bool((place == rank).all())
        return brought.post_idx is None

    is_small = 4 * num_values <= MAX_MESSAGE_BYTES
    assert run_threads(3, work) == [is_small] * 3


def test_a_rank_that_is_late_is_named_after_the_limit() -> None:
    def work(group: Group) -> None:
        inbox = meet(group, timeout_s=0.3)._inbox
        if group.rank != 1:
            inbox.send(0, b"here")
            began = time.monotonic()
            with pytest.raises(Silence, match="no message in time") as caught:
                inbox.receive(0)
            assert caught.value.rank == 1
            assert 0.3 <= time.monotonic() - began < 3
        group.barrier()

    run_threads(3, work)


def test_a_rank_that_leaves_is_named_at_once_but_what_it_said_counts() -> None:
    def work(group: Group) -> None:
        met = meet(group)
        met._inbox.send(0, bytes([group.rank]))
        if group.rank == 1:
            met.close()
        group.barrier()
        if group.rank == 1:
            return
        other = 2 - group.rank
        assert met._inbox.receive(0) == {1: b"\1", other: bytes([other])}
        met._inbox.send(1, b"")
        began = time.monotonic()
        with pytest.raises(Silence, match="has left") as caught:
            met._inbox.receive(1)
        assert caught.value.rank == 1
        assert time.monotonic() - began < 3
        group.barrier()

    def guarded(group: Group) -> None:
        work(group)
        if group.rank == 1:
            group.barrier()

    run_threads(3, guarded)


def test_a_process_that_has_ended_is_named_at_once() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", DESCRIBE], stdout=subprocess.PIPE, cwd=Path.cwd()
    )
    described, _ = child.communicate()
    reader, writer = os.pipe2(os.O_NONBLOCK)
    spare = os.dup(writer)  # the pipe stays open: only the process tells
    inbox = Inbox(
        reader, {1: writer}, rank=0, processes=[describe_process(), described], timeout_s=30.0
    )
    with pytest.raises(Silence, match="process has ended") as caught:
        inbox.receive(0)
    assert caught.value.rank == 1
    inbox.close()
    os.close(spare)


DESCRIBE = """
import sys
from collectives.liveness import describe_process
sys.stdout.buffer.write(describe_process())
"""

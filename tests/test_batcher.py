"""Which tokens take a step together, and that no question stands in another's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from orchestrator import batcher
from orchestrator.batcher import Batcher
from orchestrator.steps import Action, ForwardEach

WAIT_S = 20.0


@dataclass
class Steps:
    """Carries steps out when it is let: logits of a token are the token itself."""

    taken: list[dict[int, int]] = field(default_factory=list)
    began: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fault: Callable[[int], Exception | None] = lambda _: None

    def run(self, action: Action) -> Any:
        assert isinstance(action, ForwardEach)
        self.taken.append(dict(zip(action.question_ids, action.ids, strict=True)))
        self.began.release()
        assert self.go_on.acquire(timeout=WAIT_S)
        outcomes = [(self.fault(i), i) for i in action.ids]
        return [torch.tensor([float(i)]) if fault is None else fault for fault, i in outcomes]

    def let(self, count: int = 1) -> None:
        """Let so many steps begin and end, one after another."""
        for _ in range(count):
            assert self.began.acquire(timeout=WAIT_S)
            self.go_on.release()


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def wait_for_waiting(tokens: Batcher, count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while len(tokens._waiting) != count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def results(futures: list[Future[torch.Tensor]]) -> list[int]:
    return [int(future.result(WAIT_S)) for future in futures]


def test_what_comes_during_a_step_takes_the_next_one_together(
    steps: Steps, pool: ThreadPoolExecutor
) -> None:
    tokens = Batcher(steps.run, waits=False)
    first = pool.submit(tokens.forward, 5, 50)
    assert steps.began.acquire(timeout=WAIT_S)
    later = [pool.submit(tokens.forward, i, 10 * i) for i in (3, 1, 2)]
    wait_for_waiting(tokens, 3)
    steps.go_on.release()
    steps.let()
    assert results([first, *later]) == [50, 30, 10, 20]
    assert steps.taken == [{5: 50}, {1: 10, 2: 20, 3: 30}]
    assert list(steps.taken[1]) == [1, 2, 3]


def test_a_step_waits_for_those_that_took_the_last_one_and_for_nobody_who_left(
    steps: Steps, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "MAX_WAIT_S", WAIT_S)
    tokens = Batcher(steps.run, waits=True)
    tokens._expected, tokens._deadline = {1, 2, 3}, time.monotonic() + WAIT_S
    early = [pool.submit(tokens.forward, i, i) for i in (1, 2)]
    wait_for_waiting(tokens, 2)
    assert not steps.began.acquire(timeout=0.05)
    tokens.leave(3)
    steps.let()
    assert results(early) == [1, 2]
    assert steps.taken == [{1: 1, 2: 2}]


def test_a_slow_question_delays_the_others_once_and_for_a_bounded_time(
    steps: Steps, pool: ThreadPoolExecutor
) -> None:
    tokens = Batcher(steps.run, waits=True)
    tokens._expected = {1, 2}
    tokens._deadline = time.monotonic() + batcher.MAX_WAIT_S
    one = pool.submit(tokens.forward, 1, 7)
    steps.let()
    assert results([one]) == [7]
    assert tokens._expected == {1}
    assert tokens._deadline <= time.monotonic() + batcher.MAX_WAIT_S


def test_without_waiting_a_token_alone_steps_at_once(
    steps: Steps, pool: ThreadPoolExecutor
) -> None:
    tokens = Batcher(steps.run, waits=False)
    for token in (4, 5):
        one = pool.submit(tokens.forward, 1, token)
        steps.let()
        assert results([one]) == [token]
        assert tokens._expected == set()


def test_an_error_of_one_question_is_its_own(steps: Steps, pool: ThreadPoolExecutor) -> None:
    steps.fault = lambda token: ValueError("bad") if token == 20 else None
    tokens = Batcher(steps.run, waits=False)
    first = pool.submit(tokens.forward, 9, 90)
    assert steps.began.acquire(timeout=WAIT_S)
    later = [pool.submit(tokens.forward, i, 10 * i) for i in (1, 2, 3)]
    wait_for_waiting(tokens, 3)
    steps.go_on.release()
    steps.let()
    assert results([first, later[0], later[2]]) == [90, 10, 30]
    with pytest.raises(ValueError, match="bad"):
        later[1].result(WAIT_S)


def test_a_step_that_fails_fails_for_all_of_it_and_the_next_goes_on(
    steps: Steps, pool: ThreadPoolExecutor
) -> None:
    def fail(_: int) -> Exception | None:
        raise RuntimeError("gone")

    steps.fault = fail
    tokens = Batcher(steps.run, waits=True)
    tokens._expected, tokens._deadline = {1, 2}, time.monotonic() + WAIT_S
    both = [pool.submit(tokens.forward, i, i) for i in (1, 2)]
    steps.let()
    for future in both:
        with pytest.raises(RuntimeError, match="gone"):
            future.result(WAIT_S)
    steps.fault = lambda _: None
    tokens.leave(2)
    again = pool.submit(tokens.forward, 1, 8)
    steps.let()
    assert results([again]) == [8]


def test_many_questions_each_get_their_own_logits() -> None:
    """Steps of any composition; every question counts its own tokens."""

    def run(action: Action) -> Any:
        assert isinstance(action, ForwardEach)
        sizes.append(len(action.ids))
        time.sleep(0.0005)
        pairs = zip(action.question_ids, action.ids, strict=True)
        return [torch.tensor([1000.0 * question_id + token]) for question_id, token in pairs]

    def ask(question_id: int) -> list[int]:
        found = [int(tokens.forward(question_id, i)) for i in range(10 + question_id)]
        tokens.leave(question_id)
        return found

    sizes: list[int] = []
    tokens = Batcher(run, waits=True)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, range(6)))
    assert found == [[1000 * i + t for t in range(10 + i)] for i in range(6)]
    assert max(sizes) > 1
    assert sum(sizes) == sum(10 + i for i in range(6))

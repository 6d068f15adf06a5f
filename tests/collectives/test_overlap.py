"""Two computations in turns: what is in flight when, the same results, and ends that differ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectives import Group, PeerLost, SoloGroup, Steps, run_pair, run_steps, run_threads
from tests.collectives.overlap_steps import mix, noted


@pytest.fixture(name="events")
def make_events() -> list[str]:
    """What happens, in order."""
    return []


def test_each_half_computes_while_the_other_is_in_flight(events: list[str]) -> None:
    results = run_pair(noted("a", 2, events), noted("b", 2, events))
    assert results == ("a2", "b2")
    assert events == [
        *("a computes 0", "a starts 0", "b computes 0", "b starts 0"),
        *("a waits 0", "a computes 1", "a starts 1", "b waits 0", "b computes 1", "b starts 1"),
        *("a waits 1", "a computes 2", "a ends", "b waits 1", "b computes 2", "b ends"),
    ]


def test_alone_each_collective_is_waited_for_at_once(events: list[str]) -> None:
    assert run_steps(noted("a", 2, events)) == "a2"
    assert events == [
        *("a computes 0", "a starts 0", "a waits 0", "a computes 1", "a starts 1", "a waits 1"),
        *("a computes 2", "a ends"),
    ]


@given(st.integers(0, 5), st.integers(0, 5))
def test_either_may_end_first_and_the_first_is_never_behind(num_a: int, num_b: int) -> None:
    events: list[str] = []
    assert run_pair(noted("a", num_a, events), noted("b", num_b, events)) == (
        f"a{num_a}",
        f"b{num_b}",
    )
    for name, num_steps in (("a", num_a), ("b", num_b)):
        own = [event[2:] for event in events if event.startswith(name)]
        alone: list[str] = []
        run_steps(noted(name, num_steps, alone))
        assert own == [event[2:] for event in alone]
    for step in range(min(num_a, num_b) + 1):
        assert events.index(f"a computes {step}") < events.index(f"b computes {step}")
    # While one computes, at most the other's one collective is in flight.
    in_flight = 0
    for event in events:
        in_flight += ("starts" in event) - ("waits" in event)
        assert in_flight <= (1 if "computes" in event else 2)


@pytest.mark.parametrize("culprit", ["a", "b"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_failure_in_one_closes_the_other(culprit: str, step: int, events: list[str]) -> None:
    halves = [noted(name, 2, events, fails_at=step if name == culprit else -1) for name in "ab"]
    with pytest.raises(ZeroDivisionError):
        run_pair(halves[0], halves[1])
    other = "b" if culprit == "a" else "a"
    # A half that had not begun has nothing to tidy up, and one that had ended did so before.
    assert events.count(f"{culprit} ends") == 1
    assert events.count(f"{other} ends") == (0 if (culprit, step) == ("a", 0) else 1)
    for half in halves:
        with pytest.raises(StopIteration):
            next(half)


def test_a_lost_collective_closes_both(events: list[str]) -> None:
    class Lost:
        def wait(self) -> torch.Tensor:
            raise PeerLost(rank=0, operation="all_gather", peer=1, timeout_s=1, cause="it ended")

    def lose() -> Steps[str]:
        try:
            yield Lost()
        finally:
            events.append("closed")
        return "never"

    with pytest.raises(PeerLost, match="rank 0 lost rank 1"):
        run_pair(lose(), noted("b", 1, events))
    assert events[:2] == ["b computes 0", "b starts 0"]
    assert sorted(events[2:]) == ["b ends", "closed"]
    with pytest.raises(PeerLost):
        run_steps(lose())
    assert events[-1] == "closed"


@given(
    st.integers(min_value=1, max_value=3),
    st.lists(st.sampled_from("gra"), max_size=5),
    st.lists(st.sampled_from("gra"), max_size=5),
)
def test_a_pair_computes_what_each_computes_alone(
    size: int, first: list[str], second: list[str]
) -> None:
    def work(group: Group) -> bool:
        alone = run_steps(mix(group, first, 1.0)), run_steps(mix(group, second, 2.0))
        pair = run_pair(mix(group, first, 1.0), mix(group, second, 2.0))
        return all(map(torch.equal, alone, pair))

    assert run_threads(size, work) == [True] * size


def test_one_rank_is_no_exception() -> None:
    group = SoloGroup()
    pair = run_pair(mix(group, "gra", 1.0), mix(group, "r", 2.0))
    assert torch.equal(pair[0], run_steps(mix(group, "gra", 1.0)))
    assert torch.equal(pair[1], run_steps(mix(group, "r", 2.0)))


@given(st.integers(0, 4), st.integers(0, 4))
def test_all_ranks_start_in_one_order_whatever_their_clocks_do(num_a: int, num_b: int) -> None:
    def work(group: Group) -> list[str]:
        events: list[str] = []
        run_pair(
            noted("a", num_a, events, group=group, pause_s=1e-4 * group.rank),
            noted("b", num_b, events, group=group, pause_s=1e-4 * (2 - group.rank)),
        )
        return events

    assert len({tuple(events) for events in run_threads(3, work)}) == 1

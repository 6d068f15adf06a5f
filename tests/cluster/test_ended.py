"""Which rank failed first, and what is said about it."""

from __future__ import annotations

import pytest

from collectives import PeerLost
from orchestrator.cluster.ended import Ended, describe_failure, find_first_failure, shell_code


def lost(rank: int, peer: int | None) -> Ended:
    """A rank that ended because it lost a peer."""
    error = PeerLost(rank=rank, operation="barrier", peer=peer, timeout_s=3.0, cause="closed")
    return Ended(rank=rank, code=1, last_line=f"longspan: {error}")


BROKEN = Ended(rank=2, code=1, last_line="ValueError: rank 2 is broken")
STOPPED = Ended(rank=3, code=137, last_line="", was_stopped=True)
FINE = Ended(rank=4, code=0, last_line="longspan: nothing to complain about")


@pytest.mark.parametrize(
    ("ended", "rank"),
    [
        ([FINE, lost(0, 2), BROKEN, STOPPED], 2),
        ([FINE, lost(0, None), lost(1, 0)], 0),
        ([lost(1, None), STOPPED], 3),
        ([FINE, STOPPED], 3),
        ([FINE], None),
        ([], None),
    ],
)
def test_causes_come_before_consequences(ended: list[Ended], rank: int | None) -> None:
    first = find_first_failure(ended)
    assert (None if first is None else first.rank) == rank


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (BROKEN, "rank 2 of 5 failed first, exit code 1: ValueError: rank 2 is broken; limit "),
        (STOPPED, "killed by SIGKILL after it did not end by itself: it said nothing; limit "),
        (lost(1, 0), "exit code 1: barrier: rank 1 lost rank 0 (closed); limit 3 s an operation; "),
    ],
)
def test_a_failure_is_one_line(end: Ended, text: str) -> None:
    line = describe_failure(end, num_ranks=5)
    assert text in line
    assert "\n" not in line


def test_signals_count_from_128() -> None:
    assert [shell_code(code) for code in (0, 3, -9)] == [0, 3, 137]

"""How a rank ended, and which of several failed first: the one whose error is worth reading.

Owns that judgement. Refuses to know how ranks are started. A rank that lost a peer is a
consequence, and often the first to be gone: the culprit is the first that failed for a reason of
its own.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

_SIGNAL_BASE = 128
# The words of `collectives.errors.PeerLost`; a test holds the two together.
_PEER_LOST = re.compile(r": rank \d+ lost (rank \d+|a rank of its group) \(")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A rank that is gone. code: as a shell counts, 128 + n for signal n; last_line: of its stderr.

    was_stopped: it did not end by itself, although others had failed or the work was over.
    """

    rank: int
    code: int
    last_line: str
    was_stopped: bool = False

    @property
    def is_failure(self) -> bool:
        """Whether it failed by itself."""
        return self.code != 0 and not self.was_stopped

    @property
    def is_consequence(self) -> bool:
        """Whether it ended because another rank was lost."""
        return _PEER_LOST.search(self.last_line) is not None


def shell_code(returncode: int) -> int:
    """Exit code as a shell counts it, from Python's (negative for a signal)."""
    return returncode if returncode >= 0 else _SIGNAL_BASE - returncode


def find_first_failure(ended: Sequence[Ended]) -> Ended | None:
    """The rank that failed first, of ranks in the order in which they ended; None: none failed.

    Where no rank failed for a reason of its own, the others lost one that had to be stopped.
    """
    failures = [end for end in ended if end.is_failure]
    causes = [end for end in failures if not end.is_consequence]
    stopped = [end for end in ended if end.code != 0 and end.was_stopped]
    return next(iter(causes + stopped + failures), None)


def describe_failure(end: Ended, *, num_ranks: int) -> str:
    """One line: which rank, how it ended, what it said last; limit and remedy if it said none."""
    last_line = end.last_line.removeprefix("longspan: ") or "it said nothing"
    line = f"rank {end.rank} of {num_ranks} failed first, {_describe_code(end)}: {last_line}"
    if "; limit " in last_line:
        return line
    return f"{line}; limit exit code 0 on every rank; read what rank {end.rank} printed before"


def _describe_code(end: Ended) -> str:
    try:
        how = f"killed by {signal.Signals(end.code - _SIGNAL_BASE).name}"
    except ValueError:
        how = f"exit code {end.code}"
    return f"{how} after it did not end by itself" if end.was_stopped else how

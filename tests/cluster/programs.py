"""Programs that ranks of these tests run, and how a test sees whether a process is there.

`python -m tests.cluster.programs WHAT ...` supervises shells and is killed by its test.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.cluster.child import Command
from orchestrator.cluster.processes import Supervisor

DEADLINE_S = 25.0
# Writes its own id and that of a child, in a group of its own, to a file.
WITH_CHILD = (
    'set -m; sleep 1000 & echo "$$ $!" > "$PIDS.$RANK.new"; mv "$PIDS.$RANK.new" "$PIDS.$RANK"; '
)


def shell(script: str, *, rank: int = 0, **environ: str) -> Command:
    """A rank that is a shell."""
    path = {"PATH": os.environ["PATH"], "RANK": str(rank)}
    return Command(rank=rank, argv=("bash", "-c", script), environ={**path, **environ})


def read_pids(pids: Path, num_ranks: int = 1) -> list[int]:
    """Ids that WITH_CHILD wrote, once all ranks have."""
    files = [pids.with_name(f"{pids.name}.{rank}") for rank in range(num_ranks)]
    wait_until(lambda: all(file.exists() for file in files))
    return [int(word) for file in files for word in file.read_text(encoding="ascii").split()]


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return _read_state(pid) not in "ZX"


def is_stopped(pid: int) -> bool:
    """Whether a process is held by SIGSTOP."""
    return _read_state(pid) == "T"


def _read_state(pid: int) -> str:
    """The kernel's letter for what a process does, X where it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return stat.rpartition(")")[2].split()[0]


def children_of(pid: int) -> list[int]:
    """Ids of a process's children, whichever of its threads started them."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, file.read_text(encoding="ascii").split())
    return found


def find_processes(word: str, *, below: int | None = None) -> list[int]:
    """Descendants, of this process by default, that have a word in their command lines."""
    found, left = [], children_of(below or os.getpid())
    while left:
        pid = left.pop()
        try:
            left += children_of(pid)
            found += [pid] if word in read_words(pid, "cmdline") else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def read_words(pid: int, name: str) -> str:
    """Command line or environment of a process, with spaces between the words."""
    return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8").replace("\0", " ")


def wait_until(condition: Callable[[], bool], *, deadline_s: float = DEADLINE_S) -> None:
    """Wait for something that happens soon, or fail."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "it has not happened in time"
        time.sleep(0.01)


def wait_until_gone(pids: list[int]) -> None:
    """Wait until none of the processes runs, or fail."""
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def main() -> None:
    """Supervise two shells that have children, one of them stopped, until killed."""
    pids = sys.argv[1]
    scripts = (WITH_CHILD + "wait", WITH_CHILD + "kill -STOP $$")
    commands = [shell(script, rank=rank, PIDS=pids) for rank, script in enumerate(scripts)]
    with Supervisor(commands) as ranks:
        ranks.wait()


if __name__ == "__main__":
    main()

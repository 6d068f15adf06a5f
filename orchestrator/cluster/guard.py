"""A process that kills sessions when whoever started it is gone: `python guard.py`.

Owns nothing but the list that it reads on standard input: `+ID` a session to watch, `-ID` one that
has ended. When the input ends, by whatever death of its writer, the sessions that are left are
killed: grandchildren, stopped ones and those in groups of their own included. Imports nothing
heavy: it is run by path.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

# Who is killed may have forked just before.
_MAX_ROUNDS = 10
# Fields of /proc/PID/stat after the name, which alone may contain spaces.
_STATE, _SESSION = 0, 3


def read_sessions(lines: Iterable[str]) -> set[int]:
    """Sessions that were not taken back when the lines ended."""
    sessions: set[int] = set()
    for line in lines:
        change = sessions.add if line[0] == "+" else sessions.discard
        change(int(line[1:]))
    return sessions


def kill_session(session_id: int) -> None:
    """Kill every process of a session; none need be left."""
    for _ in range(_MAX_ROUNDS):
        members = list(_list_members(session_id))
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not members:
            return


def _list_members(session_id: int) -> Iterator[int]:
    """Ids of the processes of a session that have not ended."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with suppress(FileNotFoundError, ProcessLookupError):
            stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            fields = stat.rpartition(")")[2].split()
            if int(fields[_SESSION]) == session_id and fields[_STATE] not in "ZX":
                yield int(folder.name)


def main() -> int:
    """Wait for the input's end, then kill."""
    for session_id in read_sessions(sys.stdin):
        kill_session(session_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())

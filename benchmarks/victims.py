"""What row B7 needs of processes: start them marked, find a rank among them, see that all are gone.

Owns the mark, a variable that every descendant inherits, so that an orphan is found whoever its
parent is. Refuses to know what the processes are asked to do, and any bar.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from benchmarks.harness import ROOT

Executor = Literal["launch", "spawn", "ray"]
MARK = "LONGSPAN_B7_MARK"
# How the process of a rank other than rank 0 is called; under a launcher every rank is a command.
_NAMES: dict[Executor, str] = {
    "launch": "orchestrator",
    "spawn": "orchestrator.cluster.entry",
    "ray": "ray::RankActor.serve",
}
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """A running command, its mark, and the files that it prints to."""

    process: subprocess.Popen[bytes]
    mark: str
    executor: Executor
    stdout: IO[bytes]
    stderr: IO[bytes]

    def find_all(self) -> list[int]:
        """Ids of the command and of everything that came of it, zombies left out."""
        return [pid for pid in _list_pids() if self._is_ours(pid)]

    def find_rank(self, rank: int) -> int | None:
        """Id of a rank's process once it serves; of two ranks in all where Ray has them."""
        if rank == 0 and self.executor != "launch":
            return self.process.pid
        return next((pid for pid in self.find_all() if self._is_rank(pid, rank)), None)

    def read(self) -> tuple[str, list[str]]:
        """What it has printed: stdout, and the lines of stderr."""
        texts = [Path(file.name).read_text(encoding="utf-8") for file in (self.stdout, self.stderr)]
        return texts[0], texts[1].splitlines()

    def _is_rank(self, pid: int, rank: int) -> bool:
        words = _read(pid, "cmdline")
        if _NAMES[self.executor] not in words or "leash.py" in words or pid == self.process.pid:
            return False
        return self.executor == "ray" or f"\0RANK={rank}\0" in _read(pid, "environ")

    def _is_ours(self, pid: int) -> bool:
        return f"\0{MARK}={self.mark}\0" in _read(pid, "environ") and not _is_zombie(pid)


@contextmanager
def marked(
    *arguments: str, executor: Executor, environ: Mapping[str, str] | None = None
) -> Iterator[Marked]:
    """The command `longspan`, started; whatever is left of it at the end is killed."""
    mark = secrets.token_hex(8)
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *arguments],
            cwd=ROOT,
            env={**os.environ, **(environ or {}), MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
        command = Marked(
            process=process, mark=mark, executor=executor, stdout=stdout, stderr=stderr
        )
        try:
            yield command
        finally:
            for pid in command.find_all():
                os.kill(pid, 9)
            process.wait()


def wait_for(condition: Callable[[], object], *, limit_s: float) -> float | None:
    """Seconds until the condition held; None where it did not within the limit."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > limit_s:
            return None
        time.sleep(_POLL_S)
    return time.monotonic() - began_s


def _list_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _read(pid: int, name: str) -> str:
    """A file of a process, empty where it is gone or somebody else's; \\0 around its words."""
    try:
        text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return f"\0{text}"


def _is_zombie(pid: int) -> bool:
    return _read(pid, "stat").rpartition(")")[2].split()[:1] in ([], ["Z"])

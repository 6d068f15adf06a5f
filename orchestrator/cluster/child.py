"""One leashed child process: its command, its streams, its end.

Owns starting it in a session of its own, so that its children end with it, and telling the guard.
Refuses to know that there are others, and when to end it: `processes.py` decides that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orchestrator.cluster import guard, leash
from orchestrator.cluster.ended import Ended, shell_code
from orchestrator.cluster.guard import kill_session
from orchestrator.cluster.labels import LabelledLines

# Isolated and without site-packages: up in milliseconds, whatever the environment says.
_PYTHON = (sys.executable, "-I", "-S")
_GUARD_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One rank's program and its whole environment. stdin: what it is given to read.

    label: what its lines are marked with; is_front: its standard input and output are this
    process's own, and only stderr is labelled; pass_fds: what it inherits beside those three.
    """

    rank: int
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    stdin: bytes = b""
    label: str = ""
    is_front: bool = False
    pass_fds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", f"rank {self.rank}")


class Guard:
    """The process that kills the sessions it was told about once this process is gone."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [*_PYTHON, str(Path(guard.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )

    def watch(self, session_id: int) -> None:
        """Add a session."""
        self._tell(f"+{session_id}\n")

    def forget(self, session_id: int) -> None:
        """Take back a session that has ended."""
        self._tell(f"-{session_id}\n")

    def close(self) -> None:
        """End the guard, which kills what was not taken back."""
        try:
            self._process.communicate(timeout=_GUARD_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        # If somebody killed the guard, each child is still on its leash.
        with suppress(BrokenPipeError):
            self._process.stdin.write(line.encode())


class Child:
    """A started command. pidfd: readable once it has ended; streams: what it prints, and where to.

    was_stopped: set by whoever ends it against its will.
    """

    def __init__(self, command: Command, watcher: Guard, echo: Callable[[str], object]) -> None:
        self.command = command
        self.was_stopped = False
        self._watcher = watcher
        self._process = _start(command)
        watcher.watch(self._process.pid)
        self.pidfd = os.pidfd_open(self._process.pid)
        self._errors = LabelledLines(command.label, echo)
        output = LabelledLines(command.label, echo)
        pairs = ((self._process.stdout, output), (self._process.stderr, self._errors))
        self.streams: list[tuple[IO[bytes], LabelledLines]] = [
            (stream, lines) for stream, lines in pairs if stream is not None
        ]
        _feed(self._process, command.stdin)

    def signal(self, number: int) -> None:
        """Signal it and its children, those apart that are in groups of their own."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def reap(self) -> int:
        """End its children, and it if need be; its exit code. The streams can still be read."""
        # Until it is reaped its id is nobody else's, and names its session.
        kill_session(self._process.pid)
        code = self._process.wait()
        self._watcher.forget(self._process.pid)
        os.close(self.pidfd)
        return code

    def close(self) -> None:
        """Close the streams, read or not."""
        for stream, lines in self.streams:
            lines.finish()
            stream.close()

    def describe(self) -> Ended:
        """How it ended."""
        return Ended(
            rank=self.command.rank,
            code=shell_code(self._process.wait()),
            last_line=self._errors.last_line,
            was_stopped=self.was_stopped,
        )


def _start(command: Command) -> subprocess.Popen[bytes]:
    channel = None if command.is_front else subprocess.PIPE
    return subprocess.Popen(
        [*_PYTHON, str(Path(leash.__file__)), str(os.getpid()), *command.argv],
        env=dict(command.environ),
        start_new_session=True,
        stdin=channel,
        stdout=channel,
        stderr=subprocess.PIPE,
        pass_fds=command.pass_fds,
        bufsize=0,
    )


def _feed(process: subprocess.Popen[bytes], text: bytes) -> None:
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.write(text)
        process.stdin.close()

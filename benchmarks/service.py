"""What the rows about the service share: `longspan serve` as a process of its own, and its end.

Owns starting it at a free port, waiting for its line, and stopping it as an operator would. Refuses
to know any bar.
"""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults import start
from benchmarks.harness import note

START_LIMIT_S, STOP_LIMIT_S = 300.0, 90.0
_URL = re.compile(r"http://(\S+):([0-9]+)")


@dataclass(kw_only=True)
class Served:
    """A running service. line: what it said when it began; code: how it ended, once it has."""

    process: subprocess.Popen[str]
    line: str = ""
    code: int | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        """Where it listens."""
        match = _URL.search(self.line)
        assert match is not None, self.line
        return int(match[2])

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def mesh(self) -> str:
        """The ranks that it runs on."""
        match = re.search(r"mesh (\S+),", self.line)
        return match[1] if match else "unknown"


@contextmanager
def serving(store: Path, *options: str, launcher: tuple[str, ...] = ()) -> Iterator[Served]:
    """Start a service, and end it with SIGTERM when the block is left.

    launcher: arguments of the command `longspan` before `serve`, such as `launch --nproc 2 -- ...`.
    """
    arguments = (*launcher, "serve", "--port", "0", "--store", str(store), *options)
    served = Served(process=start(*arguments, module="orchestrator"))
    is_up = threading.Event()
    # Its pipe must not fill.
    reader = threading.Thread(target=_read, args=(served, is_up), daemon=True)
    reader.start()
    try:
        if not is_up.wait(START_LIMIT_S) or not served.line:
            raise SystemExit(f"{' '.join(arguments)} did not begin: {served.lines}")
        yield served
    except BaseException:
        note("\n".join(served.lines))
        raise
    finally:
        served.process.send_signal(signal.SIGTERM)
        try:
            served.code = served.process.wait(STOP_LIMIT_S)
        finally:
            served.process.kill()
            reader.join(STOP_LIMIT_S)


def _read(served: Served, is_up: threading.Event) -> None:
    assert served.process.stderr is not None
    for line in served.process.stderr:
        served.lines.append(line.rstrip())
        if "serving" in line and not served.line:
            served.line = line
            is_up.set()
    is_up.set()

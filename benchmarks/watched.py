"""`python -m benchmarks.watched COMMAND...`: the command `longspan`, and the memory that it took.

Owns one run of a real command in this process, which imports first and is then watched: the most
that it, or any rank that it started, ever had in RAM beyond what the imports took; on a GPU what
the allocator had given out. The last line of stdout is one JSON object. Refuses to judge.
"""

from __future__ import annotations

import io
import json
import sys
import threading
from contextlib import redirect_stdout, suppress
from pathlib import Path

# The kernel keeps each peak, so a look now and then is enough; each one takes the interpreter from
# rank 0, which at 50 looks a second took half as long again for a step over two ranks.
_PERIOD_S = 0.25


def status_bytes(pid: int | str, field: str) -> int:
    """A size in /proc/PID/status; 0 where there is no such process or field any more."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def children_of(pid: int) -> list[int]:
    """Processes that any thread of a process started and that are still there."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


class ChildrenWatch:
    """Watches the children of this process; `peak_bytes` is the most that one of them ever had."""

    def __init__(self, pid: int) -> None:
        self._pid, self._end = pid, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_bytes = 0
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(_PERIOD_S):
            peaks = [status_bytes(child, "VmHWM") for child in children_of(self._pid)]
            self.peak_bytes = max([self.peak_bytes, *peaks])

    def stop(self) -> None:
        """Look no more."""
        self._end.set()
        self._thread.join()


def main() -> int:
    """Import, run the command, say what it printed and what it took."""
    import os

    import torch

    import orchestrator.answering
    import orchestrator.engine  # noqa: F401
    from orchestrator.cli import main as longspan

    imported = status_bytes("self", "VmRSS")
    watch = ChildrenWatch(os.getpid())
    out = io.StringIO()
    with redirect_stdout(out):
        code = longspan(sys.argv[1:])
    watch.stop()
    peak = max(status_bytes("self", "VmHWM"), watch.peak_bytes)
    result = {
        "code": code,
        "lines": [json.loads(line) for line in out.getvalue().splitlines() if line[:1] == "{"],
        "imported_bytes": imported,
        "peak_bytes": peak - imported,
        "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

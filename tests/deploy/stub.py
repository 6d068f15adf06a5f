"""A `longspan` that computes nothing: it writes down its arguments and ends as it was told.

Owns the program and its log, which lies beside it. `STUB_CODE_INGEST` and `STUB_CODE_ASK` are exit
codes; with `STUB_WAIT` it waits for a SIGTERM, which it writes down.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAM = """\
#!{python} -IS
import json, os, signal, sys, time

def note(value):
    with open(os.path.join(os.path.dirname(sys.argv[0]), "log"), "a") as log:
        log.write(json.dumps(value) + "\\n")

def end(*_):
    note("SIGTERM")
    time.sleep(0.3)  # as ranks that leave in order
    note("ended")
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
note(sys.argv[1:])
if "ask" in sys.argv:
    print('{{"answer": "first"}}', flush=True)
if "STUB_WAIT" in os.environ:
    time.sleep(60)
sys.exit(int(os.environ.get("STUB_CODE_ASK" if "ask" in sys.argv else "STUB_CODE_INGEST", "0")))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stub:
    """The program in its folder, and its log."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Stub:
        """Write the program."""
        folder.mkdir()
        program = folder / "longspan"
        program.write_text(PROGRAM.format(python=sys.executable))
        program.chmod(0o755)
        return cls(folder=folder)

    @property
    def log(self) -> Path:
        """What it wrote down, one JSON value a line."""
        return self.folder / "log"

    def notes(self) -> list[list[str] | str]:
        """Arguments of each call, and signals."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def calls(self) -> list[list[str]]:
        """Arguments of each call."""
        return [note for note in self.notes() if isinstance(note, list)]

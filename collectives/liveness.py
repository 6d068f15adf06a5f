"""Which ranks of this machine have ended or stand still, so that a loss can be given a name.

Owns what identifies a process beyond its number, and how its state is read from /proc. Refuses to
guess: a rank of another machine, of another process namespace, or of a system without /proc is
never called lost, and a process that runs is not either, however little it does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path

_PAUSE_S = 0.01
_FIRST_FIELD = 3  # fields after the command's name, which alone may contain spaces
_STATE = 3 - _FIRST_FIELD
_START_TIME = 22 - _FIRST_FIELD
_ENDED = frozenset("ZX")  # zombie, dead
_GONE = _ENDED | frozenset("Tt")  # stopped, stopped by a tracer


def describe_process() -> bytes:
    """What another process of this machine needs to watch this one; empty where it cannot."""
    place = find_place()
    fields = _read_stat(os.getpid())
    if place is None or fields is None:
        return b""
    return f"{place} {os.getpid()} {fields[_START_TIME]}".encode()


def find_gone(described: Sequence[bytes]) -> list[int]:
    """Indices of the described processes that have ended or stand still, on this machine."""
    return _find(described, _GONE)


def find_ended(described: Sequence[bytes]) -> list[int]:
    """Indices of the described processes that have ended, on this machine."""
    return _find(described, _ENDED)


def await_gone(described: Sequence[bytes], *, patience_s: float) -> list[int]:
    """`find_gone`, again and again until it finds any: connections close before a process ends."""
    deadline = time.monotonic() + patience_s
    while not (gone := find_gone(described)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    return gone


def _find(described: Sequence[bytes], states: Collection[str]) -> list[int]:
    here = find_place()
    return [idx for idx, process in enumerate(described) if _is_in(states, process, here)]


def _is_in(states: Collection[str], process: bytes, here: str | None) -> bool:
    """Whether a process of this machine has ended or is in one of the states."""
    if not process:
        return False
    place, pid, started = process.decode().rsplit(" ", maxsplit=2)
    if place != here:
        return False
    fields = _read_stat(int(pid))
    return fields is None or fields[_START_TIME] != started or fields[_STATE] in states


def find_place() -> str | None:
    """Machine, since its start, and process namespace; None on a system without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # Elsewhere the same boot may be seen through another /proc.
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _read_stat(pid: int) -> list[str] | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()

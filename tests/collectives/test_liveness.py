"""Ended and stopped processes of this machine are found; nothing else is called gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from collectives.liveness import await_gone, describe_process, find_gone

CHILD = """
import sys
from collectives.liveness import describe_process
print(describe_process().decode(), flush=True)
sys.stdin.read()
"""


@contextmanager
def start_child() -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """A process that waits, and its description of itself."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        try:
            assert child.stdout is not None
            yield child, child.stdout.readline().strip().encode()
        finally:
            child.kill()


def test_a_child_is_gone_when_stopped_ended_or_reaped() -> None:
    me = describe_process()
    with start_child() as (child, described):
        assert find_gone([me, described]) == []
        assert await_gone([me, described], patience_s=0) == []
        os.kill(child.pid, signal.SIGSTOP)
        assert await_gone([me, described], patience_s=10) == [1]
        os.kill(child.pid, signal.SIGCONT)
        child.kill()
        assert await_gone([described, me], patience_s=10) == [0]  # a zombie
        child.wait()
        assert find_gone([described, me, described]) == [0, 2]


def test_the_number_of_a_process_says_nothing_without_its_start_and_place() -> None:
    boot, namespace, pid, started = describe_process().decode().split(" ")
    earlier = f"{pid} {started}0"
    assert find_gone([f"{boot} {namespace} {earlier}".encode()]) == [0]
    for place in (f"{boot}0 {namespace}", f"{boot} {namespace}0"):
        assert find_gone([f"{place} {earlier}".encode()]) == []


def test_what_cannot_be_watched_is_never_gone() -> None:
    assert find_gone([b"", b""]) == []

"""The port scan finds what listens, and only that."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.listening import find_listeners, find_marked, find_tree

CHILD = "import sys; sys.stdin.read()"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits, with a mark in its environment."""
    environment = {**os.environ, "LONGSPAN_TEST_MARK": "here"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, env=environment
    )
    with process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("family", "host", "is_loopback"),
    [
        (socket.AF_INET, "127.0.0.1", True),
        (socket.AF_INET, "127.1.2.3", True),
        (socket.AF_INET, "0.0.0.0", False),
        (socket.AF_INET6, "::1", True),
        (socket.AF_INET6, "::", False),
        (socket.AF_INET6, "::ffff:127.0.0.1", True),
    ],
)
def test_a_listener_is_found_with_its_address(
    family: socket.AddressFamily, host: str, is_loopback: bool
) -> None:
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        port = listener.getsockname()[1]
        ours = [os.getpid()]
        assert [each for each in find_listeners(ours) if each.port == port] == []
        listener.listen()
        found = [each for each in find_listeners(ours) if each.port == port]
        assert [(each.address, each.is_loopback) for each in found] == [(host, is_loopback)]
        assert [each for each in find_listeners([1 << 22]) if each.port == port] == []


def test_processes_are_found_by_parent_and_by_mark(child: subprocess.Popen[bytes]) -> None:
    assert child.pid in find_tree(os.getpid())
    assert os.getpid() not in find_tree(child.pid)
    assert find_marked("LONGSPAN_TEST_MARK=here") == [child.pid]
    assert find_marked("LONGSPAN_TEST_MARK=her") == []

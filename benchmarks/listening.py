"""Who listens where, as the kernel tells it: a port scan from inside, which misses no port.

Owns reading `/proc`: a process and its descendants, their sockets, and those that listen for TCP.
Refuses to judge which addresses are right.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_LISTENING = "0A"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A listening socket of a process."""

    pid: int
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback


def find_tree(root: int) -> list[int]:
    """A process and all its descendants that live."""
    children: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything; what follows the last one does not.
            parent = int(path.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def find_marked(variable: str) -> list[int]:
    """Processes that were started with this `NAME=value` in their environment, whoever started
    them: a daemon has another parent, but inherits it.
    """
    wanted = variable.encode()
    found = []
    for path in PROC.glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def find_listeners(pids: Iterable[int]) -> list[Listener]:
    """Every listening TCP socket that one of these processes holds."""
    owners = {inode: pid for pid in pids for inode in _socket_inodes(pid)}
    return [
        Listener(pid=owners[inode], address=address, port=port)
        for table in ("tcp", "tcp6")
        for inode, address, port in _read_table(PROC / "net" / table)
        if inode in owners
    ]


def _socket_inodes(pid: int) -> Iterator[int]:
    for path in (PROC / str(pid) / "fd").glob("*"):
        try:
            link = path.readlink().name
        except OSError:
            continue  # closed meanwhile, as the descriptor that lists them is
        if link.startswith("socket:["):
            yield int(link[len("socket:[") : -1])


def _read_table(path: Path) -> Iterator[tuple[int, str, int]]:
    """Inode, address and port of each listening socket."""
    lines = path.read_text(encoding="ascii").splitlines()[1:] if path.exists() else []
    for line in lines:
        words = line.split()
        if words[3] == _LISTENING:
            address, _, port = words[1].partition(":")
            yield int(words[9]), _parse_address(address), int(port, 16)


def _parse_address(text: str) -> str:
    """An address that the kernel writes as 32-bit words, each in the machine's byte order."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))

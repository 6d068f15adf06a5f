"""A TCP port on which ranks will meet, kept for them until rank 0 listens.

Owns the reservation: a bound socket that does not listen. The kernel gives such a port to nobody
who asks for a free one, and lets a server that names it listen beside the reservation, as
`collectives` and torch's own store do (both set SO_REUSEADDR). Refuses to know who meets there.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import PortTaken

LOOPBACK = "127.0.0.1"
ANY = 0


@contextmanager
def reserve_port(address: str = LOOPBACK, port: int = ANY) -> Iterator[int]:
    """Keep a port of an address of this machine, by default a free one; raises PortTaken."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            reservation.bind((address, port))
        except OSError as error:
            raise PortTaken(_describe(address, port, error)) from error
        yield int(reservation.getsockname()[1])


def _describe(address: str, port: int, error: OSError) -> str:
    what = f"port {port} of {address}" if port else f"a free port of {address}"
    reason = "in use" if error.errno == errno.EADDRINUSE else error.strerror
    return f"{what}: {reason}; limit a port that nobody listens on; give another or leave it out"

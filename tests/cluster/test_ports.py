"""A reserved port is given to nobody who asks for a free one, and to the server that names it."""

from __future__ import annotations

import socket

import pytest

from collectives import Rendezvous, join
from collectives.bootstrap import required_settings
from orchestrator.cluster.ports import reserve_port
from orchestrator.errors import PortTaken


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_server_listens_beside_the_reservation(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        reserve_port(address) as port,
        socket.create_server((address, port), family=family),
        socket.create_connection((address, port), timeout=5),
    ):
        pass


def test_ranks_meet_on_a_reserved_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with reserve_port() as port:
        rendezvous = Rendezvous(rank=0, size=1, local_rank=0, address="127.0.0.1", port=port)
        for name, value in required_settings(rendezvous).items():
            monkeypatch.setenv(name, value)
        with join(rendezvous) as group:
            group.barrier()


def test_a_reserved_port_is_not_free() -> None:
    with reserve_port() as port, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_a_port_that_is_listened_on_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortTaken, match="in use"), reserve_port(port=port):
            pass
    with reserve_port(port=port) as again:
        assert again == port


def test_an_address_of_another_machine_is_refused() -> None:
    with (
        pytest.raises(PortTaken, match=r"^a free port of 192\.0\.2\.1: "),
        reserve_port("192.0.2.1"),
    ):
        pass

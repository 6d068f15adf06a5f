"""What every test gets: no network, and few deterministic examples where a property is checked."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before anything imports triton: kernels are interpreted here
    os.environ["TRITON_INTERPRET"] = "1"

# Tests never time: a slow shared core must not fail a property.
settings.register_profile("longspan", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("longspan")

LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that would leave this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family != socket.AF_UNIX and not str(host).startswith(LOOPBACK):
            pytest.fail(f"a test reached for the network: {address!r}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)

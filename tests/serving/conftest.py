"""A service around a fake engine, called in this process or at a loopback port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.testclient import TestClient

from orchestrator.serving.app import create_app
from orchestrator.serving.server import BackgroundServer
from orchestrator.serving.settings import ServiceSettings
from tests.serving.fakes import MODEL, FakeEngine

LOCAL = "http://127.0.0.1"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def open_service(engine: FakeEngine) -> Iterator[Callable[..., TestClient]]:
    """Opens the service without a socket; faults of ours come as responses, as at a port."""
    with ExitStack() as stack:

        def start(**settings: Any) -> TestClient:
            app = create_app(engine, ServiceSettings(**{"model": MODEL, **settings}))
            client = TestClient(app, base_url=LOCAL, raise_server_exceptions=False)
            return stack.enter_context(client)

        yield start


@pytest.fixture
def service(open_service: Callable[..., TestClient]) -> TestClient:
    return open_service()


@pytest.fixture
def start_server(engine: FakeEngine) -> Iterator[Callable[..., BackgroundServer]]:
    """Starts a real server at a free loopback port."""
    with ExitStack() as stack:

        def start(**settings: Any) -> BackgroundServer:
            chosen = ServiceSettings(**{"model": MODEL, "keep_alive_s": 0.05, **settings})
            return stack.enter_context(BackgroundServer(engine, chosen))

        yield start
        engine.may_answer.set()
        engine.may_ingest.set()

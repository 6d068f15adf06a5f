"""Listens: a socket, loopback by default, and how a server starts and stops.

Owns the address and the drain: at the first signal nothing new is taken, questions in flight may
finish within `drain_s`, ingests end after their present chunk and stay resumable. Only here are
signal handlers installed, and only by `serve`.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

import uvicorn
from fastapi import FastAPI

from orchestrator.serving.app import create_app
from orchestrator.serving.auth import check_exposure
from orchestrator.serving.errors import AddressTaken, ServerFault
from orchestrator.serving.protocols import ServedEngine
from orchestrator.serving.service import Service
from orchestrator.serving.settings import ServiceSettings

LOOPBACK = "127.0.0.1"
ANY_PORT = 0
START_LIMIT_S = 30.0
# uvicorn ticks ten times a second.
_TICKS_A_LOOK = 10


def bind(host: str, port: int, *, api_key: str | None) -> socket.socket:
    """A bound socket that does not listen yet; port 0 takes a free one.

    Raises KeyRequired beyond loopback without a key, and AddressTaken.
    """
    check_exposure(host, api_key)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_bind(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_bind(host, port, error) from error
    return listener


def find_url(listener: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    engine: ServedEngine,
    settings: ServiceSettings,
    listener: socket.socket,
    *,
    on_start: Callable[[], None],
) -> None:
    """Serve until SIGINT or SIGTERM, and return after the drain. For the main thread.

    on_start is called once requests are taken.
    """
    _Server(create_app(engine, settings), settings, on_start).run(sockets=[listener])


class BackgroundServer:
    """A server in a thread of this process, for notebooks and tests; a context manager."""

    def __init__(
        self,
        engine: ServedEngine,
        settings: ServiceSettings,
        *,
        host: str = LOOPBACK,
        port: int = ANY_PORT,
    ) -> None:
        """Binds; raises KeyRequired and AddressTaken."""
        self._listener = bind(host, port, api_key=settings.api_key)
        self.url = find_url(self._listener)
        self._is_started = threading.Event()
        self._server = _Server(create_app(engine, settings), settings, self._is_started.set)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True
        )

    def start(self) -> Self:
        """Returns when requests are taken. Raises ServerFault if that is not soon."""
        self._thread.start()
        if not self._is_started.wait(START_LIMIT_S):
            raise ServerFault(
                f"the server at {self.url} has not started; limit {START_LIMIT_S:g} s; see its log"
            )
        return self

    def stop(self) -> None:
        """Drain, and return when it is over."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class _Server(uvicorn.Server):
    """uvicorn, which stops admission before it drains, and whose signals end in a return."""

    def __init__(
        self, app: FastAPI, settings: ServiceSettings, on_start: Callable[[], None]
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=settings.drain_s,
        )
        super().__init__(config)
        self._app, self._on_start = app, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop: told to, or because the engine has lost a rank and answers nothing."""
        if counter % _TICKS_A_LOOK == 0 and self._app.state.service.engine.progress()["is_broken"]:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, then wait for what is in flight."""
        service = self._app.state.service
        assert isinstance(service, Service)
        service.stop_admission()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain, the second ends it; none is raised again afterwards,
        so that whoever serves closes the engine.
        """
        self.force_exit = self.should_exit
        self.should_exit = True


def _cannot_bind(host: str, port: int, error: OSError) -> AddressTaken:
    return AddressTaken(
        f"cannot listen on {host} port {port} ({error.strerror}); an address of this machine and a "
        "free port are needed; choose another --port, or stop what listens there"
    )

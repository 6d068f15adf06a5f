"""The application: routes, key, limits and faults put together around one engine.

Owns their order and nothing else: first the key, then the size of the body, then a route. Opens no
socket, so that a test calls it in its own process; `server.py` listens.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from orchestrator.serving.auth import Guard
from orchestrator.serving.body_limit import BodyLimit
from orchestrator.serving.faults import add_error_handlers
from orchestrator.serving.protocols import ServedEngine
from orchestrator.serving.routes import chat, documents, health, models, plan
from orchestrator.serving.service import Service
from orchestrator.serving.settings import ServiceSettings
from orchestrator.serving.wire import Upload
from orchestrator.serving.wire_chat import ChatRequest


class Application(FastAPI):
    """FastAPI, with the bodies that routes read themselves in its OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        """The document of `/openapi.json`."""
        document = super().openapi()
        _, bodies = models_json_schema(
            [(ChatRequest, "validation"), (Upload, "validation")],
            ref_template="#/components/schemas/{model}",
        )
        document["components"]["schemas"].update(bodies["$defs"])
        return document


def create_app(engine: ServedEngine, settings: ServiceSettings) -> FastAPI:
    """The service of `engine`. It does not close the engine."""
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.stop_admission()
        await service.wait_idle()

    # The framework's pages would fetch scripts, and its telemetry would send data elsewhere.
    app = Application(
        title="Longspan",
        version=version("longspan"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = service
    for routes in (models, chat, documents, plan, health):
        app.include_router(routes.router)
    add_error_handlers(app)
    # Each wraps those before it: what is added last is asked first.
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(Guard, api_key=settings.api_key)
    return app

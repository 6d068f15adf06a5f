"""How many bytes a request's body may have: counted while it is read, whatever its header says.

Owns the limit of each route. Knows nothing of what is in a body.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.serving.errors import BodyTooLarge
from orchestrator.serving.settings import ServiceSettings

DOCUMENTS_PATH = "/v1/documents"


class BodyLimit:
    """ASGI middleware; its `receive` raises BodyTooLarge into whoever reads too much."""

    def __init__(self, app: ASGIApp, *, settings: ServiceSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"] == DOCUMENTS_PATH
        limits = self._settings
        limit = limits.max_document_bytes if is_upload else limits.max_request_bytes
        announced = Headers(scope=scope).get("content-length", "0")
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            if announced.isdecimal() and int(announced) > limit:
                raise too_large(f"announces {announced}", limit)
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise too_large(f"has at least {num_bytes}", limit)
            return message

        await self._app(scope, receive_counted, send)


def too_large(what: str, limit_bytes: int) -> BodyTooLarge:
    """The fault of a body over the limit."""
    return BodyTooLarge(f"the body {what} bytes; limit {limit_bytes}; send less, or in parts")

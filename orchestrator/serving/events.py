"""Server-sent events: their lines, the comments that keep a silent one alive, and the response.

Owns the format and the end of a stream: whatever feeds it is closed as soon as the response is
over, also when the client has gone. Knows nothing of what is sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def format_event(data: str, *, name: str | None = None) -> bytes:
    """One event; `data` is one line, as JSON is."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {data}\n\n".encode()


class EventStream(StreamingResponse):
    """A response of events; `feed` is closed at its end, however it ends."""

    def __init__(self, feed: AsyncGenerator[bytes, None]) -> None:
        # The second header keeps a proxy from holding events back.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(feed, media_type="text/event-stream", headers=headers)
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._feed.aclose()

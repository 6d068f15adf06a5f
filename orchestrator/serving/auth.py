"""Who may reach the service: deny by default, in front of every route but `/health*`.

Owns the key: reading it from a file, when a server needs one, and comparing it in constant time.
Without a key only loopback may listen, and a browser's page of another site is kept out: its
requests carry its `Origin`, or a `Host` that is not loopback.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from hashlib import sha256
from pathlib import Path
from stat import S_IROTH
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.serving.errors import (
    HostRefused,
    InvalidApiKey,
    KeyFileInvalid,
    KeyRequired,
    ServiceError,
)
from orchestrator.serving.faults import error_response

OPEN_PATHS = ("/health", "/health/ready", "/health/progress")
MAX_KEY_CHARS = 1024


def read_key(path: Path) -> str:
    """The key in a file: its one line.

    Raises KeyFileInvalid for a file that cannot be read, is empty, or that everybody can read.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileInvalid(
            f"key file {path} cannot be read ({getattr(error, 'strerror', 'not ASCII')}); it holds "
            "one line of ASCII; check it"
        ) from error
    if mode & S_IROTH:
        raise KeyFileInvalid(
            f"key file {path} can be read by everybody (mode {mode & 0o777:o}); limit owner and "
            f"group; run chmod 600 {path}"
        )
    if not text or len(text.split()) != 1 or len(text) > MAX_KEY_CHARS:
        raise KeyFileInvalid(
            f"key file {path} holds {len(text.split())} words in {len(text)} characters; limit one "
            f"word of 1 to {MAX_KEY_CHARS}; write a key into it, for example of "
            "`openssl rand -hex 32`"
        )
    return text


def is_loopback(host: str) -> bool:
    """Whether a name or address is loopback wherever it leads."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(info[4][0]).is_loopback for info in found)


def check_exposure(host: str, api_key: str | None) -> None:
    """Refuse to let others reach a server without a key. Raises KeyRequired."""
    if api_key is None and not is_loopback(host):
        raise KeyRequired(
            f"host {host} is reached by others, and no key is set; without one the limit is "
            "loopback (127.0.0.1); add --api-key-file FILE"
        )


class Guard:
    """ASGI middleware that lets nothing pass before it is known to be allowed."""

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._key_digest = None if api_key is None else _digest(f"Bearer {api_key}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self._app(scope, receive, send)
            return
        refusal = self._find_refusal(Headers(scope=scope))
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal is not None:
            await error_response(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _find_refusal(self, headers: Headers) -> ServiceError | None:
        if self._key_digest is None:
            return _find_foreign(headers)
        given = _digest(headers.get("authorization", ""))
        if hmac.compare_digest(given, self._key_digest):
            return None
        what = "wrong" if "authorization" in headers else "missing"
        return InvalidApiKey(
            f"the API key is {what}; every route but /health needs it; send the header "
            "'Authorization: Bearer KEY'"
        )


def _find_foreign(headers: Headers) -> HostRefused | None:
    """What is not loopback about a request to a server without a key."""
    for header, prefix in (("host", "//"), ("origin", "")):
        value = headers.get(header)
        if value is not None and not _names_loopback(prefix + value):
            return HostRefused(
                f"{header} {value[:80]!r} is not loopback; a server without a key answers to "
                "127.0.0.1, ::1 and localhost; start it with --api-key-file"
            )
    return None


def _names_loopback(url: str) -> bool:
    """Whether a URL's host is loopback by its name alone: nothing is looked up."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(text: str) -> bytes:
    """Of a fixed length, so that a comparison says nothing about the key's."""
    return sha256(text.encode()).digest()

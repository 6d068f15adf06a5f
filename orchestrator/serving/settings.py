"""What a service is told when it starts: whom it admits, and how much. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """Limits of one service.

    model: the name that requests give. api_key: None admits every request that a loopback address
    receives. max_questions, max_ingests: at once, those that wait inside the engine included.
    keep_alive_s: silence after which a comment is sent. settle_s: how long an upload waits, so that
    what is refused at once is refused with its own status. drain_s: for questions in flight when
    the server stops.
    """

    model: str
    api_key: str | None = field(default=None, repr=False)
    max_request_bytes: int = MIB
    max_document_bytes: int = 64 * MIB
    max_questions: int = 64
    max_ingests: int = 4
    keep_alive_s: float = 10.0
    settle_s: float = 0.5
    drain_s: int = 30

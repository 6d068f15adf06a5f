"""What the service needs of an engine, and no more; `orchestrator.Engine` fulfils it.

Owns the protocol between the two, so that a test serves an engine of its own. Several threads call
an engine at once. A callback that raises ends its call, which raises the same: that is how a
question whose asker has gone, or an ingest that was cancelled, ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.types import Answer, Mode

if TYPE_CHECKING:
    from kv_store import DocumentInfo
    from orchestrator.ingest import IngestOptions, IngestReport, Progress


class ServedEngine(Protocol):
    """The part of the embedded API that is served."""

    def ingest(
        self,
        *,
        text: str,
        name: str,
        options: IngestOptions,
        on_progress: Callable[[Progress], None],
    ) -> IngestReport:
        """Read a document once and keep it under `name`."""

    def ask(
        self,
        name: str,
        question: str,
        *,
        mode: Mode,
        budget: str | int | None,
        mass: float | None,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        system: str | None,
        on_token: Callable[[str], None],
    ) -> Answer:
        """Answer a question, its text piece by piece to `on_token`."""

    def docs(self) -> Sequence[DocumentInfo]:
        """Documents of the store, finished and incomplete."""

    def remove(self, name: str) -> None:
        """Delete a document."""

    def progress(self) -> Mapping[str, Any]:
        """The fields of `wire.EngineProgress`, without waiting for the engine."""

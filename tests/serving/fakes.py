"""An engine that computes nothing, and does what it is told: pieces, progress, waits, faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kv_store import DocumentInfo, DocumentNotFound
from orchestrator.ingest import IngestOptions, IngestReport, Progress
from orchestrator.types import (
    Answer,
    Bound,
    Evidence,
    Recall,
    SelectionReport,
    Timing,
    Usage,
)

MODEL = "tiny"
NAME = "boxes"
HASH = "0123456789abcdef"
WAIT_S = 20.0


def make_answer(text: str = "Nine marbles.", *, name: str = NAME) -> Answer:
    """An answer whose every number is another."""
    return Answer(
        text=text,
        finish_reason="stop",
        model=MODEL,
        document_name=name,
        document_hash=HASH,
        selection=SelectionReport(
            requested="auto", mode="exact", budget_keys=70, mass=None, levels=None, reason="asked"
        ),
        usage=Usage(
            prompt_tokens=80,
            cached_tokens=70,
            question_tokens=10,
            completion_tokens=3,
            attended_keys_mean=75.5,
            attended_keys_max=82,
            bytes_read=4096,
        ),
        timing=Timing(load_s=0.1, open_s=0.2, ttft_s=0.3, tpot_s=0.4, total_s=0.5),
        recall=Recall(
            mass_mean=0.9,
            mass_p10=0.8,
            ci95=(0.85, 0.95),
            bound=Bound(p50=0.6, p99=0.7, vacuous_share=0.25),
            audit=None,
        ),
        evidence=(Evidence(start_char=3, end_char=9, score=0.5, text="marble"),),
        stack={"hash": "feed"},
    )


def make_info(name: str = NAME, **changes: Any) -> DocumentInfo:
    """A finished document of the store."""
    facts: dict[str, Any] = {
        "name": name,
        "is_complete": True,
        "num_tokens": 70,
        "sealed_tokens": 70,
        "disk_bytes": 1000,
        "model": MODEL,
        "document_hash": HASH,
        "is_being_replaced": False,
        "damage": None,
    }
    return DocumentInfo(**{**facts, **changes})


def make_report(name: str = NAME) -> IngestReport:
    """A finished ingest."""
    return IngestReport(
        name=name,
        document_hash=HASH,
        num_tokens=70,
        computed_tokens=64,
        was_complete=False,
        prefill_s=0.1,
        cluster_s=0.2,
        write_s=0.3,
        total_s=0.6,
    )


@dataclass(kw_only=True)
class FakeEngine:
    """`ServedEngine` for tests.

    pieces: of every answer; chunks: tokens done of every ingest; both pause_s apart. may_answer,
    may_ingest: waited for after each. ask_error, ingest_error: raised there instead, the first at
    once with fails_early. asked, ingested: what each call was told; ended: how each ended.
    """

    pieces: tuple[str, ...] = ("Nine", " marbles", ".")
    chunks: Sequence[int] = (32, 70)
    pause_s: float = 0.0
    ask_error: BaseException | None = None
    fails_early: bool = False
    is_broken: bool = False
    ingest_error: BaseException | None = None
    stored: dict[str, DocumentInfo] = field(default_factory=lambda: {NAME: make_info()})
    asked: list[dict[str, Any]] = field(default_factory=list)
    ingested: list[dict[str, Any]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    may_answer: threading.Event = field(default_factory=threading.Event)
    may_ingest: threading.Event = field(default_factory=threading.Event)
    has_begun: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_answer.set()
        self.may_ingest.set()

    def ask(
        self, name: str, question: str, *, on_token: Callable[[str], None], **options: Any
    ) -> Answer:
        """Give the pieces, then the answer."""
        self.asked.append({"name": name, "question": question, **options})
        if name not in self.stored:
            raise DocumentNotFound(f"document {name!r}: not in /secret/store; look for it")
        try:
            if self.fails_early and self.ask_error is not None:
                raise self.ask_error
            for piece in self.pieces:
                on_token(piece)
                time.sleep(self.pause_s)
                self.has_begun.set()
                assert self.may_answer.wait(WAIT_S)
                if self.ask_error is not None:
                    raise self.ask_error
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        self.ended.append("answered")
        return make_answer("".join(self.pieces).strip(), name=name)

    def ingest(
        self,
        *,
        text: str,
        name: str,
        options: IngestOptions,
        on_progress: Callable[[Progress], None],
    ) -> IngestReport:
        """Tell of the chunks, then store the document."""
        self.ingested.append({"name": name, "text": text, "options": options})
        try:
            for done in self.chunks:
                progress = Progress(num_tokens=70, done_tokens=done, tokens_per_s=10.0, eta_s=1.0)
                on_progress(progress)
                time.sleep(self.pause_s)
                self.has_begun.set()
                assert self.may_ingest.wait(WAIT_S)
                if self.ingest_error is not None:
                    raise self.ingest_error
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        self.stored[name] = make_info(name)
        self.ended.append("ingested")
        return make_report(name)

    def docs(self) -> list[DocumentInfo]:
        """What is stored."""
        return list(self.stored.values())

    def remove(self, name: str) -> None:
        """Forget a document."""
        del self.stored[name]

    def progress(self) -> dict[str, Any]:
        """Two ranks between steps."""
        return {
            "num_ranks": 2,
            "steps_done": 7,
            "idle_s": 0.5,
            "running_s": None,
            "is_broken": self.is_broken,
        }

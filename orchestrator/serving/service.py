"""One served engine: what runs on it, what it has done, and how it stops.

Owns the calls of the engine, each in a thread of its own. Knows no HTTP but how a route finds it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from orchestrator.serving.calls import Call, Gate
from orchestrator.serving.faults import LOG
from orchestrator.serving.jobs import Job, JobBoard
from orchestrator.serving.protocols import ServedEngine
from orchestrator.serving.settings import ServiceSettings
from orchestrator.serving.wire import EngineProgress, Health, RankProgress, ServiceStatus, Upload
from orchestrator.types import Answer, AskOptions

if TYPE_CHECKING:
    from orchestrator.ingest import IngestReport, Progress


POLL_S = 0.02


class Service:
    """An engine and what is running on it."""

    def __init__(self, engine: ServedEngine, settings: ServiceSettings) -> None:
        self.engine, self.settings = engine, settings
        self.questions = Gate("questions", limit=settings.max_questions)
        # A search keeps the interpreter, and with it every question, busy.
        self.plans = Gate("plans", limit=1)
        self.ingests = JobBoard(limit=settings.max_ingests)
        self.started_at = int(time.time())

    def ask(self, name: str, question: str, options: AskOptions) -> Call[str, Answer]:
        """Begin a question. Raises ShuttingDown or TooBusy; the engine's faults end the call."""

        def ask(on_token: Callable[[str], None]) -> Answer:
            return self.engine.ask(
                name,
                question,
                mode=options.mode,
                budget=options.budget,
                mass=options.mass,
                max_tokens=options.max_tokens,
                temperature=options.sampling.temperature,
                top_p=options.sampling.top_p,
                seed=options.sampling.seed,
                system=options.system,
                on_token=on_token,
            )

        return Call(ask, self.questions, name=f"ask {name}")

    def ingest(self, upload: Upload) -> Job:
        """Begin an ingest. Raises IngestBusy, ShuttingDown or TooBusy; the rest ends the job."""
        from orchestrator.ingest import IngestOptions

        options = IngestOptions(**upload.options.model_dump())

        def ingest(on_progress: Callable[[Progress], None]) -> IngestReport:
            return self.engine.ingest(
                text=upload.text, name=upload.name, options=options, on_progress=on_progress
            )

        return self.ingests.start(upload.name, ingest)

    def health(self) -> Health:
        """What is going on, without waiting for the engine."""
        engine = EngineProgress.model_validate(self.engine.progress())
        status: ServiceStatus = "draining" if self.questions.is_closed else "ok"
        return Health(
            status="broken" if engine.is_broken else status,
            running_questions=self.questions.running,
            running_ingests=self.ingests.gate.running,
            running_s=engine.running_s,
            ranks=[
                RankProgress(rank=rank, steps=engine.steps_done, idle_s=engine.idle_s)
                for rank in range(engine.num_ranks)
            ],
        )

    async def wait_idle(self) -> None:
        """Wait until no call of the engine runs, for an engine is closed after its last call; for
        drain_s at most.
        """
        try:
            async with asyncio.timeout(self.settings.drain_s):
                while self.questions.running or self.ingests.gate.running:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            LOG.warning("calls of the engine are left behind after %s s", self.settings.drain_s)

    def stop_admission(self) -> None:
        """Take nothing new. Questions go on to their end, ingests to the end of their chunk."""
        self.questions.close()
        self.plans.close()
        self.ingests.close()


def find_service(request: Request) -> Service:
    """The service of the application that a request came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(find_service)]

"""Ingests as jobs that outlive the request that began them: owns their states and their followers.

A job runs in a thread of its own. Its state is one immutable value, replaced as a whole, so that
any number of listeners may look, also after its end; a slow listener skips what is outdated. Knows
no routes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.serving.calls import Gate, start_thread
from orchestrator.serving.errors import IngestBusy, IngestCancelled
from orchestrator.serving.faults import forget_frames, log_fault

if TYPE_CHECKING:
    from orchestrator.ingest import IngestReport, Progress

Ingest = Callable[[Callable[["Progress"], None]], "IngestReport"]
MAX_REMEMBERED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """How far a job is. At most one of report and error is set, and only at its end."""

    progress: Progress | None = None
    report: IngestReport | None = None
    error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether this is the last state."""
        return self.report is not None or self.error is not None


class Job:
    """One ingest, from its start to long after its end."""

    def __init__(self, name: str, ingest: Ingest, gate: Gate) -> None:
        """Raises ShuttingDown or TooBusy; else the thread has been started."""
        gate.enter()
        self.name = name
        self.state = JobState()
        self._is_cancelled = threading.Event()
        self._watchers: set[Callable[[], None]] = set()
        self._lock = threading.Lock()
        future = start_thread(lambda: ingest(self._show), name=f"ingest {name}")
        future.add_done_callback(lambda _: gate.leave())
        future.add_done_callback(self._end)

    def cancel(self) -> None:
        """End the ingest after the chunk that it computes; after its end, nothing."""
        self._is_cancelled.set()

    async def follow(self, *, beat_s: float | None) -> AsyncGenerator[JobState | None, None]:
        """The present state and every later one up to the last; None after beat_s of silence."""
        with self._watch() as changed:
            while True:
                changed.clear()
                state = self.state
                yield state
                if state.is_over:
                    return
                while not await _is_set_within(changed, beat_s):
                    yield None

    async def wait_over(self, *, within_s: float | None = None) -> bool:
        """Whether it has ended, at the latest after within_s."""
        try:
            async with asyncio.timeout(within_s), aclosing(self.follow(beat_s=None)) as states:
                async for _ in states:
                    pass
        except TimeoutError:
            return False
        return True

    @contextmanager
    def _watch(self) -> Iterator[asyncio.Event]:
        """An event of the running loop, set whenever the state has changed."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._watchers.add(wake)
        try:
            yield changed
        finally:
            with self._lock:
                self._watchers.discard(wake)

    def _show(self, progress: Progress) -> None:
        if self._is_cancelled.is_set():
            raise IngestCancelled(
                f"the ingest of document {self.name!r} was cancelled; what it had sealed is kept "
                "until the document is deleted; upload it again to go on"
            )
        self._become(JobState(progress=progress))

    def _end(self, future: Future[IngestReport]) -> None:
        error = future.exception()
        report = None if error is not None else future.result()
        if error is not None:
            log_fault(error)
            forget_frames(error)
        self._become(JobState(progress=self.state.progress, report=report, error=error))

    def _become(self, state: JobState) -> None:
        self.state = state
        with self._lock:
            watchers = list(self._watchers)
        for wake in watchers:
            wake()


class JobBoard:
    """The last job of each name; the oldest that have ended are forgotten. For one event loop."""

    def __init__(self, *, limit: int) -> None:
        self.gate = Gate("ingests", limit=limit)
        self._jobs: dict[str, Job] = {}

    def start(self, name: str, ingest: Ingest) -> Job:
        """Raises IngestBusy where one of this name runs, ShuttingDown or TooBusy."""
        last = self._jobs.get(name)
        if last is not None and not last.state.is_over:
            raise IngestBusy(
                f"document {name!r} is being ingested; limit one at a time; follow "
                f"/v1/documents/{name}/events, or DELETE it"
            )
        job = Job(name, ingest, self.gate)
        self.forget(name)
        self._jobs[name] = job
        for old in [job.name for job in self._jobs.values() if job.state.is_over]:
            if len(self._jobs) > MAX_REMEMBERED:
                self.forget(old)
        return job

    def find(self, name: str) -> Job | None:
        """The last job of this name, running or over."""
        return self._jobs.get(name)

    def jobs(self) -> dict[str, Job]:
        """Every job that is remembered, by name."""
        return dict(self._jobs)

    def forget(self, name: str) -> None:
        """Drop what is known of the last job of this name."""
        self._jobs.pop(name, None)

    def close(self) -> None:
        """Start nothing more, and end what runs; a document stays resumable."""
        self.gate.close()
        for job in self._jobs.values():
            job.cancel()


async def _is_set_within(event: asyncio.Event, within_s: float | None) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await event.wait()
    except TimeoutError:
        return False
    return True

"""What runs: calls and jobs followed from an event loop, their limits, their end; and health."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from orchestrator.errors import InputError
from orchestrator.ingest import IngestReport, Progress
from orchestrator.serving.app import create_app
from orchestrator.serving.calls import Call, CallCancelled, Gate
from orchestrator.serving.errors import IngestBusy, IngestCancelled, ShuttingDown, TooBusy
from orchestrator.serving.events import EventStream, format_event
from orchestrator.serving.jobs import MAX_REMEMBERED, JobBoard, JobState
from orchestrator.serving.settings import ServiceSettings
from tests.serving.conftest import LOCAL
from tests.serving.fakes import MODEL, NAME, FakeEngine, make_report

SOON_S = 5.0


def progress(done_tokens: int) -> Progress:
    return Progress(num_tokens=9, done_tokens=done_tokens, tokens_per_s=1.0, eta_s=1.0)


def test_pieces_come_in_order_and_then_the_result() -> None:
    def count(give: Callable[[int], None]) -> str:
        for number in range(100):
            give(number)
        return "done"

    async def follow() -> list[Any]:
        call = Call(count, Gate("calls", limit=1), name="count")
        return [await call.next(within_s=SOON_S) for _ in range(101)]

    *numbers, last = asyncio.run(follow())
    assert numbers == list(range(100))
    assert isinstance(last, Future)
    assert last.result() == "done"


def test_silence_is_told_and_loses_nothing() -> None:
    may_go = threading.Event()

    def wait(give: Callable[[str], None]) -> None:
        assert may_go.wait(SOON_S)
        give("a")

    async def follow() -> list[Any]:
        call = Call(wait, Gate("calls", limit=1), name="wait")
        seen: list[Any] = [await call.next(within_s=0.01) for _ in range(3)]
        may_go.set()
        return [*seen, await call.next(within_s=SOON_S)]

    assert asyncio.run(follow()) == [None, None, None, "a"]


def test_a_cancelled_call_ends_at_its_next_piece() -> None:
    ended: Future[None] = Future()

    def endless(give: Callable[[int], None]) -> None:
        try:
            while True:
                give(0)
        except CallCancelled as error:
            ended.set_exception(error)
            raise

    async def follow() -> None:
        call = Call(endless, Gate("calls", limit=1), name="endless")
        await call.next(within_s=SOON_S)
        call.cancel()

    asyncio.run(follow())
    assert isinstance(ended.exception(SOON_S), CallCancelled)


def do_nothing(_: Callable[[None], None]) -> None:
    """A call that ends at once."""


def test_a_gate_counts_what_runs_until_it_ends() -> None:
    gate, may_end = Gate("calls", limit=2), threading.Event()

    async def follow() -> None:
        calls: list[Call[None, bool]] = [
            Call(lambda _: may_end.wait(SOON_S), gate, name="wait") for _ in range(2)
        ]
        assert gate.running == 2
        with pytest.raises(TooBusy, match="limit 2"):
            Call(do_nothing, gate, name="third")
        calls[0].cancel()
        assert gate.running == 2  # nobody waits for it, but it still runs
        may_end.set()
        for call in calls:
            assert isinstance(await call.next(within_s=SOON_S), Future)
        assert gate.running == 0
        gate.close()
        with pytest.raises(ShuttingDown):
            Call(do_nothing, gate, name="late")

    asyncio.run(follow())


@dataclass(kw_only=True)
class Steps:
    """An ingest that goes on when it is told to."""

    allowed: threading.Semaphore
    error: BaseException | None = None

    def __call__(self, show: Callable[[Progress], None]) -> IngestReport:
        for done in (3, 6, 9):
            assert self.allowed.acquire(timeout=SOON_S)
            show(progress(done))
        if self.error is not None:
            raise self.error
        return make_report()


async def states(board: JobBoard, name: str = NAME) -> list[JobState]:
    job = board.find(name)
    assert job is not None
    return [state async for state in job.follow(beat_s=None) if state is not None]


def test_many_listeners_see_the_end_during_and_after() -> None:
    async def follow() -> None:
        board, steps = JobBoard(limit=1), Steps(allowed=threading.Semaphore(0))
        job = board.start(NAME, steps)
        listeners = [asyncio.create_task(states(board)) for _ in range(3)]
        for _ in range(3):
            await asyncio.sleep(0.01)
            steps.allowed.release()
        seen = await asyncio.wait_for(asyncio.gather(*listeners), SOON_S)
        for each in (*seen, await states(board)):
            assert each[-1].report == make_report()
            assert each[-1].progress == progress(9)
            done = [state.progress.done_tokens for state in each if state.progress is not None]
            assert done == sorted(done)
        assert await job.wait_over(within_s=0)
        assert board.gate.running == 0

    asyncio.run(follow())


def test_a_silent_job_beats_and_waiting_for_it_has_a_limit() -> None:
    async def follow() -> None:
        board, steps = JobBoard(limit=1), Steps(allowed=threading.Semaphore(0))
        job = board.start(NAME, steps)
        assert not await job.wait_over(within_s=0.01)
        heard = job.follow(beat_s=0.01)
        assert [await anext(heard) for _ in range(3)] == [JobState(), None, None]
        await heard.aclose()
        with pytest.raises(IngestBusy, match=NAME):
            board.start(NAME, steps)
        with pytest.raises(TooBusy):
            board.start("other", steps)
        steps.allowed.release(3)
        assert await job.wait_over(within_s=SOON_S)

    asyncio.run(follow())


def test_a_failed_job_keeps_its_error_and_not_its_text() -> None:
    class Text:
        """Stands for the text of a document."""

    held: list[weakref.ref[Text]] = []

    def ingest(_: Callable[[Progress], None]) -> IngestReport:
        text = Text()
        held.append(weakref.ref(text))
        # Of a kind that is not logged: a test's log keeps its records.
        raise InputError("empty; limit one character") from OSError("disk")

    async def follow() -> None:
        board = JobBoard(limit=1)
        job = board.start(NAME, ingest)
        assert await job.wait_over(within_s=SOON_S)
        assert isinstance(job.state.error, InputError)
        await asyncio.sleep(0.05)
        gc.collect()
        assert [reference() for reference in held] == [None]

    asyncio.run(follow())


def test_a_closed_board_ends_what_runs_and_starts_nothing() -> None:
    async def follow() -> None:
        board, steps = JobBoard(limit=2), Steps(allowed=threading.Semaphore(0))
        job = board.start(NAME, steps)
        board.close()
        steps.allowed.release()
        assert await job.wait_over(within_s=SOON_S)
        assert isinstance(job.state.error, IngestCancelled)
        with pytest.raises(ShuttingDown):
            board.start("other", steps)
        assert board.find(NAME) is job

    asyncio.run(follow())


def test_old_jobs_are_forgotten_running_ones_are_not() -> None:
    async def follow() -> None:
        board, held = JobBoard(limit=2), Steps(allowed=threading.Semaphore(0))
        job = board.start("held", held)
        for number in range(MAX_REMEMBERED + 3):
            done = board.start(f"n{number}", Steps(allowed=threading.Semaphore(3)))
            assert await done.wait_over(within_s=SOON_S)
        assert len(board.jobs()) == MAX_REMEMBERED
        assert "held" in board.jobs()
        assert board.find("n0") is None
        held.allowed.release(3)
        assert await job.wait_over(within_s=SOON_S)

    asyncio.run(follow())


def test_a_stream_is_closed_when_its_client_has_gone() -> None:
    ended: list[str] = []

    async def feed() -> AsyncGenerator[bytes, None]:
        try:
            yield b"a"
            yield b"b"
        finally:
            ended.append("closed")

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def stuck(_: Message) -> None:
        await asyncio.Event().wait()

    async def follow() -> None:
        lines = feed()
        assert await anext(lines) == b"a"
        await EventStream(lines)({"type": "http"}, gone, stuck)
        assert ended == ["closed"]

    asyncio.run(follow())


def test_an_event_is_lines() -> None:
    assert format_event('{"a":1}') == b'data: {"a":1}\n\n'
    assert format_event("{}", name="done") == b"event: done\ndata: {}\n\n"


RANKS = [{"rank": rank, "steps": 7, "idle_s": 0.5} for rank in range(2)]


def test_health_says_what_goes_on(service: TestClient) -> None:
    assert service.get("/health").json() == {"status": "ok"}
    assert service.get("/health/ready").json() == {"status": "ok"}
    assert service.get("/health/progress").json() == {
        "status": "ok",
        "running_questions": 0,
        "running_ingests": 0,
        "running_s": None,
        "ranks": RANKS,
    }


def test_a_server_that_lost_a_rank_is_of_no_use(service: TestClient, engine: FakeEngine) -> None:
    engine.is_broken = True
    for path in ("/health", "/health/ready"):
        response = service.get(path)
        assert (response.status_code, response.json()) == (503, {"status": "broken"})
    assert service.get("/health/progress").json()["status"] == "broken"


def test_a_draining_service_lives_but_takes_nothing(engine: FakeEngine) -> None:
    app = create_app(engine, ServiceSettings(model=MODEL))
    app.state.service.stop_admission()
    service = TestClient(app, base_url=LOCAL)
    assert service.get("/health").status_code == 200
    assert service.get("/health").json() == {"status": "draining"}
    assert service.get("/health/ready").status_code == 503
    response = service.post("/v1/documents", json={"name": "new", "text": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
    assert response.headers["retry-after"]

"""What only a socket shows: clients that leave, silence, endless bodies, the drain."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from orchestrator.serving.server import BackgroundServer
from tests.serving.fakes import MODEL, NAME, FakeEngine

SOON_S = 10.0
CHAT = "/v1/chat/completions"
Start = Callable[..., BackgroundServer]


def question(**changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "How many?"}]
    return {"model": MODEL, "messages": messages, "documents": [NAME], **changes}


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_ends_its_question(
    start_server: Start, engine: FakeEngine, is_stream: bool
) -> None:
    url = start_server().url
    engine.pieces, engine.pause_s = ("Nine ",) * 2000, 0.005
    if is_stream:
        with httpx2.stream("POST", url + CHAT, json=question(stream=True)) as response:
            assert any("Nine" in line for line in response.iter_lines())
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(url + CHAT, json=question(), timeout=0.2)
    wait_until(lambda: engine.ended == ["CallCancelled"])
    wait_until(lambda: count_running(url) == 0)


def count_running(url: str) -> int:
    """How many questions the server counts."""
    count: int = httpx2.get(f"{url}/health/progress").json()["running_questions"]
    return count


def test_a_listener_that_leaves_ends_no_ingest(start_server: Start, engine: FakeEngine) -> None:
    url = start_server(settle_s=0.0).url
    engine.may_ingest.clear()
    upload = {"name": "new", "text": "a"}
    assert httpx2.post(f"{url}/v1/documents", json=upload).status_code == 202
    with httpx2.stream("GET", f"{url}/v1/documents/new/events") as response:
        assert any(line == ": keep-alive" for line in response.iter_lines())
    engine.may_ingest.set()
    assert "event: done" in httpx2.get(f"{url}/v1/documents/new/events").text
    assert engine.ended == ["ingested"]


def test_silence_before_the_first_piece_is_filled(start_server: Start, engine: FakeEngine) -> None:
    url = start_server().url
    engine.pieces = ("", "Nine")
    engine.may_answer.clear()
    threading.Timer(0.3, engine.may_answer.set).start()
    text = httpx2.post(url + CHAT, json=question(stream=True)).text
    assert text.index('"role"') < text.index(": keep-alive") < text.index("Nine")
    assert text.endswith("data: [DONE]\n\n")


def test_questions_run_beside_each_other(start_server: Start, engine: FakeEngine) -> None:
    url = start_server(max_questions=8).url
    engine.may_answer.clear()
    answers: list[str] = []

    def ask() -> None:
        answer = httpx2.post(url + CHAT, json=question(), timeout=SOON_S).json()
        answers.append(answer["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(engine.asked) == 8)
    refused = httpx2.post(url + CHAT, json=question())
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_busy")
    engine.may_answer.set()
    for thread in threads:
        thread.join(SOON_S)
    assert answers == ["Nine marbles."] * 8
    assert httpx2.post(url + CHAT, json=question()).status_code == 200


def test_an_endless_body_is_not_read_to_its_end(start_server: Start) -> None:
    url = start_server(max_document_bytes=100_000).url
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield b"a" * 10_000

    headers = {"Content-Type": "text/plain"}
    try:
        response = httpx2.post(f"{url}/v1/documents?name=a", content=endless(), headers=headers)
        assert response.status_code == 413
    except httpx2.TransportError:
        pass  # the server closed the connection while the client was still sending
    assert sent < 50_000_000
    assert httpx2.get(f"{url}/health").status_code == 200


def test_a_stopping_server_finishes_what_it_has_begun(
    start_server: Start, engine: FakeEngine
) -> None:
    server = start_server(settle_s=0.0)
    engine.may_answer.clear()
    engine.may_ingest.clear()
    upload = {"name": "new", "text": "a"}
    assert httpx2.post(f"{server.url}/v1/documents", json=upload).status_code == 202
    with httpx2.stream("POST", server.url + CHAT, json=question(stream=True)) as response:
        lines = response.iter_lines()
        assert any("Nine" in line for line in lines)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        wait_until(lambda: is_refused(server.url))
        engine.may_ingest.set()
        engine.may_answer.set()
        rest = [line for line in lines if line.startswith("data")]
    stopping.join(SOON_S)
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["longspan"]["answer"] == "Nine marbles."
    wait_until(lambda: sorted(engine.ended) == ["IngestCancelled", "answered"])


def test_a_server_has_stopped_when_nothing_runs_on_its_engine(
    start_server: Start, engine: FakeEngine
) -> None:
    server = start_server(settle_s=0.0)
    engine.may_ingest.clear()
    upload = {"name": "new", "text": "a"}
    assert httpx2.post(f"{server.url}/v1/documents", json=upload).status_code == 202
    threading.Timer(0.5, engine.may_ingest.set).start()
    server.stop()
    assert engine.ended == ["IngestCancelled"]


def test_a_server_that_has_lost_a_rank_ends_by_itself(
    start_server: Start, engine: FakeEngine
) -> None:
    url = start_server().url
    engine.is_broken = True
    wait_until(lambda: is_refused(url))


def is_refused(url: str) -> bool:
    """Whether nothing listens any more."""
    try:
        httpx2.get(f"{url}/health", timeout=1)
    except httpx2.ConnectError:
        return True
    return False


def test_a_drain_has_an_end(start_server: Start, engine: FakeEngine) -> None:
    server = start_server(drain_s=1)
    engine.may_answer.clear()
    with httpx2.stream("POST", server.url + CHAT, json=question(stream=True)) as response:
        lines = response.iter_lines()
        assert any("Nine" in line for line in lines)
        server.stop()
        with pytest.raises(httpx2.RemoteProtocolError):
            list(lines)
    engine.may_answer.set()
    wait_until(lambda: engine.ended == ["CallCancelled"])

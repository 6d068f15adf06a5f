"""The client: the engine's verbs over HTTP, its types, its faults; and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kv_store import StoreFull
from orchestrator import Client
from orchestrator.errors import ContextTooLong, InputError, LongspanError, UsageError
from orchestrator.ingest import IngestOptions
from orchestrator.serving.answers import read_answer
from orchestrator.serving.errors import (
    IngestCancelled,
    InvalidApiKey,
    InvalidRequest,
    RemoteFault,
    RouteNotFound,
    ServerFault,
    ServerUnreachable,
    TooBusy,
)
from orchestrator.serving.server import BackgroundServer
from orchestrator.serving.wire import IngestProgress, IngestReport
from tests.serving.fakes import MODEL, NAME, FakeEngine, make_answer, make_report
from tests.source import ROOT

LIGHT = """
import sys
from orchestrator import Client
with Client("http://127.0.0.1:1") as client:
    try:
        client.docs()
    except Exception as error:
        assert type(error).__name__ == "ServerUnreachable", repr(error)
heavy = {"torch", "transformers", "faiss", "ray", "triton", "numpy", "fastapi"} & set(sys.modules)
assert not heavy, f"the client brought {heavy}"
"""


@pytest.fixture
def server(start_server: Callable[..., BackgroundServer]) -> BackgroundServer:
    return start_server()


def test_a_client_needs_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""


def test_the_verbs_are_the_engines(
    server: BackgroundServer, engine: FakeEngine, tmp_path: Path
) -> None:
    file = tmp_path / "letters.md"
    file.write_text("A letter.")
    told: list[IngestProgress] = []
    with Client(server.url) as client:
        assert client.models() == [MODEL]
        sparse: dict[str, Any] = {"prefill": "sparse", "prefill_budget": 2048}
        report = client.ingest(
            file, segment_tokens=1024, replace=True, on_progress=told.append, **sparse
        )
        assert report == IngestReport.model_validate(make_report("letters"))
        assert told[-1].done_tokens == 70
        assert [document.name for document in client.docs()] == [NAME, "letters"]
        assert client.follow("letters") == report
        client.remove("letters")
        assert [document.state for document in client.docs()] == ["complete"]
        health = client.health()
    wanted = IngestOptions(segment_tokens=1024, replace=True, **sparse)
    assert engine.ingested[0]["options"] == wanted
    assert (health.status, len(health.ranks)) == ("ok", 2)


def test_an_answer_is_the_engines(server: BackgroundServer, engine: FakeEngine) -> None:
    pieces: list[str] = []
    with Client(server.url) as client:
        answer = client.ask(
            NAME,
            "How many?",
            mode="centroid",
            budget="5%",
            max_tokens=9,
            temperature=0.5,
            top_p=0.9,
            seed=4,
            system="Be brief.",
            on_token=pieces.append,
        )
        assert client.ask(NAME, "Again?") == answer
    assert answer == make_answer()
    assert "".join(pieces) == answer.text
    asked, bare = engine.asked
    assert asked == {
        "name": NAME,
        "question": "How many?",
        "mode": "centroid",
        "budget": "5%",
        "mass": None,
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 4,
        "system": "Be brief.",
    }
    assert (bare["mode"], bare["max_tokens"], bare["system"]) == ("auto", 128, None)


def test_faults_come_back_by_name(server: BackgroundServer, engine: FakeEngine) -> None:
    with Client(server.url) as client:
        with pytest.raises(UsageError, match="exclude each other"):
            client.ask(NAME, "a", budget=5, mass=0.5)
        with pytest.raises(InvalidRequest, match="max_tokens") as refused:
            client.ask(NAME, "a", max_tokens=0)
        with pytest.raises(RemoteFault, match="'nobody'") as missing:
            client.ask("nobody", "a")
        with pytest.raises(RouteNotFound):
            client.remove("../boxes")
        engine.ask_error = ContextTooLong("90 tokens; limit 80; ask less")
        with pytest.raises(ContextTooLong, match="limit 80"):
            client.ask(NAME, "a")
        engine.ingest_error = StoreFull("cannot write /secret")
        with pytest.raises(RemoteFault) as full:
            client.ingest(text="a", name="new")
        engine.ingest_error = IngestCancelled("cancelled; kept; again")
        with pytest.raises(IngestCancelled):
            client.ingest(text="a", name="new")
    assert refused.value.param == "max_tokens"
    assert (missing.value.code, missing.value.status) == ("document_not_found", 404)
    assert full.value.code == "store_full"


def test_a_key_is_sent(start_server: Callable[..., BackgroundServer]) -> None:
    url = start_server(api_key="secret").url
    with Client(url, api_key="secret") as client:
        assert client.models() == [MODEL]
    for key in (None, "wrong"):
        with Client(url, api_key=key) as client:
            with pytest.raises(InvalidApiKey):
                client.docs()
            assert client.health().status == "ok"


def test_what_cannot_be_sent_is_refused_here(tmp_path: Path) -> None:
    with Client(transport=httpx2.MockTransport(lambda _: httpx2.Response(500))) as client:
        with pytest.raises(UsageError, match="exactly one"):
            client.ingest()
        with pytest.raises(UsageError, match="exactly one"):
            client.ingest("a.txt", text="a", name="a")
        with pytest.raises(InputError, match="does not exist"):
            client.ingest(tmp_path / "a.txt")


def test_nobody_answers() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(ServerUnreachable, match="serve"):
        client.docs()
    with Client("no-url") as client, pytest.raises(ServerUnreachable, match="correct the URL"):
        client.docs()


def answering(*responses: httpx2.Response) -> Client:
    """A client of a server that says what it is told, after its model's name."""
    card = {"id": MODEL, "created": 0}
    queue = [httpx2.Response(200, json={"data": [card]}), *responses]
    return Client(transport=httpx2.MockTransport(lambda _: queue.pop(0)))


def events(*blocks: str) -> httpx2.Response:
    headers = {"Content-Type": "text/event-stream"}
    return httpx2.Response(200, content="\n\n".join([*blocks, ""]), headers=headers)


def test_a_stream_that_is_cut_is_no_answer() -> None:
    chunk = json.dumps({"choices": [{"delta": {"content": "Nine"}}]})
    pieces: list[str] = []
    with (
        answering(events(": keep-alive", f"data: {chunk}")) as client,
        pytest.raises(ServerUnreachable, match="before the end"),
    ):
        client.ask(NAME, "a", on_token=pieces.append)
    assert pieces == ["Nine"]
    silent = httpx2.MockTransport(lambda _: events(": keep-alive"))
    with (
        Client(transport=silent) as client,
        pytest.raises(ServerUnreachable, match="before the end"),
    ):
        client.follow(NAME)


@pytest.mark.parametrize(
    "response",
    [
        httpx2.Response(502, text="<html>Bad gateway</html>"),
        httpx2.Response(200, text="<html>Welcome</html>"),
        httpx2.Response(404, json={"detail": "Not Found"}),
    ],
)
def test_another_server_is_recognised(response: httpx2.Response) -> None:
    with answering(response) as client, pytest.raises((ServerFault, ServerUnreachable)):
        client.ask(NAME, "a")


@pytest.mark.parametrize(("code", "kind"), [("tea_only", RemoteFault), ("too_busy", TooBusy)])
def test_a_fault_is_its_class_or_keeps_its_name(code: str, kind: type[LongspanError]) -> None:
    error = {"message": "m", "type": "t", "param": None, "code": code}
    response = httpx2.Response(418, json={"error": error})
    with answering(response) as client, pytest.raises(kind, match="m") as caught:
        client.ask(NAME, "a")
    if isinstance(caught.value, RemoteFault):
        assert (caught.value.code, caught.value.status) == (code, 418)


def test_an_answer_without_its_fields_is_a_fault() -> None:
    sent = make_answer().to_json()
    assert read_answer(json.loads(json.dumps(sent))) == make_answer()
    for missing in ("usage", "recall", "answer"):
        with pytest.raises(ServerFault, match="schema 1"):
            read_answer({key: value for key, value in sent.items() if key != missing})

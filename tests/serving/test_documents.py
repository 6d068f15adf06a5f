"""Documents: three kinds of upload, one list of what is stored or runs, progress, deletion."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.testclient import TestClient

from kv_store import DocumentBusy, DocumentExists, StoreNotWritable
from orchestrator.ingest import IngestOptions
from orchestrator.serving.app import create_app
from orchestrator.serving.settings import ServiceSettings
from tests.serving.conftest import LOCAL
from tests.serving.fakes import MODEL, NAME, FakeEngine, make_info

NEW = "letters"
TEXT = "A letter. Another."


def upload(service: TestClient, name: str = NEW, **fields: Any) -> Any:
    return service.post("/v1/documents", json={"name": name, "text": TEXT, **fields})


def events(service: TestClient, name: str = NEW) -> list[tuple[str, Any]]:
    """Every event of a document, to the last."""
    response = service.get(f"/v1/documents/{name}/events")
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.split("\n\n"):
        lines = dict(line.split(": ", maxsplit=1) for line in block.splitlines() if line[0] != ":")
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def names(service: TestClient) -> dict[str, str]:
    return {each["name"]: each["state"] for each in service.get("/v1/documents").json()["data"]}


@pytest.fixture
def hurried(engine: FakeEngine) -> Iterator[TestClient]:
    """A service that answers an upload before its ingest is over."""
    settings = ServiceSettings(model=MODEL, settle_s=0.0, keep_alive_s=0.01)
    with TestClient(create_app(engine, settings), base_url=LOCAL) as client:
        yield client
        engine.may_ingest.set()


@contextmanager
def running_ingest(service: TestClient, engine: FakeEngine) -> Iterator[None]:
    """An ingest that stands after its first chunk."""
    engine.may_ingest.clear()
    assert upload(service).status_code == 202
    assert engine.has_begun.wait(5)
    yield
    engine.may_ingest.set()


def test_an_upload_is_ingested_and_says_where_to_look(
    service: TestClient, engine: FakeEngine
) -> None:
    options = {"segment_tokens": 1024, "window": 32, "replace": True}
    response = upload(service, options=options)
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/documents/{NEW}"
    assert response.json() == {
        "name": NEW,
        "state": "complete",
        "status_url": f"/v1/documents/{NEW}",
        "events_url": f"/v1/documents/{NEW}/events",
    }
    wanted = IngestOptions(segment_tokens=1024, window=32, replace=True)
    assert engine.ingested == [{"name": NEW, "text": TEXT, "options": wanted}]
    assert service.get(f"/v1/documents/{NEW}").json()["state"] == "complete"


def test_a_bare_upload_has_the_engines_defaults(service: TestClient, engine: FakeEngine) -> None:
    upload(service)
    assert engine.ingested[0]["options"] == IngestOptions()


def test_text_and_forms_are_uploads_too(service: TestClient, engine: FakeEngine) -> None:
    plain = service.post(
        f"/v1/documents?name={NEW}&segment_tokens=512&restart=true",
        content="Gr\u00fc\u00dfe.".encode(),
        headers={"Content-Type": "text/markdown; charset=utf-8"},
    )
    form = service.post(
        "/v1/documents",
        files={"file": ("dir/other.md", TEXT.encode())},
        data={"segment_tokens": "512"},
    )
    named = service.post("/v1/documents", files={"file": ("a.md", b"x")}, data={"name": "third"})
    assert [each.status_code for each in (plain, form, named)] == [202] * 3
    assert [each["name"] for each in engine.ingested] == [NEW, "other", "third"]
    assert [each["text"] for each in engine.ingested] == ["Gr\u00fc\u00dfe.", TEXT, "x"]
    wanted = IngestOptions(segment_tokens=512, restart=True)
    assert engine.ingested[0]["options"] == wanted
    assert engine.ingested[1]["options"] == IngestOptions(segment_tokens=512)


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("name", {"name": "../up"}),
        ("name", {"name": ""}),
        ("name", {"name": "x" * 101}),
        ("text", {"text": ""}),
        ("text", {"text": 5}),
        ("pages", {"pages": 5}),
        ("options.segment_tokens", {"options": {"segment_tokens": 300}}),
        ("options.segment_tokens", {"options": {"segment_tokens": "512"}}),
        ("options.segment_tokens", {"options": {"segment_tokens": 1 << 30}}),
        ("options.window", {"options": {"window": 0}}),
        ("options.kv_dtype", {"options": {"kv_dtype": "float8"}}),
        ("options.prefill", {"options": {"prefill": "dense"}}),
        ("options.prefill_budget", {"options": {"prefill": "sparse", "prefill_budget": True}}),
        ("options.url", {"options": {"url": "http://elsewhere"}}),
    ],
)
def test_an_upload_that_is_not_understood_is_refused_by_name(
    service: TestClient, engine: FakeEngine, param: str, fields: dict[str, Any]
) -> None:
    response = service.post("/v1/documents", json={"name": NEW, "text": TEXT, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.ingested == []


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (400, {"content": b"\x00\x01", "headers": {"Content-Type": "text/plain"}}),
        (400, {"content": b"\xff", "headers": {"Content-Type": "text/plain"}}),
        (400, {"content": b"", "headers": {"Content-Type": "text/plain"}}),
        (400, {"json": {"name": "a", "text": "  "}}),
        (400, {"json": {"name": "a", "text": "\x00"}}),
        (400, {"files": {"other": ("a.txt", b"x")}}),
        (400, {"files": {"file": ("", b"x"), "b": ("b.txt", b"y")}}),
        (400, {"files": {"file": ("a.txt", b"x")}, "data": {"segment_tokens": "many"}}),
        (400, {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}),
        (415, {"content": b"x", "headers": {"Content-Type": "application/x-pickle"}}),
        (415, {"content": b"x"}),
    ],
)
def test_what_is_no_text_is_refused(
    service: TestClient, engine: FakeEngine, status: int, request_: dict[str, Any]
) -> None:
    response = service.post("/v1/documents", params={"name": NEW}, **request_)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert engine.ingested == []


def test_what_is_refused_at_once_is_refused_by_the_upload(
    service: TestClient, engine: FakeEngine
) -> None:
    engine.ingest_error = DocumentExists("document 'boxes' holds another text; --replace")
    response = upload(service, NAME)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "document_exists")
    assert names(service) == {NAME: "complete"}
    assert events(service, NAME)[-1][1]["was_complete"]


def test_progress_is_told_while_it_runs_and_after(hurried: TestClient, engine: FakeEngine) -> None:
    with running_ingest(hurried, engine):
        document = hurried.get(f"/v1/documents/{NEW}").json()
        assert document["state"] == "ingesting"
        assert document["progress"]["done_tokens"] == 32
        assert names(hurried) == {NAME: "complete", NEW: "ingesting"}
    for _ in range(2):
        (*_, (first, progress), (last, report)) = events(hurried)
        assert (first, last) == ("progress", "done")
        assert progress == {
            "num_tokens": 70,
            "done_tokens": 70,
            "tokens_per_s": 10.0,
            "eta_s": 1.0,
        }
        assert report["computed_tokens"] == 64


def test_a_name_is_ingested_once_at_a_time(hurried: TestClient, engine: FakeEngine) -> None:
    with running_ingest(hurried, engine):
        response = upload(hurried)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "ingest_busy")
    events(hurried)
    assert upload(hurried).status_code == 202


def test_ingests_have_a_limit(open_service: Callable[..., TestClient]) -> None:
    response = upload(open_service(max_ingests=0))
    assert (response.status_code, response.json()["error"]["code"]) == (429, "too_busy")
    assert response.headers["retry-after"]


def test_a_failed_ingest_is_told_and_listed(hurried: TestClient, engine: FakeEngine) -> None:
    engine.ingest_error = StoreNotWritable("cannot write /secret/store; check the disk")
    with running_ingest(hurried, engine):
        pass
    kind, data = events(hurried)[-1]
    assert kind == "error"
    assert data["error"]["code"] == "store_not_writable"
    assert "/secret" not in data["error"]["message"]
    document = hurried.get(f"/v1/documents/{NEW}").json()
    assert document["state"] == "failed"
    assert document["error"]["code"] == "store_not_writable"
    assert hurried.delete(f"/v1/documents/{NEW}").status_code == 200
    assert names(hurried) == {NAME: "complete"}


def test_a_delete_ends_what_runs_under_its_name(hurried: TestClient, engine: FakeEngine) -> None:
    engine.chunks, engine.pause_s = range(1, 2000), 0.005
    engine.stored[NEW] = make_info(NEW, is_complete=False, sealed_tokens=32)
    assert upload(hurried).status_code == 202
    assert names(hurried)[NEW] == "ingesting"
    response = hurried.delete(f"/v1/documents/{NEW}")
    assert response.json() == {"object": "document", "name": NEW, "deleted": True}
    assert engine.ended == ["IngestCancelled"]
    assert NEW not in engine.stored
    assert hurried.get(f"/v1/documents/{NEW}").status_code == 404
    assert hurried.get(f"/v1/documents/{NEW}/events").status_code == 404


def test_a_document_is_deleted_once(service: TestClient, engine: FakeEngine) -> None:
    assert service.delete(f"/v1/documents/{NAME}").status_code == 200
    assert engine.stored == {}
    response = service.delete(f"/v1/documents/{NAME}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "document_not_found")
    assert repr(NAME) in response.json()["error"]["message"]


def test_a_document_that_is_read_is_not_deleted(
    service: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> None:
        raise DocumentBusy("document 'boxes' is open; limit none; try again")

    monkeypatch.setattr(engine, "remove", refuse)
    assert service.delete(f"/v1/documents/{NAME}").status_code == 409


def test_states_are_those_of_the_store(service: TestClient, engine: FakeEngine) -> None:
    engine.stored["part"] = make_info("part", is_complete=False, document_hash=None)
    engine.stored["torn"] = make_info("torn", is_complete=False, damage="manifest: cut")
    assert names(service) == {NAME: "complete", "part": "incomplete", "torn": "damaged"}
    assert events(service, NAME) == [
        (
            "done",
            {
                "name": NAME,
                "document_hash": engine.stored[NAME].document_hash,
                "num_tokens": 70,
                "computed_tokens": 0,
                "was_complete": True,
                "prefill_s": 0.0,
                "cluster_s": 0.0,
                "write_s": 0.0,
                "total_s": 0.0,
            },
        )
    ]
    kind, data = events(service, "part")[0]
    assert (kind, data["error"]["code"]) == ("error", "document_incomplete")

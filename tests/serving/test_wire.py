"""Requests of any shape are understood or refused, never a fault of the server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.testclient import TestClient

from kv_store import DocumentInfo, InvalidName
from kv_store.paths import check_name
from orchestrator import ingest
from orchestrator.cluster.executor import StepProgress
from orchestrator.serving import wire
from orchestrator.serving.app import create_app
from orchestrator.serving.settings import ServiceSettings
from orchestrator.serving.wire import DocumentName, IngestSettings, Upload
from orchestrator.serving.wire_chat import ChatRequest
from tests.serving.conftest import LOCAL
from tests.serving.fakes import MODEL, NAME, FakeEngine

SMALL = 2000
JSON = "application/json"
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [MODEL, NAME, "user", "system", "text", "12.5%", "centroid", "\ud800", "\x00"]
    )
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner)
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "x"]), "content": VALUES}
)


def mutants(kind: type[BaseModel], valid: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A valid request with some fields exchanged for anything."""
    changes = st.dictionaries(st.sampled_from(sorted(kind.model_fields)), VALUES, max_size=3)
    return changes.map(lambda change: {**valid, **change})


CHATS = mutants(
    ChatRequest,
    {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "documents": [NAME]},
) | st.fixed_dictionaries(
    {
        "model": st.just(MODEL),
        "documents": st.just([NAME]),
        "messages": st.lists(MESSAGES, max_size=3),
        "selection": VALUES,
    }
)
UPLOADS = mutants(Upload, {"name": "new", "text": "a"}) | st.builds(
    lambda options: {"name": "new", "text": "a", "options": options}, mutants(IngestSettings, {})
)


@pytest.fixture(scope="module")
def service() -> Iterator[TestClient]:
    """One service for all examples."""
    settings = ServiceSettings(model=MODEL, max_request_bytes=SMALL, max_document_bytes=SMALL)
    app = create_app(FakeEngine(pieces=("a",)), settings)
    with TestClient(app, base_url=LOCAL, raise_server_exceptions=False) as client:
        yield client


def check_answer(response: Any) -> None:
    """Understood, or refused with an error of the standard's shape."""
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 1000


@given(body=CHATS)
def test_any_chat_is_understood_or_refused(service: TestClient, body: dict[str, Any]) -> None:
    content = json.dumps(body)
    response = service.post("/v1/chat/completions", content=content, headers={"Content-Type": JSON})
    check_answer(response)


@given(body=UPLOADS)
def test_any_upload_is_understood_or_refused(service: TestClient, body: dict[str, Any]) -> None:
    content = json.dumps(body)
    check_answer(service.post("/v1/documents", content=content, headers={"Content-Type": JSON}))


@given(
    content=st.binary(max_size=200),
    kind=st.sampled_from(
        [JSON, "text/plain", "multipart/form-data; boundary=x", "multipart/form-data", "x", ""]
    ),
    path=st.sampled_from(["/v1/documents", "/v1/documents?name=a", "/v1/chat/completions"]),
)
def test_any_bytes_are_understood_or_refused(
    service: TestClient, content: bytes, kind: str, path: str
) -> None:
    for data in (content, b"--x\r\n" + content, b'{"model": ' + content):
        check_answer(service.post(path, content=data, headers={"Content-Type": kind}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"[" * 1900,
        b'{"a":' * 300,
        b"9" * 1900,
        b'{"model": 1e999}',
        b'{"model": NaN}',
        b'{"model": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"model": "\xff"}',
        b"\x80\x04\x95",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/documents"])
def test_json_that_breaks_parsers_is_refused(
    service: TestClient, path: str, content: bytes
) -> None:
    response = service.post(path, content=content, headers={"Content-Type": JSON})
    check_answer(response)
    assert response.status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/documents"])
def test_a_body_is_counted_while_it_is_read(service: TestClient, path: str) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100 * SMALL:
            sent += 100
            yield b" " * 100

    announced = service.post(path, content=b" " * (SMALL + 1), headers={"Content-Type": JSON})
    counted = service.post(path, content=endless(), headers={"Content-Type": JSON})
    for response in (announced, counted):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert str(SMALL) in response.json()["error"]["message"]
    fits = service.post(path, content=b" " * SMALL, headers={"Content-Type": JSON})
    assert fits.status_code == 400


def test_uploads_have_a_limit_of_their_own(
    open_service: Callable[..., TestClient], engine: FakeEngine
) -> None:
    service = open_service(max_request_bytes=100, max_document_bytes=SMALL)
    body = {"name": "new", "text": "a" * 500}
    assert service.post("/v1/documents", json=body).status_code == 202
    assert service.post("/v1/chat/completions", json=body).status_code == 413
    files = {"file": ("a.txt", b"a" * SMALL)}
    assert service.post("/v1/documents", files=files).status_code == 413


@pytest.mark.parametrize(
    ("sent", "made"),
    [
        (wire.IngestProgress, ingest.Progress),
        (wire.IngestReport, ingest.IngestReport),
        (wire.Document, DocumentInfo),
        (wire.EngineProgress, StepProgress),
    ],
)
def test_replies_have_the_fields_of_the_engine(sent: type[BaseModel], made: type) -> None:
    added = {"state", "progress", "error"} if sent is wire.Document else set()
    assert set(sent.model_fields) - added == {field.name for field in fields(made)}


def test_settings_are_the_engines_options() -> None:
    options = ingest.IngestOptions()
    assert ingest.IngestOptions(**IngestSettings().model_dump()) == options


@given(name=st.text(max_size=4) | st.from_regex(r"[A-Za-z0-9._-]{1,102}", fullmatch=True))
def test_names_are_those_of_the_store(name: str) -> None:
    def is_taken(check: Callable[[str], object], refusal: type[Exception]) -> bool:
        try:
            check(name)
        except refusal:
            return False
        return True

    on_wire = is_taken(TypeAdapter(DocumentName).validate_python, ValidationError)
    assert on_wire == is_taken(check_name, InvalidName)


def test_the_description_of_the_routes_is_complete(service: TestClient) -> None:
    document = service.get("/openapi.json").json()
    references = set(find_references(document))
    assert "#/components/schemas/ChatRequest" in references
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references <= known


def find_references(value: Any) -> Iterator[str]:
    """Every `$ref` in a JSON document."""
    if isinstance(value, dict):
        yield from (ref for key, ref in value.items() if key == "$ref")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from find_references(inner)

"""Chat completions: what reaches the engine, what comes back, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from collectives.errors import PeerLost
from kv_store import DocumentBusy, StoreFull
from orchestrator.errors import (
    ContextTooLong,
    LongspanError,
    NotAdmitted,
    RankFailed,
    UsageError,
)
from orchestrator.serving.completions import Trimmer
from tests.serving.fakes import MODEL, NAME, FakeEngine, make_answer

QUESTION = {"role": "user", "content": "How many?"}


def request(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [QUESTION], "documents": [NAME], **changes}


def ask(service: TestClient, **changes: Any) -> Any:
    response = service.post("/v1/chat/completions", json=request(**changes))
    assert response.status_code == 200, response.text
    return response.json()


def refuse(service: TestClient, status: int, **changes: Any) -> dict[str, Any]:
    response = service.post("/v1/chat/completions", json=request(**changes))
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


def stream(service: TestClient, **changes: Any) -> list[Any]:
    """The chunks of a stream that ends as it must."""
    body = request(stream=True, **changes)
    response = service.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def test_a_whole_answer_has_the_standard_fields_and_ours(service: TestClient) -> None:
    answer = ask(service)
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Nine marbles."},
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 80,
        "completion_tokens": 3,
        "total_tokens": 83,
        "prompt_tokens_details": {"cached_tokens": 70},
    }
    assert answer["longspan"] == json.loads(json.dumps(make_answer().to_json()))


def test_a_bare_question_has_the_engines_defaults(service: TestClient, engine: FakeEngine) -> None:
    ask(service)
    assert engine.asked == [
        {
            "name": NAME,
            "question": "How many?",
            "mode": "auto",
            "budget": None,
            "mass": None,
            "max_tokens": 128,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
            "system": None,
        }
    ]


def test_every_option_reaches_the_engine(service: TestClient, engine: FakeEngine) -> None:
    ask(
        service,
        messages=[{"role": "system", "content": "Be brief."}, QUESTION],
        selection={"mode": "centroid", "budget": "12.5%"},
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
    )
    assert engine.asked[0] == {
        "name": NAME,
        "question": "How many?",
        "mode": "centroid",
        "budget": "12.5%",
        "mass": None,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "system": "Be brief.",
    }


def test_content_may_be_parts_of_text(service: TestClient, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
    ask(service, messages=[{"role": "user", "content": parts}])
    assert engine.asked[0]["question"] == "How many?"


def test_fields_that_ask_for_nothing_are_taken(service: TestClient) -> None:
    ask(service, n=1, stop=None, tools=[], logprobs=False, frequency_penalty=0, user="me")
    ask(service, response_format={"type": "text"}, tool_choice="none", metadata={"a": "b"})


def test_a_stream_is_role_then_text_then_the_reason(service: TestClient) -> None:
    first, *middle, last = stream(service)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "Nine marbles."
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert last["longspan"]["document"]["name"] == NAME
    for chunk in (first, *middle):
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["id"] == last["id"]
        assert chunk["choices"][0]["finish_reason"] is None
        assert {"usage", "longspan"}.isdisjoint(chunk)


def test_usage_comes_last_without_choices(service: TestClient) -> None:
    *_, end, last = stream(service, stream_options={"include_usage": True})
    assert end["choices"][0]["finish_reason"] == "stop"
    assert "longspan" not in end
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 70}
    assert last["longspan"]["recall"]["mass_mean"] == 0.9


def test_a_stream_has_the_text_of_the_whole_answer(service: TestClient, engine: FakeEngine) -> None:
    engine.pieces = ("  ", " \n a", "  ", "b ", "c", " ", "\n")
    whole = ask(service)["choices"][0]["message"]["content"]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream(service)]
    assert "".join(pieces) == whole == "a  b c"


def test_a_text_of_white_space_alone_is_empty() -> None:
    trimmer = Trimmer()
    assert [trimmer.push(piece) for piece in (" ", "\n", "")] == ["", "", ""]


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 2),
        ("n", 0),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"5": 1}),
        ("stop", ["\n"]),
        ("response_format", {"type": "json_object"}),
        ("frequency_penalty", 0.5),
        ("audio", {}),
        ("store", True),
        ("unheard_of", 1),
        ("max_tokens", 0),
        ("max_tokens", 1 << 40),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 3),
        ("top_p", 0),
        ("seed", -1),
        ("seed", 1 << 63),
        ("stream", "yes"),
        ("user", "x" * 513),
        ("messages", []),
        ("documents", []),
        ("documents", ["a", "b"]),
        ("documents.0", ["../etc/passwd"]),
        ("documents.0", ["x" * 101]),
        ("selection.mode", {"mode": "psychic"}),
        ("selection.depth", {"depth": 3}),
        ("selection.budget", {"budget": True}),
        ("selection.budget", {"budget": "9" * 25}),
        ("selection.mass", {"mass": 0}),
        ("selection.mass", {"mass": 1.5}),
        ("stream_options.include_everything", {"include_everything": True}),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    service: TestClient, engine: FakeEngine, param: str, value: object
) -> None:
    error = refuse(service, 400, **{param.split(".", maxsplit=1)[0]: value})
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"
    assert engine.asked == []


@pytest.mark.parametrize(
    ("messages", "value"),
    [
        ([QUESTION, {"role": "assistant", "content": "Nine."}, QUESTION], "earlier turns"),
        ([{"role": "tool", "content": "9", "tool_call_id": "a"}, QUESTION], "earlier turns"),
        ([QUESTION, QUESTION], "2 user"),
        ([{"role": "system", "content": "a"}], "0 user"),
        ([{"role": "system", "content": "a"}] * 2 + [QUESTION], "2 system"),
        ([QUESTION, {"role": "system", "content": "a"}], "limit one"),
        ([{"role": "user", "content": ""}], "content"),
        ([{"role": "user", "content": " \n"}], "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text"),
        ([{"role": "poet", "content": "a"}], "role"),
        (["a"], "messages.0"),
    ],
)
def test_only_one_question_is_read(service: TestClient, messages: list[Any], value: str) -> None:
    error = refuse(service, 400, messages=messages)
    assert value in error["message"]
    assert error["param"].startswith("messages")


def test_two_limits_that_differ_are_refused(service: TestClient) -> None:
    assert refuse(service, 400, max_tokens=5, max_completion_tokens=6)["param"] == "max_tokens"
    ask(service, max_tokens=5, max_completion_tokens=5)


def test_budget_and_mass_exclude_each_other(service: TestClient) -> None:
    error = refuse(service, 400, selection={"budget": 5, "mass": 0.5})
    assert error["code"] == "usage_error"
    assert refuse(service, 400, selection={"budget": "0%"})["code"] == "usage_error"


def test_no_document_says_how_to_name_one(service: TestClient) -> None:
    assert "extra_body" in refuse(service, 400, documents=[])["message"]


def test_what_is_unknown_is_not_found(service: TestClient) -> None:
    assert refuse(service, 404, model="gpt-4")["code"] == "model_not_found"
    for is_stream in (True, False):
        error = refuse(service, 404, documents=["nobody"], stream=is_stream)
        assert error["code"] == "document_not_found"
        assert "'nobody'" in error["message"]
        assert "/secret" not in error["message"]


PEER_LOST = PeerLost(rank=0, operation="gather", peer=1, timeout_s=30, cause="/secret")


class NotYetNamed(LongspanError):
    """A fault that this service does not know."""


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (ContextTooLong("90 tokens; limit 80; ask less"), 400, "context_too_long"),
        (UsageError("a; b; c"), 400, "usage_error"),
        (DocumentBusy("busy; wait"), 409, "document_busy"),
        (StoreFull("cannot write /secret"), 507, "store_full"),
        (NotAdmitted("document needs 9 GiB; limit 8; shorten it"), 503, "not_admitted"),
        (RankFailed("rank 1: /secret"), 500, "rank_failed"),
        (PEER_LOST, 503, "peer_lost"),
        (NotYetNamed("new; limit; remedy"), 500, "not_yet_named"),
        (RuntimeError("/secret"), 500, "server_fault"),
        (MemoryError(), 500, "server_fault"),
    ],
)
def test_the_engines_faults_have_a_status(
    service: TestClient, engine: FakeEngine, fault: BaseException, status: int, code: str
) -> None:
    engine.ask_error = fault
    error = refuse(service, status)
    assert error["code"] == code
    assert "/secret" not in error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")


def test_a_fault_before_the_first_piece_has_its_status_in_a_stream_too(
    service: TestClient, engine: FakeEngine
) -> None:
    engine.ask_error, engine.fails_early = ContextTooLong("90 tokens; limit 80; less"), True
    assert refuse(service, 400, stream=True)["code"] == "context_too_long"


def test_a_fault_after_the_first_piece_ends_the_stream(
    service: TestClient, engine: FakeEngine
) -> None:
    engine.ask_error = RuntimeError("/secret")
    response = service.post("/v1/chat/completions", json=request(stream=True))
    *_, last = [line for line in response.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_fault"
    assert "/secret" not in response.text


def test_more_questions_than_may_run_are_refused(
    open_service: Callable[..., TestClient], engine: FakeEngine
) -> None:
    error = refuse(open_service(max_questions=0), 429)
    assert error["code"] == "too_busy"
    assert error["type"] == "rate_limit_error"
    assert engine.asked == []

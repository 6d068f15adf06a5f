"""A tiny model behind a real port, asked by the official `openai` package and by our own client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI

from orchestrator import Client, Engine
from orchestrator.errors import ContextTooLong
from orchestrator.serving.server import BackgroundServer
from orchestrator.serving.settings import ServiceSettings
from orchestrator.serving.wire import IngestProgress
from tests.tiny_model import MAX_CONTEXT_TOKENS, QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

MODEL, NAME, KEY = "tiny", "boxes", "a-key-of-this-test"
NUM_TOKENS = len("<user\n") + len(TEXT)
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
EXTRA = {"documents": [NAME]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundServer]:
    folder = tmp_path_factory.mktemp("served")
    model = save_tiny_model(folder / "model")
    settings = ServiceSettings(model=MODEL, api_key=KEY)
    with (
        Engine.load(str(model), store=folder / "store", threads=1) as engine,
        BackgroundServer(engine, settings) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[Client]:
    """Has uploaded one document."""
    with Client(server.url, api_key=KEY) as client:
        client.ingest(text=TEXT, name=NAME, segment_tokens=SEGMENT_TOKENS)
        yield client


@pytest.fixture(scope="module")
def official(server: BackgroundServer, client: Client) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as official:
        yield official


def test_the_official_client_asks(official: OpenAI, client: Client) -> None:
    answer = official.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=16, extra_body=EXTRA
    )
    ours = client.ask(NAME, QUESTION, max_tokens=16)
    assert answer.choices[0].message.content == ours.text
    assert answer.choices[0].finish_reason == ours.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == NUM_TOKENS
    assert answer.usage.total_tokens == ours.usage.prompt_tokens + ours.usage.completion_tokens
    assert answer.model_extra is not None
    added = answer.model_extra["longspan"]
    assert added["document"]["name"] == NAME
    assert added["stack"]["hash"] == ours.stack["hash"]


def test_the_official_client_streams(official: OpenAI, client: Client) -> None:
    stream = official.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={**EXTRA, "selection": {"mode": "centroid", "budget": "25%"}},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == client.ask(NAME, QUESTION, mode="centroid", budget="25%", max_tokens=16).text
    assert chunks[-2].choices[0].finish_reason in ("length", "stop")
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].model_extra is not None
    added = chunks[-1].model_extra["longspan"]
    assert added["selection"]["mode"] == "centroid"
    assert 0 < added["recall"]["mass_mean"] <= 1
    for span in added["evidence"]:
        assert TEXT[span["start_char"] : span["end_char"]] == span["text"]


def test_the_official_client_understands_refusals(server: BackgroundServer) -> None:
    def ask(key: str = KEY, model: str = MODEL, **changes: Any) -> None:
        with OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as official:
            official.chat.completions.create(
                model=model, messages=MESSAGES, **{"extra_body": EXTRA, **changes}
            )

    with pytest.raises(openai.AuthenticationError):
        ask(key="wrong")
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        ask(model="gpt-4")
    with pytest.raises(openai.NotFoundError, match="nobody"):
        ask(extra_body={"documents": ["nobody"]})
    with pytest.raises(openai.BadRequestError, match="field n is 2"):
        ask(n=2)
    with pytest.raises(openai.BadRequestError, match=str(MAX_CONTEXT_TOKENS)) as caught:
        ask(max_tokens=MAX_CONTEXT_TOKENS)
    assert caught.value.code == "context_too_long"


def test_models_are_listed(official: OpenAI) -> None:
    assert [model.id for model in official.models.list()] == [MODEL]
    assert official.models.retrieve(MODEL).owned_by == "longspan"


@pytest.mark.parametrize("mode", ["exact", "centroid"])
def test_eight_questions_at_once_are_answered_as_one_at_a_time(client: Client, mode: Any) -> None:
    def ask(number: int) -> str:
        question = f"How many marbles does box {number} hold?"
        answer = client.ask(NAME, question, mode=mode, temperature=1.5, seed=number, max_tokens=12)
        return answer.text

    alone = [ask(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone
    assert len(set(alone)) > 1


def test_a_document_comes_and_goes(client: Client) -> None:
    told: list[IngestProgress] = []
    report = client.ingest(
        text=TEXT, name="twin", segment_tokens=SEGMENT_TOKENS, on_progress=told.append
    )
    stored = {document.name: document for document in client.docs()}
    assert report.computed_tokens == report.num_tokens == NUM_TOKENS
    assert told[-1].done_tokens == NUM_TOKENS
    assert stored["twin"].document_hash == stored[NAME].document_hash == report.document_hash
    again = client.ingest(text=TEXT, name="twin", segment_tokens=SEGMENT_TOKENS)
    assert again.was_complete
    client.remove("twin")
    assert [document.name for document in client.docs()] == [NAME]
    with pytest.raises(ContextTooLong, match=str(MAX_CONTEXT_TOKENS)):
        client.ingest(text="x" * MAX_CONTEXT_TOKENS, name="long")
    assert [document.name for document in client.docs()] == [NAME]


def test_a_reader_who_stops_reading_ends_the_answer(client: Client) -> None:
    class Enough(Exception):
        pass

    def stop(_: str) -> None:
        raise Enough

    with pytest.raises(Enough):
        client.ask(NAME, QUESTION, max_tokens=500, on_token=stop)
    assert client.ask(NAME, QUESTION, max_tokens=4).usage.completion_tokens <= 4
    assert client.health().ranks[0].steps > 0

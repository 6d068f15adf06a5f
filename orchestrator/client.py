"""The verbs of the embedded API over HTTP: a client of `longspan serve` that needs no torch.

Owns requests and the following of events; the shapes are those of `serving/wire.py`. Faults come
back as the classes that the server raised, or as RemoteFault with their name in `code` where those
are the store's; nothing is retried.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx2
from httpx2 import EventSource
from pydantic import BaseModel, ValidationError

from orchestrator import sources
from orchestrator.errors import LongspanError, UsageError
from orchestrator.serving.answers import read_answer, read_fault
from orchestrator.serving.errors import ServerFault, ServerUnreachable
from orchestrator.serving.wire import (
    Document,
    DocumentList,
    ErrorBody,
    Health,
    IngestProgress,
    IngestReport,
    ModelList,
)
from orchestrator.types import Answer, Mode

DEFAULT_URL = "http://127.0.0.1:8000"
# Of one event: its evidence quotes the document.
MAX_EVENT_BYTES = 64 << 20
Body = TypeVar("Body", bound=BaseModel)


class Client:
    """Talks to one server; close it, or use it as a context manager.

    timeout_s: of silence; a server that works sends at least a comment every ten seconds.
    transport: what carries requests instead of a socket, for tests.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._http = httpx2.Client(
            base_url=base_url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=timeout_s,
            transport=transport,
        )
        self._model: str | None = None

    def ingest(
        self,
        source: str | Path | None = None,
        *,
        text: str | None = None,
        name: str | None = None,
        segment_tokens: int = 8192,
        window: int = 64,
        kv_dtype: Literal["float32", "bfloat16", "fp8"] | None = None,
        prefill: Literal["exact", "sparse"] = "exact",
        prefill_budget: str | int | None = None,
        system: str | None = None,
        replace: bool = False,
        restart: bool = False,
        on_progress: Callable[[IngestProgress], None] | None = None,
    ) -> IngestReport:
        """Upload a file (or "-", or `text` itself) under `name`, and wait until it is ingested.

        An ingest goes on at the server if this call is interrupted; `remove` ends it.
        """
        if (source is None) == (text is None):
            raise UsageError(
                "ingest needs a source or a text, and exactly one of them; give a path or text=..."
            )
        if source is not None:
            name, text = name or sources.default_name(source), sources.read_text(source)
        options = {
            "segment_tokens": segment_tokens,
            "window": window,
            "kv_dtype": kv_dtype,
            "prefill": prefill,
            "prefill_budget": prefill_budget,
            "system": system,
            "replace": replace,
            "restart": restart,
        }
        upload = {"name": name or "", "text": text, "options": options}
        self._request("POST", "/v1/documents", upload)
        return self.follow(name or "", on_progress=on_progress)

    def follow(
        self, name: str, *, on_progress: Callable[[IngestProgress], None] | None = None
    ) -> IngestReport:
        """Wait for the end of an ingest that runs at the server; its report, also afterwards."""
        report: IngestReport | None = None
        with self._events("GET", f"{_path(name)}/events") as events:
            for event in events:
                if event.event == "error":
                    raise _fault(event.data, status=events.response.status_code)
                if event.event == "done":
                    report = _parse(IngestReport, event.data)
                elif on_progress is not None:
                    on_progress(_parse(IngestProgress, event.data))
        if report is None:
            raise self._cut_short()
        return report

    def ask(
        self,
        name: str,
        question: str,
        *,
        mode: Mode = "auto",
        budget: str | int | None = None,
        mass: float | None = None,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        on_token: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question about an ingested document; on_token receives the text as it comes.

        `selection.levels` of the answer is always None: it is not sent.
        """
        before = [] if system is None else [{"role": "system", "content": system}]
        body = {
            "model": self._served_model(),
            "messages": [*before, {"role": "user", "content": question}],
            "documents": [name],
            "selection": {"mode": mode, "budget": budget, "mass": mass},
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "stream": True,
        }
        tell = on_token or _ignore
        answer: Answer | None = None
        with self._events("POST", "/v1/chat/completions", body) as events:
            for event in events:
                if event.data == "[DONE]":
                    continue
                chunk = json.loads(event.data)
                if "error" in chunk:
                    raise _fault(event.data, status=events.response.status_code)
                if "longspan" in chunk:
                    answer = read_answer(chunk["longspan"])
                for piece in _pieces(chunk):
                    tell(piece)
        if answer is None:
            raise self._cut_short()
        return answer

    def docs(self) -> list[Document]:
        """Documents of the server's store, and those that are being ingested."""
        return _parse(DocumentList, self._request("GET", "/v1/documents")).data

    def remove(self, name: str) -> None:
        """Delete a document; an ingest that runs under its name is ended."""
        self._request("DELETE", _path(name))

    def models(self) -> list[str]:
        """Names of the models that can be asked: one."""
        return [card.id for card in _parse(ModelList, self._request("GET", "/v1/models")).data]

    def health(self) -> Health:
        """What the server is doing; needs no key."""
        return _parse(Health, self._request("GET", "/health/progress"))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _served_model(self) -> str:
        if self._model is None:
            self._model = self.models()[0]
        return self._model

    def _request(self, method: str, path: str, body: object = None) -> str:
        """The body of a response. Raises the server's fault, or ServerUnreachable."""
        with self._named_faults():
            response = self._http.request(method, path, json=body)
            _check(response)
            return response.text

    @contextmanager
    def _events(self, method: str, path: str, body: object = None) -> Iterator[EventSource]:
        """The events of a response. Raises the server's fault, or ServerUnreachable."""
        with (
            self._named_faults(),
            self._http.sse(
                path, method=method, json=body, max_event_size=MAX_EVENT_BYTES
            ) as events,
        ):
            _check(events.response)
            yield events

    @contextmanager
    def _named_faults(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise ServerUnreachable(
                f"server {self._http.base_url} does not answer ({type(error).__name__}: {error}); "
                "it must run and be reachable; start it with `longspan serve`, or correct the URL"
            ) from error

    def _cut_short(self) -> ServerUnreachable:
        return ServerUnreachable(
            f"server {self._http.base_url} ended its answer before the end; was it stopped? ask "
            "again"
        )


def _path(name: str) -> str:
    return f"/v1/documents/{quote(name, safe='')}"


def _parse(kind: type[Body], data: str) -> Body:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise ServerFault(
            f"the server's answer is no {kind.__name__} ({len(data)} bytes); a server of this "
            "version sends one; is it `longspan serve`?"
        ) from error


def _check(response: httpx2.Response) -> None:
    """Raise the fault of a response that is not a success."""
    if not response.is_success:
        response.read()
        raise _fault(response.text, status=response.status_code)


def _fault(body: str, *, status: int) -> LongspanError:
    return read_fault(_parse(ErrorBody, body).error, status=status)


def _pieces(chunk: dict[str, Any]) -> Iterator[str]:
    """The text that a chunk adds."""
    for choice in chunk["choices"]:
        if piece := choice["delta"].get("content"):
            yield piece


def _ignore(_: str) -> None:
    """For an answer that nobody wants to see grow."""

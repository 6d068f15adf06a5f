"""`/v1/chat/completions`: one question about one document, whole or as a stream.

Owns how a request becomes a question, and how the engine's pieces become an answer. A client that
goes ends its question.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from orchestrator.selection import check_request
from orchestrator.serving.bodies import json_body, json_schema
from orchestrator.serving.calls import Call
from orchestrator.serving.completions import Completion, Trimmer
from orchestrator.serving.errors import InvalidRequest
from orchestrator.serving.events import DONE, KEEP_ALIVE, EventStream, format_event
from orchestrator.serving.faults import describe_error, log_fault
from orchestrator.serving.routes.models import check_model
from orchestrator.serving.service import ServiceDep
from orchestrator.serving.wire import ErrorBody
from orchestrator.serving.wire_chat import ChatCompletion, ChatRequest, SelectionRequest
from orchestrator.types import Answer, AskOptions, Sampling

router = APIRouter(prefix="/v1/chat", tags=["chat"])
Feed = AsyncGenerator[str | Future[Answer] | None, None]
CLIENT_GONE = 499


@router.post("/completions", response_model=ChatCompletion, openapi_extra=json_schema(ChatRequest))
async def complete(
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
    request: Request,
    service: ServiceDep,
) -> ChatCompletion | Response:
    """Answer a question about a document: at once, or with `stream` as events up to [DONE]."""
    check_model(service, body.model)
    document, options = find_document(body), ask_options(body)
    call = service.ask(document, body.messages[-1].content, options)
    feed = _feed(call, beat_s=service.settings.keep_alive_s)
    completion = Completion(model=body.model)
    if not body.stream:
        return await _whole(completion, feed, request)
    # What is refused before the first piece is refused with its own status.
    first = await anext(feed)
    if isinstance(first, Future):
        first.result()
    includes_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(_events(completion, first, feed, includes_usage=includes_usage))


def find_document(body: ChatRequest) -> str:
    """The one document of a question. Raises InvalidRequest."""
    if len(body.documents) != 1:
        raise InvalidRequest(
            f"field documents has {len(body.documents)} names; limit exactly one for now; send "
            '"documents": ["NAME"] (in the openai package: extra_body={"documents": ["NAME"]})',
            param="documents",
        )
    return body.documents[0]


def ask_options(body: ChatRequest) -> AskOptions:
    """The options of a question, the engine's own defaults where the request has none.

    Raises UsageError for a selection that no document could answer, InvalidRequest for two limits.
    """
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequest(
            f"field max_tokens is {body.max_tokens} and max_completion_tokens "
            f"{body.max_completion_tokens}; they are one limit; send one of them",
            param="max_tokens",
        )
    selection = body.selection or SelectionRequest()
    first = body.messages[0]
    default = AskOptions()
    options = AskOptions(
        mode=selection.mode,
        budget=selection.budget,
        mass=selection.mass,
        max_tokens=body.max_tokens or body.max_completion_tokens or default.max_tokens,
        sampling=Sampling(
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed or 0,
        ),
        system=None if first.role == "user" else first.content,
    )
    check_request(options)
    return options


async def _feed(call: Call[str, Answer], *, beat_s: float) -> Feed:
    """Pieces, None where none came in time, and last the finished call; closing it cancels that."""
    try:
        while True:
            item = await call.next(within_s=beat_s)
            yield item
            if isinstance(item, Future):
                return
    finally:
        call.cancel()


async def _whole(completion: Completion, feed: Feed, request: Request) -> ChatCompletion | Response:
    async with aclosing(feed):
        async for item in feed:
            if isinstance(item, Future):
                return completion.whole(item.result())
            if await request.is_disconnected():
                break
    return Response(status_code=CLIENT_GONE)


async def _events(
    completion: Completion,
    first: str | Future[Answer] | None,
    feed: Feed,
    *,
    includes_usage: bool,
) -> AsyncGenerator[bytes, None]:
    trimmer = Trimmer()
    item = first
    async with aclosing(feed):
        yield format_event(completion.opening())
        while not isinstance(item, Future):
            if item is None:
                yield KEEP_ALIVE
            elif text := trimmer.push(item):
                yield format_event(completion.piece(text))
            item = await anext(feed)
        for line in _ending(completion, item, includes_usage=includes_usage):
            yield line


def _ending(completion: Completion, ended: Future[Answer], *, includes_usage: bool) -> list[bytes]:
    """The last events: of an answer, or of a fault that came after the first piece."""
    error = ended.exception()
    if error is not None:
        log_fault(error)
        return [format_event(ErrorBody(error=describe_error(error)).model_dump_json())]
    lines = completion.closing(ended.result(), includes_usage=includes_usage)
    return [*(format_event(line) for line in lines), DONE]

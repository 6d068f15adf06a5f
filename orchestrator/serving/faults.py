"""From an exception to an HTTP response: owns which fault has which status, and its JSON form.

What has a name of ours is told as it is, unless it may hold a path or a trace of this machine;
anything else is `server_fault` without details. The log has all of them. Knows no routes.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from collectives.errors import CollectivesError
from kv_store.errors import (
    DocumentBusy,
    DocumentExists,
    DocumentIncomplete,
    DocumentNotFound,
    InvalidName,
    ResumeRefused,
    StoreError,
    StoreFull,
    StoreNotWritable,
)
from orchestrator.errors import (
    ContextTooLong,
    InputError,
    LongspanError,
    ModelMismatch,
    ModelNotFound,
    NotAdmitted,
    PlanRefused,
    RankFailed,
    RankMismatch,
    TopologyInvalid,
)
from orchestrator.serving.errors import (
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
    ServerFault,
    ServiceError,
    ShuttingDown,
    TooBusy,
    error_code,
)
from orchestrator.serving.wire import ErrorBody, ErrorDetail
from sparse_attn.errors import AttentionError

LOG = logging.getLogger("longspan.serving")
RETRY_AFTER_S = 1
_MAX_SHOWN_CHARS = 60
Kinds = tuple[type[Exception], ...]
# Whoever has no place here and is no misuse is a 500.
_STATUSES: dict[int, Kinds] = {
    400: (InvalidName, InputError, ContextTooLong, PlanRefused),
    404: (DocumentNotFound, ModelNotFound),
    409: (
        DocumentBusy,
        DocumentExists,
        DocumentIncomplete,
        ResumeRefused,
        ModelMismatch,
        TopologyInvalid,
    ),
    503: (NotAdmitted, RankMismatch, CollectivesError),
    507: (StoreFull,),
}
_UNTOLD: dict[Kinds, str] = {
    (StoreFull, StoreNotWritable): (
        "the server's store cannot be written; what is finished is kept; see the server's log"
    ),
    (RankFailed, RankMismatch, CollectivesError): (
        "the ranks of this server could not compute this together; see /health and the server's log"
    ),
    (TopologyInvalid,): (
        "that machine has not been measured at this server; limit 1xH100 and the like; run "
        "longspan calibrate there"
    ),
}
# Faults that are one line each, made to be shown.
NAMED: Kinds = (LongspanError, StoreError, AttentionError, CollectivesError)
# After these the rest of the body is not even read to be thrown away.
_UNREAD = (401, 403, 413)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def find_status(error: BaseException) -> int:
    """The HTTP status of a fault; 500 for one that has no name of ours."""
    if isinstance(error, ServiceError):
        return error.status
    known = (status for status, kinds in _STATUSES.items() if isinstance(error, kinds))
    return next(known, 400 if getattr(error, "exit_code", 1) == 2 else 500)


def describe_error(error: BaseException) -> ErrorDetail:
    """What a client may know about a fault."""
    status = find_status(error)
    return ErrorDetail(
        message=" ".join(_message(error).split()),
        type=_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        param=getattr(error, "param", None),
        code=error_code(type(error) if isinstance(error, NAMED) else ServerFault),
    )


def log_fault(error: BaseException) -> None:
    """Keep for the operator what the client is not told."""
    if find_status(error) >= 500:
        LOG.error("request failed", exc_info=error)


def forget_frames(error: BaseException) -> None:
    """Let go of what an error's frames hold, so that it may be kept: a document's text, say."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__


def error_response(error: BaseException) -> JSONResponse:
    """The response for a fault."""
    status = find_status(error)
    is_brief = isinstance(error, TooBusy | ShuttingDown)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if is_brief else {}
    if status in _UNREAD:
        headers["Connection"] = "close"
    if isinstance(error, InvalidApiKey):
        headers["WWW-Authenticate"] = "Bearer"
    body = ErrorBody(error=describe_error(error)).model_dump()
    return JSONResponse(body, status_code=status, headers=headers)


def invalid_request(error: ValidationError | RequestValidationError) -> InvalidRequest:
    """The first fault that validation found, as one line."""
    first, is_query = error.errors()[0], isinstance(error, RequestValidationError)
    place = ".".join(str(step) for step in first["loc"][is_query:])
    reason = first["msg"].removeprefix("Value error, ").rstrip(".")
    if not place:
        return InvalidRequest(f"the body is not what this route reads: {reason}; correct it")
    found = "missing" if first["type"] == "missing" else repr(first["input"])
    if len(found) > _MAX_SHOWN_CHARS:
        found = f"{found[:_MAX_SHOWN_CHARS]}..."
    remedy = "" if ";" in reason else "; correct it, or leave it out"
    return InvalidRequest(f"field {place} is {found}: {reason}{remedy}", param=place)


def add_error_handlers(app: FastAPI) -> None:
    """Give every fault its response."""

    def respond(_: Request, error: Exception) -> JSONResponse:
        log_fault(error)
        return error_response(error)

    def respond_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(_name_http_error(request, error))

    def respond_query(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(invalid_request(error))

    app.add_exception_handler(RequestValidationError, respond_query)
    for kind in (*NAMED, Exception):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(HTTPException, respond_http)


def _message(error: BaseException) -> str:
    """What a fault says to a client."""
    if isinstance(error, DocumentNotFound):
        what = str(error).partition(":")[0]
        return f"{what} is not in this server's store; GET /v1/documents lists them; upload it"
    if not isinstance(error, NAMED):
        return "the service failed in a way that it has no name for; see the server's log"
    untold = (text for kinds, text in _UNTOLD.items() if isinstance(error, kinds))
    return next(untold, str(error))


def _name_http_error(request: Request, error: HTTPException) -> ServiceError:
    """The framework's own refusals, named as ours are."""
    what = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return RouteNotFound(f"{what} does not exist; /openapi.json lists the routes; correct it")
    if error.status_code == 405:
        return MethodNotAllowed(f"{what} does not exist; the path has other methods; use one")
    return InvalidRequest(f"the body of {what} cannot be read ({error.detail}); correct it")

"""Reads a request's body into a wire type, whatever kind it came as.

Owns the three kinds of an upload: JSON, plain text, and a form with a file. JSON is parsed by
pydantic alone, from the bytes: no number, string or depth that Python would choke on gets further.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import PurePath
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from orchestrator.serving.errors import ContentTypeUnsupported, InvalidRequest
from orchestrator.serving.faults import invalid_request
from orchestrator.serving.wire import IngestSettings, Upload
from orchestrator.sources import decode_text

Body = TypeVar("Body", bound=BaseModel)
MAX_FORM_FIELDS = 16


def json_body(kind: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that reads a JSON body of this kind. Raises InvalidRequest."""

    async def read(request: Request) -> Body:
        _check_content_type(request, "application/json")
        return parse_json(kind, await request.body())

    return read


def json_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says about a route that reads its body by `json_body`."""
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"content": {"application/json": {"schema": reference}}}}


def parse_json(kind: type[Body], data: bytes) -> Body:
    """Raises InvalidRequest for what is not JSON of this kind."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise invalid_request(error) from error


async def read_upload(request: Request) -> Upload:
    """The document of an upload: JSON, text/*, or multipart/form-data with a `file`.

    Of the last two, name and options are form fields or query parameters. Raises InvalidRequest,
    ContentTypeUnsupported, BodyTooLarge, and InputError for what is not text.
    """
    kind = _content_type(request)
    if kind == "application/json":
        upload = parse_json(Upload, await request.body())
        decode_text(upload.text.encode(), what=f"text of document {upload.name!r}")
        return upload
    if kind.startswith("text/"):
        text = decode_text(await request.body(), what="the body")
        return _make_upload(text, request.query_params)
    if kind == "multipart/form-data":
        return await _read_form(request)
    raise ContentTypeUnsupported(
        f"a body of type {kind[:80]!r} is not read; limit application/json, text/plain and "
        "multipart/form-data; set Content-Type"
    )


async def _read_form(request: Request) -> Upload:
    async with request.form(max_files=1, max_fields=MAX_FORM_FIELDS) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest(
                "form field file is missing; a form has the document as its one file; add it",
                param="file",
            )
        text = decode_text(await file.read(), what="the file")
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        stem = {"name": PurePath(file.filename or "").stem}
    return _make_upload(text, {**stem, **request.query_params, **fields})


def _make_upload(text: str, fields: Mapping[str, str]) -> Upload:
    """An upload from fields that are all text: here, and only here, types are converted."""
    options = {name: value for name, value in fields.items() if name != "name"}
    try:
        settings = IngestSettings.model_validate(options, strict=False)
        return Upload.model_validate(
            {"name": fields.get("name", ""), "text": text, "options": settings}
        )
    except ValidationError as error:
        raise invalid_request(error) from error


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_content_type(request: Request, wanted: str) -> None:
    kind = _content_type(request)
    if kind != wanted:
        raise ContentTypeUnsupported(
            f"a body of type {kind[:80]!r} is not read; limit {wanted}; set Content-Type"
        )

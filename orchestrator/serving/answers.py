"""Reads what a server sent back into the types that the embedded API gives: answers and faults.

Owns that translation for the client; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.errors import LongspanError
from orchestrator.serving.errors import RemoteFault, ServerFault, ServiceError, error_code
from orchestrator.serving.wire import ErrorDetail
from orchestrator.types import Answer

_ANSWER = TypeAdapter(Answer)


def read_answer(sent: Mapping[str, Any]) -> Answer:
    """The answer in the object of `ask --json`. Raises ServerFault for another object."""
    try:
        usage, document = sent["usage"], sent["document"]
        return _ANSWER.validate_python(
            {
                **sent,
                "text": sent["answer"],
                "document_name": document["name"],
                "document_hash": document["hash"],
                "usage": {**usage, **usage["prompt_tokens_details"]},
                # The public JSON form leaves it out.
                "selection": {**sent["selection"], "levels": None},
            }
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise ServerFault(
            f"the server's answer has schema {sent.get('schema')!r}, and not all of its fields; "
            "limit schema 1; use a client and a server of one version"
        ) from error


def read_fault(detail: ErrorDetail, *, status: int) -> LongspanError:
    """The fault that the server met, as the class of its name; RemoteFault where that is not one of
    this package's.
    """
    kinds = {error_code(kind): kind for kind in _subclasses(LongspanError)}
    kind = kinds.get(detail.code or "", RemoteFault)
    if issubclass(kind, RemoteFault):
        return RemoteFault(detail.message, status=status, code=detail.code, param=detail.param)
    if issubclass(kind, ServiceError):
        return kind(detail.message, param=detail.param)
    return kind(detail.message)


def _subclasses(kind: type[LongspanError]) -> Iterator[type[LongspanError]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)

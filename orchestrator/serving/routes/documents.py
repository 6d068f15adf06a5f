"""`/v1/documents`: upload, list, look at, delete; and an ingest's progress as events.

Owns how the store's listing and the running ingests become one list. Reads no bodies itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Response
from starlette.concurrency import run_in_threadpool

from kv_store.errors import DocumentIncomplete, DocumentNotFound
from orchestrator.serving.bodies import json_schema, read_upload
from orchestrator.serving.events import KEEP_ALIVE, EventStream, format_event
from orchestrator.serving.faults import describe_error
from orchestrator.serving.jobs import Job, JobState
from orchestrator.serving.service import Service, ServiceDep
from orchestrator.serving.wire import (
    AcceptedUpload,
    Document,
    DocumentDeleted,
    DocumentList,
    DocumentState,
    ErrorBody,
    IngestProgress,
    IngestReport,
    Upload,
)

if TYPE_CHECKING:
    from kv_store import DocumentInfo

router = APIRouter(prefix="/v1/documents", tags=["documents"])


@router.post("", status_code=202, openapi_extra=json_schema(Upload))
async def upload(
    body: Annotated[Upload, Depends(read_upload)], service: ServiceDep, response: Response
) -> AcceptedUpload:
    """Begin to ingest a document: JSON, text, or a form with a file.

    What is refused at once is refused here, the rest by its events.
    """
    job = service.ingest(body)
    await job.wait_over(within_s=service.settings.settle_s)
    if job.state.error is not None:
        service.ingests.forget(body.name)
        raise job.state.error
    url = f"/v1/documents/{body.name}"
    response.headers["Location"] = url
    return AcceptedUpload(
        name=body.name, state=_job_state(job), status_url=url, events_url=f"{url}/events"
    )


@router.get("")
async def list_documents(service: ServiceDep) -> DocumentList:
    """List every document, and every ingest that has not got there yet."""
    return DocumentList(data=await _list(service))


@router.get("/{name}")
async def get_document(name: str, service: ServiceDep) -> Document:
    """Describe one document."""
    return await _find(service, name)


@router.delete("/{name}")
async def delete_document(name: str, service: ServiceDep) -> DocumentDeleted:
    """Delete a document; an ingest that runs under its name is ended first."""
    job = service.ingests.find(name)
    if job is not None:
        job.cancel()
        await job.wait_over()
    await _find(service, name)
    service.ingests.forget(name)
    if name in await _stored(service):
        await run_in_threadpool(service.engine.remove, name)
    return DocumentDeleted(name=name)


@router.get("/{name}/events")
async def follow_document(name: str, service: ServiceDep) -> EventStream:
    """Follow an ingest: events `progress`, then one of `done` or `error`, also after its end."""
    job = service.ingests.find(name)
    if job is not None:
        return EventStream(_job_events(job, beat_s=service.settings.keep_alive_s))
    return EventStream(_stored_events(await _find(service, name)))


async def _job_events(job: Job, *, beat_s: float) -> AsyncGenerator[bytes, None]:
    async for state in job.follow(beat_s=beat_s):
        if state is None:
            yield KEEP_ALIVE
        elif state.error is not None:
            yield _error_event(state.error)
        else:
            if state.progress is not None:
                shown = IngestProgress.model_validate(state.progress)
                yield format_event(shown.model_dump_json(), name="progress")
            if state.report is not None:
                report = IngestReport.model_validate(state.report)
                yield format_event(report.model_dump_json(), name="done")


async def _stored_events(document: Document) -> AsyncGenerator[bytes, None]:
    """What is left to say of a document that this process has not ingested."""
    if not document.is_complete or document.document_hash is None:
        message = (
            f"document {document.name!r} is {document.state} and nothing ingests it: "
            f"{document.sealed_tokens} of {document.num_tokens} tokens are sealed; upload the same "
            "text again to resume"
        )
        yield _error_event(DocumentIncomplete(message))
        return
    report = IngestReport(
        name=document.name,
        document_hash=document.document_hash,
        num_tokens=document.num_tokens,
        computed_tokens=0,
        was_complete=True,
        prefill_s=0.0,
        cluster_s=0.0,
        write_s=0.0,
        total_s=0.0,
    )
    yield format_event(report.model_dump_json(), name="done")


def _error_event(error: BaseException) -> bytes:
    body = ErrorBody(error=describe_error(error))
    return format_event(body.model_dump_json(), name="error")


async def _find(service: Service, name: str) -> Document:
    """One document as the list has it. Raises DocumentNotFound."""
    found = next((each for each in await _list(service) if each.name == name), None)
    if found is None:
        raise DocumentNotFound(f"document {name[:100]!r}: neither stored nor being ingested")
    return found


async def _list(service: Service) -> list[Document]:
    stored, jobs = await _stored(service), service.ingests.jobs()
    unfinished = {name for name, job in jobs.items() if job.state.report is None}
    names = sorted(stored.keys() | unfinished)
    return [_describe(name, stored.get(name), jobs.get(name)) for name in names]


async def _stored(service: Service) -> dict[str, DocumentInfo]:
    return {info.name: info for info in await run_in_threadpool(service.engine.docs)}


def _describe(name: str, info: DocumentInfo | None, job: Job | None) -> Document:
    """A document as its store and its last ingest know it; at least one of them does."""
    last = job.state if job is not None else JobState()
    is_running = job is not None and not last.is_over
    progress = last.progress if is_running else None
    return Document(
        **(asdict(info) if info is not None else _unwritten(name)),
        state="ingesting" if is_running else _stored_state(info),
        progress=None if progress is None else IngestProgress.model_validate(progress),
        error=None if last.error is None else describe_error(last.error),
    )


def _stored_state(info: DocumentInfo | None) -> DocumentState:
    if info is None:
        return "failed"
    if info.damage is not None:
        return "damaged"
    return "complete" if info.is_complete else "incomplete"


def _job_state(job: Job) -> DocumentState:
    if job.state.error is not None:
        return "failed"
    return "complete" if job.state.is_over else "ingesting"


def _unwritten(name: str) -> dict[str, Any]:
    """The stored facts of a document that has none yet."""
    return {
        "name": name,
        "is_complete": False,
        "num_tokens": 0,
        "sealed_tokens": 0,
        "disk_bytes": 0,
        "model": "",
        "document_hash": None,
        "is_being_replaced": False,
        "damage": None,
    }

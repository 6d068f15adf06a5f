"""What goes over the wire about documents, models, health and errors; chat is in `wire_chat.py`.

Owns the JSON shapes and the bounds of every field. A request forbids unknown fields and converts no
types; a reply, which the client reads with the same classes, tolerates what a newer server adds.
Knows no routes, and imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

# A store's rule (`kv_store.paths`), which brings torch; a test holds the two together.
DocumentName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
]
DocumentState = Literal["complete", "incomplete", "ingesting", "failed", "damaged"]
ServiceStatus = Literal["ok", "draining", "broken"]
MAX_SYSTEM_CHARS = 1 << 15


def _keys_or_share(value: object) -> object:
    is_one = isinstance(value, int | str) and not isinstance(value, bool) and len(str(value)) <= 24
    if not is_one:
        raise ValueError("a budget is a number of keys or a share such as '12.5%'; give one")
    return value


Budget = Annotated[int | str, BeforeValidator(_keys_or_share)]


class Request(BaseModel):
    """Base of what a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Reply(BaseModel):
    """Base of what the server sends; made from the engine's dataclasses by field name."""

    model_config = ConfigDict(from_attributes=True, frozen=True)


class IngestSettings(Request):
    """What decides a document's bytes, besides its text and the model (`ingest.IngestOptions`)."""

    segment_tokens: Annotated[int, Field(ge=256, le=1 << 20, multiple_of=256)] = 8192
    window: Annotated[int, Field(ge=1, le=1 << 16)] = 64
    kv_dtype: Literal["float32", "bfloat16", "fp8"] | None = None
    prefill: Literal["exact", "sparse"] = "exact"
    prefill_budget: Budget | None = None
    system: Annotated[str, Field(min_length=1, max_length=MAX_SYSTEM_CHARS)] | None = None
    replace: bool = False
    restart: bool = False


class Upload(Request):
    """A document to ingest; its size is limited where the body is read."""

    name: DocumentName
    text: Annotated[str, Field(min_length=1)]
    options: IngestSettings = IngestSettings()


class ErrorDetail(Reply):
    """A fault as OpenAI's clients read it; code: its class's name in snake case."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Reply):
    """The JSON object of every response that is not a success."""

    error: ErrorDetail


class IngestProgress(Reply):
    """How far an ingest is (`ingest.Progress`)."""

    num_tokens: int
    done_tokens: int
    tokens_per_s: float
    eta_s: float


class IngestReport(Reply):
    """A finished ingest (`ingest.IngestReport`); was_complete: there was nothing left to do."""

    name: str
    document_hash: str
    num_tokens: int
    computed_tokens: int
    was_complete: bool
    prefill_s: float
    cluster_s: float
    write_s: float
    total_s: float


class Document(Reply):
    """A document of the store (`kv_store.DocumentInfo`), and the ingest that runs under its name.

    progress: of the running ingest; error: of the last one, where it failed.
    """

    name: str
    state: DocumentState
    is_complete: bool
    num_tokens: int
    sealed_tokens: int
    disk_bytes: int
    model: str
    document_hash: str | None
    is_being_replaced: bool
    damage: str | None
    progress: IngestProgress | None = None
    error: ErrorDetail | None = None


class AcceptedUpload(Reply):
    """The answer to an upload: where to look, and where to listen."""

    name: str
    state: DocumentState
    status_url: str
    events_url: str


class DocumentList(Reply):
    """Every document of the store, and every ingest that has not got there yet."""

    object: Literal["list"] = "list"
    data: list[Document]


class DocumentDeleted(Reply):
    """The answer to a DELETE."""

    object: Literal["document"] = "document"
    name: str
    deleted: Literal[True] = True


class ModelCard(Reply):
    """A model that can be asked; created: when this server started, seconds since 1970."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["longspan"] = "longspan"


class ModelList(Reply):
    """The models of this server: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Alive(Reply):
    """Whether the process is of use; broken: a rank was lost, and only a restart helps."""

    status: ServiceStatus


class EngineProgress(Reply):
    """What an engine says of itself (`cluster.executor.StepProgress`). A step ends on all ranks
    together; running_s: that the present one has taken, None between steps.
    """

    num_ranks: int
    steps_done: int
    idle_s: float
    running_s: float | None
    is_broken: bool


class RankProgress(Reply):
    """One rank's forward progress. idle_s: seconds since its last step ended."""

    rank: int
    steps: int
    idle_s: float


class Health(Reply):
    """What the service is doing. A step that runs far longer than others is a rank that hangs."""

    status: ServiceStatus
    running_questions: int
    running_ingests: int
    running_s: float | None
    ranks: list[RankProgress]

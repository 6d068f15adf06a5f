"""What a coordinator tells its ranks: one `StepPlan` a step, as plain data.

Owns the actions, their encoding as JSON and the digest that ranks compare before the first
collective of a step. Refuses to know tensors, groups and how an action is carried out: that is
`worker.py`.

A plan is the whole message: every rank gets the same bytes, and what a rank does is a function of
them and of what it did before. The digest covers the plan and all that came before it, beginning
with the rank's identity (model, dtype, mesh, version): ranks that differ in anything find out
before they wait for each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import xxhash

from orchestrator.errors import PlanInvalid

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """How one question attends: `auto` is already resolved.

    mode: exact, window or centroid; keys, mass: the limit of what is retrieved per KV head and
    query, one of them set (keys 0 in window); levels: of the look-up; choice: `global`, the best
    clusters wherever they lie, or `proportional`, each rank its share of the budget; tile_tokens:
    question tokens that read together; recall_period: one query in so many has its recall sampled,
    from num_strata times two keys a head; audit: compare every query with exact attention.
    """

    mode: str
    keys: int | None = 0
    mass: float | None = None
    levels: int = 1
    choice: str = "global"
    tile_tokens: int = 64
    recall_period: int = 4
    num_strata: int = 32
    seed: int = 0
    audit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDocument:
    """Bring a document's shard into memory. document_hash: of what every rank must find."""

    document: str
    document_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseDocument:
    """Release a document's memory and its lock."""

    document: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginQuestion:
    """Make room for a question on an open document. capacity_tokens: question and answer."""

    question_id: int
    document: str
    attention: AttentionPlan
    capacity_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Run some tokens of a question; its result is the logits after the last of them."""

    question_id: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardEach:
    """Run one token of each of several questions; its result is, for each, the logits after it, or
    the error that it met alone.
    """

    question_ids: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndQuestion:
    """Forget a question. reports: whether its result, what attention saw, is wanted."""

    question_id: int
    reports: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginIngest:
    """Make room for a document's prefill; sealed segments are read back.

    directory: of the document's files, relative to the store; digest: of its source; params:
    the manifest's, as JSON values; clusters: parameters of the index, or None; sparse: those of
    `sparse_prefill.py`, None for exact prefill.
    """

    document: str
    directory: str
    digest: str
    params: Mapping[str, Any]
    num_tokens: int
    sealed_segments: int
    clusters: Mapping[str, Any] | None
    sparse: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Compute a chunk of the document; split: tokens of its first half, None for no split."""

    document: str
    ids: tuple[int, ...]
    start: int
    split: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SealSegment:
    """Build the segment that is full and begin to write it; at most one is being written."""

    document: str
    segment_idx: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaitSegment:
    """Wait until the segment that is being written is on disk; its result is the files' entries."""

    document: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndIngest:
    """Release an ingest's memory, finished or not."""

    document: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Do nothing, together: a rank that is gone is noticed between questions too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The last step: ranks leave."""


Action = (
    OpenDocument
    | CloseDocument
    | BeginQuestion
    | Forward
    | ForwardEach
    | EndQuestion
    | BeginIngest
    | PrefillChunk
    | SealSegment
    | AwaitSegment
    | EndIngest
    | Heartbeat
    | Stop
)
ACTIONS: dict[str, type[Action]] = {
    kind.__name__: kind
    for kind in (
        OpenDocument,
        CloseDocument,
        BeginQuestion,
        Forward,
        ForwardEach,
        EndQuestion,
        BeginIngest,
        PrefillChunk,
        SealSegment,
        AwaitSegment,
        EndIngest,
        Heartbeat,
        Stop,
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: its number, counted from 0, and what every rank does in it."""

    step: int
    action: Action

    def encode(self) -> bytes:
        """The plan as JSON, one spelling."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "kind": type(self.action).__name__,
            "action": asdict(self.action),
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def decode(data: bytes) -> StepPlan:
    """The plan in `data`. Raises PlanInvalid for anything that `encode` would not have written."""
    try:
        body = json.loads(data)
        kind = ACTIONS[body["kind"]]
        plan = StepPlan(step=body["step"], action=_build(kind, body["action"]))
    except (ValueError, KeyError, TypeError) as error:
        raise PlanInvalid(
            f"step plan of {len(data)} bytes cannot be read ({type(error).__name__}: {error}); "
            "limit what another rank of this version sends; start all ranks from one installation"
        ) from error
    if body.get("format") != FORMAT or plan.encode() != data:
        raise PlanInvalid(
            f"step plan of format {body.get('format')!r}; limit {FORMAT}; "
            "start all ranks from one installation"
        )
    return plan


def _build(kind: type[Action], values: Mapping[str, Any]) -> Action:
    given = dict(values)
    if set(given) != {field.name for field in fields(kind)}:
        raise ValueError(f"fields {sorted(given)} of {kind.__name__}")
    for name in ("ids", "question_ids"):
        if name in given:
            given[name] = tuple(int(number) for number in given[name])
    if kind is BeginQuestion:
        given["attention"] = AttentionPlan(**given["attention"])
    return kind(**given)


class Chain:
    """The running digest of a rank: its identity, then every plan that it carried out."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        packed = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        self._digest = xxhash.xxh3_128_digest(packed.encode())

    def add(self, plan: bytes) -> bytes:
        """Take a plan's bytes in; returns the digest, 16 bytes."""
        self._digest = xxhash.xxh3_128_digest(self._digest + plan)
        return self._digest

"""One rank: carries out the steps that a coordinator plans, on its shard of model and documents.

Owns what a rank keeps between steps: weights, documents' shards, questions and ingests in progress.
Refuses to decide anything: what to do comes in a `StepPlan`'s action, and every rank does the same
at the same time. The rank of a single process is a worker too, with nobody to wait for.

An error that one rank alone can meet (a damaged file, a full disk) is agreed on before anybody goes
on: all ranks raise, and all can take the next step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from kv_store import (
    Document,
    DocumentParams,
    FileEntry,
    ResidentDocument,
    SegmentFiles,
    Store,
    StoreError,
    load_clusters,
    load_resident,
)
from orchestrator.config import EngineConfig
from orchestrator.errors import LongspanError, ModelMismatch, RankFailed
from orchestrator.model.context import DocumentContext
from orchestrator.model.load import LoadedModel
from orchestrator.place import Place
from orchestrator.prefill import Prefill
from orchestrator.questions import Questions
from orchestrator.segment_writing import SegmentWriting
from orchestrator.sparse_prefill import SparseParams
from orchestrator.steps import (
    Action,
    AwaitSegment,
    BeginIngest,
    BeginQuestion,
    CloseDocument,
    EndIngest,
    EndQuestion,
    Forward,
    ForwardEach,
    Heartbeat,
    OpenDocument,
    PrefillChunk,
    SealSegment,
    Stop,
)
from sparse_attn.api import Backend
from sparse_attn.select.centroid_build import CentroidParams

T = TypeVar("T")


class AgreedFault(Exception):
    """An error that every rank raises in this step, after which all can take the next.

    error: this rank's own, or what another rank said.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


# What a rank can meet alone and go on after.
_LOCAL_FAULTS = (StoreError, LongspanError, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldDocument:
    """A document on disk (locked against removal) and this rank's shard of it in memory."""

    document: Document
    context: DocumentContext


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ingest:
    prefill: Prefill
    writing: SegmentWriting


class Worker:
    """One rank's state. `execute` is collective over the place's ranks."""

    def __init__(
        self, config: EngineConfig, model: LoadedModel, backend: Backend, place: Place
    ) -> None:
        self.config, self.model, self.backend, self.place = config, model, backend, place
        self.store = Store(config.store)
        self.documents: dict[str, HeldDocument] = {}
        self.questions = Questions(model, backend, place)
        self._ingests: dict[str, _Ingest] = {}
        self._methods: dict[type[Any], Callable[[Any], Any]] = {
            OpenDocument: self._open,
            CloseDocument: self._close,
            BeginQuestion: self._begin_question,
            Forward: self.questions.forward,
            ForwardEach: self.questions.forward_each,
            EndQuestion: self.questions.end,
            BeginIngest: self._begin_ingest,
            PrefillChunk: self._prefill_chunk,
            SealSegment: self._seal_segment,
            AwaitSegment: self._await_segment,
            EndIngest: self._end_ingest,
            Heartbeat: lambda _: None,
            Stop: lambda _: self.close(),
        }

    def execute(self, action: Action) -> Any:
        """Carry out one step. Returns logits of a Forward, outcomes of a ForwardEach, the recorder
        of an EndQuestion that reports, the files of an AwaitSegment by KV head, else None. Raises
        AgreedFault for what all ranks know of; anything else leaves the ranks out of step.
        """
        return self._methods[type(action)](action)

    def close(self) -> None:
        """Release every document."""
        self.questions.clear()
        for name in list(self._ingests):
            self._end_ingest(EndIngest(document=name))
        for held in self.documents.values():
            held.document.close()
        self.documents.clear()

    def _open(self, action: OpenDocument) -> None:
        document, resident = self._agree(
            partial(self._load, action), undo=lambda loaded: loaded[0].close()
        )
        context = DocumentContext(
            resident, self.place, load_clusters=partial(load_clusters, document, resident)
        )
        self.documents[action.document] = HeldDocument(document=document, context=context)

    def _load(self, action: OpenDocument) -> tuple[Document, ResidentDocument]:
        decoder, document = self.model.decoder, self.store.open(action.document)
        try:
            self._check(document, action.document_hash)
            holding = self.place.holding(document.layout, by_fold=True)
            resident = load_resident(
                document,
                dtype=decoder.dtype,
                device=decoder.device,
                holding=holding,
                has_clusters=False,
            )
        except BaseException:
            document.close()
            raise
        return document, resident

    def _check(self, document: Document, document_hash: str) -> None:
        if document.hash != document_hash:
            raise RankFailed(
                f"document {document.name!r} is {document.hash} in {self.store.root} as rank "
                f"{self.place.flat.rank} sees it; limit the coordinator's {document_hash}; "
                "give all ranks one store"
            )
        params = document.manifest.params
        if params.model_fingerprint != self.model.fingerprint:
            raise ModelMismatch(
                f"document {document.name!r} was ingested by model {params.model}, not "
                f"{self.model.name}; "
                f"KV of one model means nothing to another; ask with --model {params.model} or "
                f"ingest again"
            )

    def _close(self, action: CloseDocument) -> None:
        held = self.documents.pop(action.document, None)
        # On return no rank holds the document's lock: it may be removed or replaced.
        self._agree(lambda: None if held is None else held.document.close())

    def _begin_question(self, action: BeginQuestion) -> None:
        context = self.documents[action.document].context
        if action.attention.mode != "exact":
            self._agree(context.require_clusters)
        self.questions.begin(action, context)

    def _begin_ingest(self, action: BeginIngest) -> None:
        layout = DocumentParams(**action.params).layout(num_tokens=action.num_tokens)
        clusters = None if action.clusters is None else CentroidParams(**action.clusters)
        files = SegmentFiles(
            directory=self.store.root / action.directory, digest=action.digest, layout=layout
        )
        prefill = Prefill(
            self.model.decoder,
            self.backend,
            layout,
            clusters=clusters,
            sparse=None if action.sparse is None else SparseParams(**action.sparse),
            place=self.place,
        )
        for segment_idx in range(action.sealed_segments):
            heads = self._agree(partial(self._read_sealed, files, segment_idx))
            prefill.append(segment_idx, heads)
        writing = SegmentWriting(files, self.model.decoder.device)
        self._ingests[action.document] = _Ingest(prefill=prefill, writing=writing)

    def _read_sealed(self, files: SegmentFiles, segment_idx: int) -> dict[int, dict[str, Tensor]]:
        """What this rank needs of a sealed segment: its own KV heads, sliding-window keys, and of
        the first one the scales of a document in fp8.
        """
        needs_all = files.layout.num_sliding_layers > 0 or (
            files.layout.is_fp8 and segment_idx == 0
        )
        return {
            kv_head_idx: files.read(segment_idx, kv_head_idx)
            if needs_all or self.place.owns(segment_idx, kv_head_idx)
            else {}
            for kv_head_idx in self.place.kv_heads
        }

    def _prefill_chunk(self, action: PrefillChunk) -> None:
        ids = torch.tensor(action.ids, device=self.model.decoder.device)
        self._ingests[action.document].prefill.fill(ids, action.start, split=action.split)
        self.place.flat.settle()

    def _seal_segment(self, action: SealSegment) -> None:
        ingest, segment_idx = self._ingests[action.document], action.segment_idx
        self._agree(lambda: ingest.prefill.fit_scales(segment_idx))
        heads = ingest.prefill.build(segment_idx)
        owned = {head: x for head, x in heads.items() if self.place.owns(segment_idx, head)}
        ingest.writing.start(segment_idx, owned)
        ingest.prefill.append(segment_idx, heads)

    def _await_segment(self, action: AwaitSegment) -> dict[int, FileEntry]:
        entries = self._agree(self._ingests[action.document].writing.wait)
        return self._gather_entries(entries)

    def _gather_entries(self, entries: Mapping[int, FileEntry]) -> dict[int, FileEntry]:
        """The files of all ranks, by KV head."""
        if self.place.is_alone:
            return dict(entries)
        own = json.dumps({head: asdict(entry) for head, entry in entries.items()})
        gathered: dict[int, FileEntry] = {}
        for message in self.place.flat.control.all_gather_bytes(own.encode()):
            for head, entry in json.loads(message).items():
                gathered[int(head)] = FileEntry(**entry)
        return gathered

    def _end_ingest(self, action: EndIngest) -> None:
        ingest = self._ingests.pop(action.document, None)
        if ingest is not None:
            ingest.writing.close()

    def _agree(self, work: Callable[[], T], *, undo: Callable[[T], object] = lambda _: None) -> T:
        """Do something that can fail on one rank alone; it fails on all or on none.

        Raises AgreedFault of this rank's own error, else of RankFailed with the first other's.
        undo: takes back what succeeded here where it failed elsewhere.
        """
        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(work())
        except _LOCAL_FAULTS as fault:
            error = fault
        if self.place.is_alone:
            if error is not None:
                raise AgreedFault(error)
            return result[0]
        said = "" if error is None else f"{type(error).__name__}: {error}"
        everybody = self.place.flat.control.all_gather_bytes(said.encode())
        if error is not None:
            raise AgreedFault(error)
        failed = [(rank, text.decode()) for rank, text in enumerate(everybody) if text]
        if failed:
            undo(result[0])
            raise AgreedFault(RankFailed(f"rank {failed[0][0]}: {failed[0][1]}"))
        return result[0]

"""Reads a document once: prefill chunk by chunk, cluster, seal segment by segment.

Owns the loop, its counters and what a document's manifest says; ranks compute and write
(`worker.py`, `prefill.py`), rank 0 seals. Knows no questions.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Literal, Self

from kv_store import DocumentParams, DocumentWriter
from orchestrator.cluster.executor import Executor
from orchestrator.errors import ContextTooLong, UsageError
from orchestrator.model.load import LoadedModel
from orchestrator.planning import KV_DTYPES, check_kv_dtype
from orchestrator.run_plan import RunPlanner
from orchestrator.sparse_prefill import SparseParams, check_place
from orchestrator.steps import AwaitSegment, BeginIngest, EndIngest, PrefillChunk, SealSegment
from sparse_attn.select.centroid_build import CentroidParams

NUM_SINKS = 4
MAX_CHUNK_TOKENS = 1024
LIBRARIES = ("torch", "numpy", "longspan")


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestOptions:
    """What decides a document's bytes besides text and model.

    kv_dtype: a word of `KV_DTYPES`, None for the model's type;
    prefill_budget: of `prefill` sparse, what a tile of tokens reads of each KV head's sealed
    segments, keys or a percentage such as "10%" (None); chunk_tokens: of prefill, at most the
    segment; split_tokens: of a chunk's first half, computed beside the second: 0 for no split, None
    to let the planner decide; clusters: None keeps KV in token order without an index (such a
    document answers in mode `exact` only).
    """

    segment_tokens: int = 8192
    window: int = 64
    kv_dtype: str | None = None
    prefill: Literal["exact", "sparse"] = "exact"
    prefill_budget: str | int | None = None
    chunk_tokens: int = MAX_CHUNK_TOKENS
    system: str | None = None
    split_tokens: int | None = None
    clusters: CentroidParams | None = field(default_factory=CentroidParams)
    replace: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        if self.segment_tokens < 256 or self.segment_tokens % 256:
            raise UsageError(
                f"segment tokens {self.segment_tokens} is not a positive multiple of 256; give "
                f"1024 or 8192, for example"
            )
        check_kv_dtype(self.kv_dtype)
        if self.window < 1:
            raise UsageError(
                f"window {self.window} is below 1 token; the last tokens are always read; give 64"
            )
        if self.chunk_tokens < 1:
            raise UsageError(f"chunk tokens {self.chunk_tokens} is below 1; give 512, for example")
        if self.prefill not in ("exact", "sparse"):
            raise UsageError(f"prefill {self.prefill!r} is unknown; give exact or sparse")
        if self.prefill == "exact" and self.prefill_budget is not None:
            raise UsageError(
                f"prefill budget {self.prefill_budget} was given with prefill exact, which reads "
                "everything; give prefill sparse too"
            )
        if self.prefill == "sparse" and self.kv_dtype == "fp8":
            raise UsageError(
                "prefill sparse reads blocks of a document that is stored in fp8; limit kv dtype "
                "float32 or bfloat16; give --kv-dtype bfloat16, or --prefill exact"
            )
        self.sparse()

    def sparse(self) -> SparseParams | None:
        """How sealed segments are read; None: all of them. Raises UsageError."""
        return None if self.prefill == "exact" else SparseParams.of(self.prefill_budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an ingest is; tokens_per_s and eta_s count what this process computed."""

    num_tokens: int
    done_tokens: int
    tokens_per_s: float
    eta_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestReport:
    """A finished ingest. computed_tokens excludes what a resume found sealed; was_complete: a
    no-op.
    """

    name: str
    document_hash: str
    num_tokens: int
    computed_tokens: int
    was_complete: bool
    prefill_s: float
    cluster_s: float
    write_s: float
    total_s: float


OnProgress = Callable[[Progress], None]


def ingest(
    executor: Executor,
    name: str,
    text: str,
    options: IngestOptions,
    *,
    planner: RunPlanner,
    on_progress: OnProgress | None = None,
) -> IngestReport:
    """Ingest `text` under `name`, or resume it, or do nothing if it is already there.

    Raises ContextTooLong before anything is written, and the store's errors; a document that fails
    half-way stays resumable. What `on_progress` raises ends the ingest and goes on to the caller.
    """
    started = time.perf_counter()
    worker = executor.worker
    model, config = worker.model, worker.config
    frame = model.tokenizer.frame(options.system)
    text_ids, text_spans = model.tokenizer.encode(text)
    ids, spans = frame + list(text_ids), [(-1, -1)] * len(frame) + list(text_spans)
    _check_context(model, len(ids))
    if options.clusters is not None:
        options = replace(options, clusters=options.clusters.for_document(len(ids)))
    if options.sparse() is not None:
        check_place(worker.place)
    split = _choose_split(options, planner, len(ids))
    # What decides the bits beside the mesh is kept with it: a resume must find the same.
    mesh = config.mesh if split is None else f"{config.mesh} split {split}"
    params = document_params(
        model, options, frame_tokens=len(frame), threads=config.threads, mesh=mesh
    )
    with worker.store.begin(
        name, params, text, ids, spans, replace=options.replace, restart=options.restart
    ) as writer:
        if writer.is_complete:
            return _report(name, writer.finish(), len(ids), None, started)
        with _Run(executor, writer, params, ids, options, split=split) as run:
            run.fill(on_progress or (lambda _: None))
        return _report(name, writer.finish(), len(ids), run, started)


def document_params(
    model: LoadedModel,
    options: IngestOptions,
    *,
    frame_tokens: int,
    threads: int,
    mesh: str = "1x1",
) -> DocumentParams:
    """The parameters that the manifest keeps."""
    cfg = model.cfg
    dtype = str(model.decoder.dtype).removeprefix("torch.")
    windows = {window for window in cfg.windows if window is not None}
    sparse = options.sparse()
    return DocumentParams(
        model=model.name,
        model_fingerprint=model.fingerprint,
        tokenizer_fingerprint=model.tokenizer.fingerprint,
        rope={"full": asdict(cfg.rope), "sliding": asdict(cfg.rope_sliding)},
        dtype=dtype,
        kv_dtype=dtype if options.kv_dtype is None else KV_DTYPES[options.kv_dtype],
        segment_tokens=options.segment_tokens,
        frame_tokens=frame_tokens,
        sinks=NUM_SINKS,
        window=options.window,
        num_full_layers=len(cfg.full_layers),
        num_sliding_layers=len(cfg.sliding_layers),
        sliding_window=max(windows, default=0),
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        selector={"name": "centroid", **options.clusters.to_dict()}
        if options.clusters
        else {"name": "none"},
        chunk_tokens=min(options.chunk_tokens, options.segment_tokens),
        prefill="exact" if sparse is None else sparse.describe(),
        threads=threads,
        mesh=mesh,
        machine=f"{model.decoder.device.type}-{platform.machine()}",
        library_versions={library: version(library) for library in LIBRARIES},
    )


class _Run:
    """One ingest in progress on all ranks: the writer of its manifest, and counters."""

    def __init__(
        self,
        executor: Executor,
        writer: DocumentWriter,
        params: DocumentParams,
        ids: list[int],
        options: IngestOptions,
        *,
        split: int | None,
    ) -> None:
        self._executor, self._writer, self._ids = executor, writer, ids
        self._params, self._options, self._split_tokens = params, options, split
        self._chunk_tokens = min(options.chunk_tokens, options.segment_tokens)
        # On a GPU a segment is written while the next is computed (`segment_writing.py`).
        self._writes_aside = executor.worker.model.decoder.device.type == "cuda"
        self._unsealed: int | None = None
        self.computed_tokens = 0
        self.prefill_s = self.cluster_s = self.write_s = 0.0

    def __enter__(self) -> Self:
        writer, clusters, sparse = self._writer, self._options.clusters, self._options.sparse()
        root = self._executor.worker.store.root
        self._executor.run(
            BeginIngest(
                document=writer.name,
                directory=str(writer.files.directory.relative_to(root)),
                digest=writer.files.digest,
                params=self._params.plain(),
                num_tokens=len(self._ids),
                sealed_segments=writer.sealed_segments,
                clusters=None if clusters is None else clusters.to_dict(),
                sparse=None if sparse is None else sparse.to_dict(),
            )
        )
        return self

    def __exit__(self, *error: object) -> None:
        if self._executor.failure is None:
            self._executor.run(EndIngest(document=self._writer.name))

    def fill(self, on_progress: OnProgress) -> None:
        """Compute and seal every segment that is not sealed yet."""
        layout, sealed = self._writer.layout, self._writer.sealed_segments
        first = layout.segment_span(sealed)[0] if sealed < layout.num_segments else len(self._ids)
        started = time.perf_counter()
        for segment_idx in range(sealed, layout.num_segments):
            start, stop = layout.segment_span(segment_idx)
            for chunk_start in range(start, stop, self._chunk_tokens):
                chunk_stop = min(chunk_start + self._chunk_tokens, stop)
                self._compute(chunk_start, chunk_stop)
                on_progress(_progress(layout.num_tokens, chunk_stop, first, started))
            self._seal(segment_idx)
        self._collect()

    def _compute(self, start: int, stop: int) -> None:
        began = time.perf_counter()
        self._executor.run(
            PrefillChunk(
                document=self._writer.name,
                ids=tuple(self._ids[start:stop]),
                start=start,
                split=self._split(stop - start),
            )
        )
        self.computed_tokens += stop - start
        self.prefill_s += time.perf_counter() - began

    def _split(self, num_tokens: int) -> int | None:
        """Tokens of a chunk's first half, None where it is computed whole."""
        split = self._split_tokens
        return split if split is not None and 0 < split < num_tokens else None

    def _seal(self, segment_idx: int) -> None:
        """Build a segment and begin to write it, the one before being on disk."""
        self._collect()
        began = time.perf_counter()
        self._executor.run(SealSegment(document=self._writer.name, segment_idx=segment_idx))
        self.cluster_s += time.perf_counter() - began
        self._unsealed = segment_idx
        if not self._writes_aside:
            self._collect()

    def _collect(self) -> None:
        """Wait for the segment that is being written, if one is, and seal it."""
        if self._unsealed is None:
            return
        began = time.perf_counter()
        entries = self._executor.run(AwaitSegment(document=self._writer.name))
        self._writer.seal(self._unsealed, entries)
        self._unsealed = None
        self.write_s += time.perf_counter() - began


def _choose_split(options: IngestOptions, planner: RunPlanner, num_tokens: int) -> int | None:
    """Tokens of every chunk's first half: as asked (0 for no split), else as planned."""
    if options.split_tokens is not None:
        return options.split_tokens or None
    return planner.choose_split(
        num_tokens=num_tokens,
        segment_tokens=options.segment_tokens,
        chunk_tokens=min(options.chunk_tokens, options.segment_tokens),
        kv_dtype=None if options.kv_dtype is None else KV_DTYPES[options.kv_dtype],
    )


def _check_context(model: LoadedModel, num_tokens: int) -> None:
    limit = model.cfg.max_context_tokens
    if num_tokens >= limit:
        raise ContextTooLong(
            f"document has {num_tokens} tokens, the context of {model.name} holds {limit}, "
            f"question and answer "
            "included; shorten the document or choose a model with a longer context"
        )


def _progress(num_tokens: int, done: int, first: int, started: float) -> Progress:
    rate = (done - first) / max(time.perf_counter() - started, 1e-9)
    return Progress(
        num_tokens=num_tokens,
        done_tokens=done,
        tokens_per_s=rate,
        eta_s=(num_tokens - done) / max(rate, 1e-9),
    )


def _report(
    name: str, document_hash: str, num_tokens: int, run: _Run | None, started: float
) -> IngestReport:
    return IngestReport(
        name=name,
        document_hash=document_hash,
        num_tokens=num_tokens,
        computed_tokens=run.computed_tokens if run else 0,
        was_complete=run is None,
        prefill_s=run.prefill_s if run else 0.0,
        cluster_s=run.cluster_s if run else 0.0,
        write_s=run.write_s if run else 0.0,
        total_s=time.perf_counter() - started,
    )

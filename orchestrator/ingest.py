"""Reads a document once: prefill chunk by chunk, cluster, seal segment by segment.

Owns the loop, its counters and what a document's manifest says; `prefill.py` computes, `kv_store`
writes. Knows no questions.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

import torch
from torch import Tensor

from kv_store import DocumentParams, DocumentWriter, Store
from orchestrator.errors import ContextTooLong, UsageError
from orchestrator.model.load import LoadedModel
from orchestrator.prefill import Prefill
from sparse_attn.api import Backend
from sparse_attn.select.centroid_build import CentroidParams

NUM_SINKS = 4
MAX_CHUNK_TOKENS = 1024
LIBRARIES = ("torch", "numpy", "longspan")


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestOptions:
    """What decides a document's bytes besides text and model.

    chunk_tokens: of prefill, at most the segment; clusters: None keeps KV in token order without an
    index (such a document answers in mode `exact` only).
    """

    segment_tokens: int = 8192
    window: int = 64
    kv_dtype: str | None = None
    chunk_tokens: int = MAX_CHUNK_TOKENS
    system: str | None = None
    clusters: CentroidParams | None = field(default_factory=CentroidParams)
    replace: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        if self.segment_tokens < 256 or self.segment_tokens % 256:
            raise UsageError(
                f"segment tokens {self.segment_tokens} is not a positive multiple of 256; give "
                f"1024 or 8192, for example"
            )
        if self.window < 1:
            raise UsageError(
                f"window {self.window} is below 1 token; the last tokens are always read; give 64"
            )
        if self.chunk_tokens < 1:
            raise UsageError(f"chunk tokens {self.chunk_tokens} is below 1; give 512, for example")


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
    model: LoadedModel,
    backend: Backend,
    store: Store,
    name: str,
    text: str,
    options: IngestOptions,
    *,
    threads: int,
    on_progress: OnProgress | None = None,
) -> IngestReport:
    """Ingest `text` under `name`, or resume it, or do nothing if it is already there.

    Raises ContextTooLong before anything is written, and the store's errors; a document that fails
    half-way stays resumable.
    """
    started = time.perf_counter()
    frame = model.tokenizer.frame(options.system)
    text_ids, text_spans = model.tokenizer.encode(text)
    ids, spans = frame + list(text_ids), [(-1, -1)] * len(frame) + list(text_spans)
    _check_context(model, len(ids))
    params = document_params(model, options, frame_tokens=len(frame), threads=threads)
    with store.begin(
        name, params, text, ids, spans, replace=options.replace, restart=options.restart
    ) as writer:
        if writer.is_complete:
            return _report(name, writer.finish(), len(ids), None, started)
        device_ids = torch.tensor(ids, device=model.decoder.device)
        run = _Run(model, backend, writer, device_ids, options)
        run.fill(on_progress or (lambda _: None))
        return _report(name, writer.finish(), len(ids), run, started)


def document_params(
    model: LoadedModel, options: IngestOptions, *, frame_tokens: int, threads: int
) -> DocumentParams:
    """The parameters that the manifest keeps."""
    cfg = model.cfg
    dtype = str(model.decoder.dtype).removeprefix("torch.")
    windows = {window for window in cfg.windows if window is not None}
    return DocumentParams(
        model=model.name,
        model_fingerprint=model.fingerprint,
        tokenizer_fingerprint=model.tokenizer.fingerprint,
        rope={"full": asdict(cfg.rope), "sliding": asdict(cfg.rope_sliding)},
        dtype=dtype,
        kv_dtype=options.kv_dtype or dtype,
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
        prefill="exact",
        threads=threads,
        mesh="1x1",
        machine=f"{model.decoder.device.type}-{platform.machine()}",
        library_versions={library: version(library) for library in LIBRARIES},
    )


class _Run:
    """One ingest in progress: a prefill, the writer of its files, counters."""

    def __init__(
        self,
        model: LoadedModel,
        backend: Backend,
        writer: DocumentWriter,
        ids: Tensor,
        options: IngestOptions,
    ) -> None:
        self._prefill = Prefill(model.decoder, backend, writer.layout, clusters=options.clusters)
        self._writer, self._ids = writer, ids
        self._chunk_tokens = min(options.chunk_tokens, options.segment_tokens)
        self.computed_tokens = 0
        self.prefill_s = self.cluster_s = self.write_s = 0.0

    def fill(self, on_progress: OnProgress) -> None:
        """Load what is sealed, then compute, seal and append every other segment."""
        layout, sealed = self._writer.layout, self._writer.sealed_segments
        for segment_idx in range(sealed):
            self._prefill.append(self._writer.read_segment(segment_idx))
        started, first = time.perf_counter(), self._prefill.resident.num_sealed
        for segment_idx in range(sealed, layout.num_segments):
            start, stop = layout.segment_span(segment_idx)
            for chunk_start in range(start, stop, self._chunk_tokens):
                chunk_stop = min(chunk_start + self._chunk_tokens, stop)
                self._compute(chunk_start, chunk_stop)
                on_progress(_progress(layout.num_tokens, chunk_stop, first, started))
            self._seal(segment_idx)

    def _compute(self, start: int, stop: int) -> None:
        began = time.perf_counter()
        self._prefill.fill(self._ids[start:stop], start)
        self.computed_tokens += stop - start
        self.prefill_s += time.perf_counter() - began

    def _seal(self, segment_idx: int) -> None:
        began = time.perf_counter()
        heads = self._prefill.build(segment_idx)
        built = time.perf_counter()
        self._writer.append_segment(segment_idx, heads)
        self._prefill.append(heads)
        self.cluster_s += built - began
        self.write_s += time.perf_counter() - built


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

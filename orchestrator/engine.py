"""The embedded API: a model, a store, and documents to ask, in one process without a daemon.

Owns what lives between questions: weights, opened documents and their KV in memory. One question's
path is `ask` -> `open` -> `question.Question` -> decoder -> `model/attention.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from kv_store import Document, DocumentInfo, Store, load_clusters, load_resident
from orchestrator import sources
from orchestrator.answering import OpenDocument, Question, Session, answer_question, score_answer
from orchestrator.config import EngineConfig, resolve
from orchestrator.errors import ModelMismatch, UsageError
from orchestrator.ingest import IngestOptions, IngestReport, OnProgress, ingest
from orchestrator.model.attention import DocumentContext
from orchestrator.model.load import LoadedModel, load_model
from orchestrator.types import Answer, AskOptions, Mode, Sampling, Score
from sparse_attn.api import Backend, find_backend

OnToken = Callable[[str], None]


class Engine:
    """Ingests documents and answers questions about them.

    Use `Engine.load`; close it (or use it as a context manager) to release documents for `docs rm`.
    One question runs at a time; other threads wait.
    """

    def __init__(
        self, config: EngineConfig, model: LoadedModel, backend: Backend, *, load_s: float
    ) -> None:
        self.config, self.model, self.store = config, model, Store(config.store)
        self.backend, self._load_s = backend, load_s
        self._open: dict[str, OpenDocument] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(cls, model: str = "smollm2-135m", **options: Any) -> Engine:
        """Load a model's weights. Options are those of `orchestrator.config.resolve`.

        Raises UsageError for a wrong option and a ModelError where the model cannot be loaded.
        """
        config = resolve(model=model, **options)
        backend = find_backend(config.backend)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                "device 'cuda' was asked for; this process sees 0 GPUs; use --device cpu"
            )
        torch.set_num_threads(config.threads)
        started = time.perf_counter()
        loaded = load_model(
            config.model,
            dtype=getattr(torch, config.dtype),
            device=torch.device(config.device),
            linear=backend.linear,
        )
        return cls(config, loaded, backend, load_s=time.perf_counter() - started)

    def ingest(
        self,
        source: str | Path | None = None,
        *,
        text: str | None = None,
        name: str | None = None,
        options: IngestOptions | None = None,
        on_progress: OnProgress | None = None,
    ) -> IngestReport:
        """Ingest a file (or "-", or `text` itself) under `name`, once; the same input again is a
        no-op.
        """
        if (source is None) == (text is None):
            raise UsageError(
                "ingest needs a source or a text, and exactly one of them; give a path or text=..."
            )
        if name is None:
            if source is None:
                raise UsageError("ingest of a text has no name; names come from name=; give one")
            name = sources.default_name(source)
        if text is None:
            assert source is not None
            text = sources.read_text(source)
        with self._lock:
            self._release(name)
            return ingest(
                self.model,
                self.backend,
                self.store,
                name,
                text,
                options or IngestOptions(),
                threads=self.config.threads,
                on_progress=on_progress,
            )

    def ask(
        self,
        name: str,
        question: str,
        *,
        mode: Mode = "auto",
        budget: str | int | None = None,
        mass: float | None = None,
        levels: int | None = None,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        audit: bool = False,
        on_token: OnToken | None = None,
    ) -> Answer:
        """Answer a question about an ingested document.

        on_token receives the text piece by piece as it is generated. Raises UsageError for options,
        the store's errors for the document, ContextTooLong where question and answer do not fit.
        """
        options = AskOptions(
            mode=mode,
            budget=budget,
            mass=mass,
            levels=levels,
            max_tokens=max_tokens,
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
            system=system,
            audit=audit,
        )
        with self._lock:
            started = time.perf_counter()
            document, open_s = self._opened(name)
            return answer_question(
                self._question(document, question, options),
                started=started,
                load_s=self._load_s,
                open_s=open_s,
                on_token=on_token,
            )

    def score(
        self,
        name: str,
        question: str,
        answer_text: str,
        *,
        prefix: str = "",
        mode: Mode = "auto",
        budget: str | int | None = None,
        mass: float | None = None,
        levels: int | None = None,
        seed: int = 0,
        audit: bool = False,
    ) -> Score:
        """Teacher-forced loss of `answer_text` after `prefix`, computed step by step as `ask`
        would.
        """
        options = AskOptions(
            mode=mode,
            budget=budget,
            mass=mass,
            levels=levels,
            sampling=Sampling(seed=seed),
            audit=audit,
        )
        with self._lock:
            document, _ = self._opened(name)
            return score_answer(
                self._question(document, question, options), answer_text, prefix=prefix
            )

    def begin(
        self, name: str, question: str, options: AskOptions, *, num_answer_tokens: int
    ) -> Session:
        """A question one forward at a time, for benchmarks and tests; not guarded by the lock."""
        document, _ = self._opened(name)
        return Session(
            self._question(document, question, options), num_answer_tokens=num_answer_tokens
        )

    def text(self, name: str) -> str:
        """The text of an ingested document; spans of evidence refer to it."""
        with self._lock:
            return self._opened(name)[0].document.text

    def remove(self, name: str) -> None:
        """Delete a document, releasing it first if this engine has it open."""
        with self._lock:
            self._release(name)
            self.store.remove(name)

    def docs(self) -> list[DocumentInfo]:
        """Documents of the store, finished and incomplete."""
        return self.store.list()

    def release(self, name: str | None = None) -> None:
        """Forget one opened document, or all; their locks and memory are free afterwards."""
        with self._lock:
            for opened in [name] if name is not None else list(self._open):
                self._release(opened)

    def close(self) -> None:
        """Release every opened document."""
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _question(self, document: OpenDocument, question: str, options: AskOptions) -> Question:
        return Question(
            model=self.model,
            document=document,
            backend=self.backend,
            config=self.config,
            text=question,
            options=options,
        )

    def _opened(self, name: str) -> tuple[OpenDocument, float]:
        """The document in memory, and how long opening took (0 when it was open already)."""
        if name in self._open:
            return self._open[name], 0.0
        started = time.perf_counter()
        document = self.store.open(name)
        try:
            self._check_model(document)
            decoder, params = self.model.decoder, document.manifest.params
            resident = load_resident(
                document, dtype=decoder.dtype, device=decoder.device, has_clusters=False
            )
            context = DocumentContext(
                resident,
                num_sinks=params.sinks,
                num_window=params.window,
                load_clusters=partial(load_clusters, document, resident),
            )
            # Evidence needs them last; they are checked first, before any text is given out.
            _ = document.text, document.spans
            opened = OpenDocument(document=document, context=context)
        except BaseException:
            document.close()
            raise
        self._open[name] = opened
        return opened, time.perf_counter() - started

    def _check_model(self, document: Document) -> None:
        params = document.manifest.params
        if params.model_fingerprint != self.model.fingerprint:
            raise ModelMismatch(
                f"document {document.name!r} was ingested by model {params.model}, not "
                f"{self.model.name}; "
                f"KV of one model means nothing to another; ask with --model {params.model} or "
                f"ingest again"
            )

    def _release(self, name: str) -> None:
        opened = self._open.pop(name, None)
        if opened is not None:
            opened.document.close()

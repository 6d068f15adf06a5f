"""The embedded API: a model, a store, and documents to ask, from one process without a daemon.

Owns what a caller sees, and nothing of how it is done: the coordinator admits questions, the
executor's ranks carry them out. One question's path is `ask` -> `Coordinator.admit` ->
`answering.answer_question` -> `Batcher.forward` -> `Executor.run` -> `Worker` -> `Questions` ->
decoder -> `model/attention.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kv_store import DocumentInfo
from orchestrator import sources
from orchestrator.answering import AskedDocument, Question, Session, answer_question, score_answer
from orchestrator.cluster.executor import Executor, open_executor
from orchestrator.config import EngineConfig, resolve
from orchestrator.coordinator import Coordinator
from orchestrator.errors import UsageError
from orchestrator.ingest import IngestOptions, IngestReport, OnProgress, ingest
from orchestrator.run_plan import RunPlanner
from orchestrator.selection import check_request
from orchestrator.types import Answer, AskOptions, Mode, Sampling, Score
from orchestrator.worker import HeldDocument

OnToken = Callable[[str], None]


class Engine:
    """Ingests documents and answers questions about them.

    Use `Engine.load`; close it (or use it as a context manager) to release documents for `docs rm`
    and to let other ranks go. Threads may ask at once: their steps are taken together.
    """

    def __init__(
        self, config: EngineConfig, executor: Executor, *, capacity_bytes: int | None = None
    ) -> None:
        """capacity_bytes: of each rank, for documents and questions; None measures it."""
        self.config, self.executor = config, executor
        self.coordinator = Coordinator(executor, capacity_bytes=capacity_bytes)
        self.model, self.backend = executor.worker.model, executor.worker.backend
        self.store = executor.worker.store
        self._asked: dict[str, AskedDocument] = {}
        self._planner = RunPlanner.load(config, self.model.cfg)

    @classmethod
    def load(cls, model: str = "smollm2-135m", **options: Any) -> Engine:
        """Load a model's weights on every rank. Options are those of `orchestrator.config.resolve`.

        Raises UsageError for a wrong option and a ModelError where the model cannot be loaded.
        """
        config = resolve(model=model, **options)
        return cls(config, open_executor(config))

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
        self.release(name)
        return ingest(
            self.executor,
            name,
            text,
            options or IngestOptions(),
            planner=self._planner,
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

        on_token receives the text piece by piece as it is generated; what it raises ends the
        question. Raises UsageError for options, the store's errors for the document, ContextTooLong
        where question and answer do not fit, NotAdmitted where memory will never be enough.
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
        return self.answer(name, question, options, on_token=on_token)

    def answer(
        self,
        name: str,
        question: str,
        options: AskOptions,
        *,
        on_token: OnToken | None = None,
    ) -> Answer:
        """`ask` with all options as one object."""
        started = time.perf_counter()
        with self._admitted(name, question, options, num_answer_tokens=options.max_tokens) as (
            admitted,
            open_s,
        ):
            answer = answer_question(
                admitted,
                started=started,
                load_s=self.executor.load_s,
                open_s=open_s,
                on_token=on_token,
            )
            layout = admitted.document.context.resident.layout
            plan = self._planner.describe(
                answer, segment_tokens=layout.segment_tokens, kv_dtype=layout.kv_dtype
            )
            return replace(answer, plan=plan)

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
        encode = self.model.tokenizer.encode
        num_tokens = len(encode(prefix)[0]) + len(encode(answer_text)[0])
        with self._admitted(name, question, options, num_answer_tokens=num_tokens) as (asked, _):
            return score_answer(asked, answer_text, prefix=prefix)

    @contextmanager
    def begin(
        self, name: str, question: str, options: AskOptions, *, num_answer_tokens: int
    ) -> Iterator[Session]:
        """A question one forward at a time, for benchmarks and tests."""
        with (
            self._admitted(
                name, question, options, num_answer_tokens=num_answer_tokens
            ) as admitted,
            Session(admitted[0], num_answer_tokens=num_answer_tokens) as session,
        ):
            yield session

    def text(self, name: str) -> str:
        """The text of an ingested document; spans of evidence refer to it."""
        with self.store.open(name) as document:
            return document.text

    def remove(self, name: str) -> None:
        """Delete a document, releasing it first if this engine has it open."""
        self.release(name)
        self.store.remove(name)

    def docs(self) -> list[DocumentInfo]:
        """Documents of the store, finished and incomplete."""
        return self.store.list()

    def release(self, name: str | None = None) -> None:
        """Forget one opened document, or all; their locks and memory are free afterwards.

        Raises DocumentBusy while one of them is being asked.
        """
        for opened in [name] if name is not None else self.coordinator.names():
            self.coordinator.release(opened)

    def progress(self) -> dict[str, Any]:
        """What `/health/progress` shows: steps done, seconds since the last, and on which ranks."""
        return asdict(self.executor.progress())

    def close(self) -> None:
        """Release every opened document and let other ranks go."""
        self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _admitted(
        self, name: str, text: str, options: AskOptions, *, num_answer_tokens: int
    ) -> Iterator[tuple[Question, float]]:
        """A question that there is room for, and the seconds that opening its document took."""
        check_request(options)
        ids = self.model.tokenizer.question(text, instruction=options.system)
        capacity_tokens = len(ids) + num_answer_tokens
        with self.coordinator.admit(name, capacity_tokens=capacity_tokens) as admitted:
            held = admitted.held
            # Evidence needs them last; they are checked first, before any text is given out.
            _ = held.document.text, held.document.spans
            question = Question(
                executor=self.executor,
                batcher=self.coordinator.batcher,
                question_id=admitted.question_id,
                document=self._asked_document(held),
                ids=ids,
                options=options,
            )
            yield question, admitted.open_s

    def _asked_document(self, held: HeldDocument) -> AskedDocument:
        """The document's sentences and spans, kept as long as it stays open."""
        name = held.document.name
        if name not in self._asked or self._asked[name].document is not held.document:
            self._asked[name] = AskedDocument(held)
        return self._asked[name]

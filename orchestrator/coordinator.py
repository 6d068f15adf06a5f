"""Who is asked next, and whether there is room: the coordinator of one engine's ranks.

Owns the documents that are open, who uses them, and admission by memory: a document or question
that fits waits until there is room, one that never will is refused with the size that would. Tokens
of concurrent questions take steps together (`batcher.py`), everything else takes turns
(`cluster/executor.py`). Refuses to know tokens and answers.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from kv_store import Document, DocumentBusy
from orchestrator.batcher import Batcher
from orchestrator.capacity import document_bytes, fitting_tokens, question_bytes
from orchestrator.cluster.executor import Executor, Turn
from orchestrator.errors import NotAdmitted
from orchestrator.steps import Action, CloseDocument, OpenDocument
from orchestrator.worker import HeldDocument


@dataclass(slots=True, kw_only=True)
class _Opened:
    held: HeldDocument
    num_bytes: int
    num_users: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """Room for one question. open_s: what opening its document took, 0 where it was open."""

    question_id: int
    held: HeldDocument
    open_s: float


class Coordinator:
    """Decides for one executor. Its methods may be called from several threads.

    One request at a time is admitted, in the order in which they came: while it waits for room
    nobody else takes any, and whoever has room has all that it needs, so it ends and gives it back.
    capacity_bytes: of a rank, for documents and questions; None measures it.
    """

    def __init__(self, executor: Executor, *, capacity_bytes: int | None = None) -> None:
        self.executor = executor
        worker = executor.worker
        self._place, self._cfg = worker.place, worker.model.cfg
        self._item_bytes = worker.model.decoder.dtype.itemsize
        self._has_plans = worker.backend.makes_plans and worker.place.is_alone
        self.capacity_bytes = executor.free_bytes if capacity_bytes is None else capacity_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()
        self._admission = Turn()
        self._opened: OrderedDict[str, _Opened] = OrderedDict()
        self._question_ids = count()
        self.batcher = Batcher(executor.run, waits=worker.questions.is_batching)

    def run(self, action: Action) -> Any:
        """Carry out one action on every rank, in turn with others'."""
        return self.executor.run(action)

    @contextmanager
    def admit(self, name: str, *, capacity_tokens: int) -> Iterator[Admitted]:
        """An open document and room for a question on it; waits while others have the room.

        capacity_tokens: question and answer. Raises NotAdmitted where it would not fit even alone,
        and the store's errors.
        """
        with self._admission:
            began = time.perf_counter()
            is_new = name not in self._opened
            if is_new:
                self._open(name)
            open_s = time.perf_counter() - began if is_new else 0.0
            opened = self._opened[name]
            self._opened.move_to_end(name)
            opened.num_users += 1
            try:
                needed = self._admit_question(opened.held, capacity_tokens)
                self._reserve(needed)
            except BaseException:
                self._leave(opened, 0)
                raise
        question_id = next(self._question_ids)
        try:
            yield Admitted(question_id=question_id, held=opened.held, open_s=open_s)
        finally:
            self._leave(opened, needed)

    def release(self, name: str) -> None:
        """Close a document if it is open. Raises DocumentBusy while a question uses it."""
        with self._admission:
            opened = self._opened.get(name)
            if opened is None:
                return
            if opened.num_users:
                raise DocumentBusy(
                    f"document {name!r} is being asked, by {opened.num_users}; limit nobody; "
                    "try again when the answers are there"
                )
            self._close(name)

    def names(self) -> list[str]:
        """Documents that are open, the one used longest ago first."""
        return list(self._opened)

    def _open(self, name: str) -> None:
        with self.executor.worker.store.open(name) as document:
            needed = self._admit_document(document)
            self._reserve(needed)
            try:
                self.run(OpenDocument(document=name, document_hash=document.hash))
            except BaseException:
                self._give_back(needed)
                raise
        held = self.executor.worker.documents[name]
        self._opened[name] = _Opened(held=held, num_bytes=needed)

    def _close(self, name: str) -> None:
        opened = self._opened.pop(name)
        self.run(CloseDocument(document=name))
        self._give_back(opened.num_bytes)

    def _leave(self, opened: _Opened, num_bytes: int) -> None:
        with self._changed:
            opened.num_users -= 1
        self._give_back(num_bytes)

    def _admit_question(self, held: HeldDocument, capacity_tokens: int) -> int:
        """Bytes of a question; raises NotAdmitted where its document leaves no room for it."""
        layout = held.document.layout
        needed = question_bytes(
            layout,
            self._place.mesh,
            self._cfg,
            capacity_tokens=capacity_tokens,
            item_bytes=self._item_bytes,
            has_plans=self._has_plans,
        )
        document = self._opened[held.document.name].num_bytes
        if needed + document > self.capacity_bytes:
            raise NotAdmitted(
                f"a question of {capacity_tokens} tokens, answer included, needs "
                f"{_mib(needed)} beside its document's {_mib(document)} on a rank; limit "
                f"{_mib(self.capacity_bytes)}; lower --max-tokens, or use more ranks"
            )
        return needed

    def _admit_document(self, document: Document) -> int:
        """Bytes of a document on a rank; raises NotAdmitted where a rank has not that many."""
        layout, selector = document.layout, document.manifest.params.selector
        sizes: dict[str, int] = {
            "item_bytes": self._item_bytes,
            "keys_per_cluster": int(selector.get("keys_per_cluster", 0)),
        }
        needed = document_bytes(layout, self._place.mesh, **sizes)
        if needed > self.capacity_bytes:
            fitting = fitting_tokens(
                layout, self._place.mesh, capacity_bytes=self.capacity_bytes, **sizes
            )
            raise NotAdmitted(
                f"document {document.name!r} of {layout.num_tokens} tokens needs {_mib(needed)} on "
                f"a rank of mesh {self._place.mesh}; limit {_mib(self.capacity_bytes)}, about "
                f"{fitting} tokens; use more ranks, or free memory"
            )
        return needed

    def _reserve(self, num_bytes: int) -> None:
        """Wait for room; documents that nobody uses give way, the one used longest ago first."""
        while True:
            with self._changed:
                if self._used_bytes + num_bytes <= self.capacity_bytes:
                    self._used_bytes += num_bytes
                    return
                idle = [name for name, opened in self._opened.items() if not opened.num_users]
                if not idle:
                    self._changed.wait()
                    continue
            self._close(idle[0])

    def _give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._used_bytes -= num_bytes
            self._changed.notify_all()


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"

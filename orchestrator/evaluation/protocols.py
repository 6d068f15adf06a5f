"""What an evaluation needs of an engine, and no more.

Owns the protocols between the two: `orchestrator.Engine` and its result types fulfil them, and a
test replaces them. Refuses to know any evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from orchestrator.types import Mode

if TYPE_CHECKING:
    from orchestrator.ingest import IngestOptions


class Span(Protocol):
    """Where in the document an answer came from, characters from 0, end exclusive; score: its share
    of the answer's attention.
    """

    @property
    def start_char(self) -> int: ...
    @property
    def end_char(self) -> int: ...
    @property
    def score(self) -> float: ...


class Audit(Protocol):
    """Mass of the keys that were read, measured by exact attention; shares in [0, 1].

    bound_violations: (query, layer, head) whose miss was above its bound.
    """

    @property
    def mass_mean(self) -> float: ...
    @property
    def miss_max(self) -> float: ...
    @property
    def bound_violations(self) -> int: ...


class Bound(Protocol):
    """The bound on the miss: the share of (query, layer, head) where it says nothing."""

    @property
    def vacuous_share(self) -> float: ...


class Recall(Protocol):
    """Mass of the keys that were read, as reported, with its 95 % interval."""

    @property
    def mass_mean(self) -> float: ...
    @property
    def ci95(self) -> tuple[float, float]: ...
    @property
    def bound(self) -> Bound: ...
    @property
    def audit(self) -> Audit | None: ...


class Answer(Protocol):
    """What `ask` returned; the best evidence span first."""

    @property
    def text(self) -> str: ...
    @property
    def evidence(self) -> Sequence[Span]: ...
    @property
    def recall(self) -> Recall: ...


class Score(Protocol):
    """Negative log likelihood of a given answer, natural log, mean over its tokens; and the recall
    of computing it.
    """

    @property
    def nll_per_token(self) -> float: ...
    @property
    def recall(self) -> Recall: ...


class EvaluatedEngine(Protocol):
    """The part of the embedded API that this evaluation needs."""

    def ingest(self, *, text: str, name: str, options: IngestOptions | None) -> object:
        """Read a document once and keep it under `name`; None for the defaults."""

    def ask(
        self,
        name: str,
        question: str,
        *,
        mode: Mode,
        budget: str | None,
        mass: float | None,
        levels: int | None,
        max_tokens: int,
        temperature: float,
        audit: bool,
    ) -> Answer:
        """Answer a question; temperature 0 is greedy."""

    def score(
        self,
        name: str,
        question: str,
        answer_text: str,
        *,
        prefix: str,
        mode: Mode,
        budget: str | None,
        mass: float | None,
        levels: int | None,
        seed: int,
        audit: bool,
    ) -> Score:
        """Score `answer_text` after `prefix`, which is put into the answer and not scored.

        seed: of the recall sample.
        """

    def remove(self, name: str) -> object:
        """Delete a document."""

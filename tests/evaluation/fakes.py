"""An engine that reads documents with a regular expression, and the cases it is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from orchestrator.evaluation.haystacks import NiahCase, build_cases
from orchestrator.evaluation.niah import NiahMode
from orchestrator.ingest import IngestOptions
from orchestrator.types import Mode

EXACT = NiahMode(mode="exact")
SPARSE = NiahMode(mode="centroid", budget="12.5%", levels=2)


@dataclass(frozen=True, kw_only=True)
class FakeSpan:
    start_char: int
    end_char: int
    score: float = 0.5


@dataclass(frozen=True, kw_only=True)
class FakeAudit:
    mass_mean: float
    miss_max: float
    bound_violations: int = 0


@dataclass(frozen=True, kw_only=True)
class FakeBound:
    vacuous_share: float = 0.25


@dataclass(frozen=True, kw_only=True)
class FakeRecall:
    mass_mean: float
    ci95: tuple[float, float]
    audit: FakeAudit | None
    bound: FakeBound = field(default_factory=FakeBound)


@dataclass(frozen=True, kw_only=True)
class FakeAnswer:
    text: str
    evidence: tuple[FakeSpan, ...]
    recall: FakeRecall


@dataclass(frozen=True, kw_only=True)
class FakeScore:
    nll_per_token: float
    recall: FakeRecall


class BrokenEngineError(Exception):
    """What a failing engine raises."""


@dataclass
class FakeEngine:
    """Finds every needle in `exact`; in any other mode not those of the look-alike haystack.

    `exact` has no audit, as in the real one. A report's seed shifts its mass.
    """

    documents: dict[str, str] = field(default_factory=dict)
    num_ingested: int = 0
    ingest_options: IngestOptions | None = None
    is_broken: bool = False

    def ingest(self, *, text: str, name: str, options: IngestOptions | None) -> None:
        self.documents[name] = text
        self.num_ingested += 1
        self.ingest_options = options

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
    ) -> FakeAnswer:
        if self.is_broken:
            raise BrokenEngineError
        assert (budget, mass, levels) == (
            (None, None, None) if mode == "exact" else ("12.5%", None, 2)
        )
        assert max_tokens > 25
        assert temperature == 0.0
        match = self._find(name, question) if self._can_find(name, mode) else None
        return FakeAnswer(
            text=f"It is {match[1]}." if match else "It is 1.",
            evidence=(FakeSpan(start_char=match.start(), end_char=match.end()),) if match else (),
            recall=self._recall(mode, seed=0, audit=audit),
        )

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
    ) -> FakeScore:
        match = self._find(name, question)
        assert answer_text == f" {match[1]}"
        assert prefix.startswith("The special magic number for ")
        return FakeScore(
            nll_per_token=0.25 if self._can_find(name, mode) else 2.25,
            recall=self._recall(mode, seed=seed, audit=audit),
        )

    def remove(self, name: str) -> None:
        del self.documents[name]

    def _find(self, name: str, question: str) -> re.Match[str]:
        key = question.split(" for ")[1].split(maxsplit=1)[0]
        match = re.search(rf"numbers for {key} is: (\d+)", self.documents[name])
        assert match is not None
        return match

    @staticmethod
    def _can_find(name: str, mode: str) -> bool:
        return mode == "exact" or "lookalike" not in name

    @staticmethod
    def _recall(mode: str, *, seed: int, audit: bool) -> FakeRecall:
        if mode == "exact":
            return FakeRecall(mass_mean=1.0, ci95=(1.0, 1.0), audit=None)
        shift = seed / 1000
        return FakeRecall(
            mass_mean=0.9 + shift,
            ci95=(0.85 + shift, 0.95 + shift),
            audit=FakeAudit(mass_mean=0.91, miss_max=0.2) if audit else None,
        )


def make_cases() -> list[NiahCase]:
    """Two cases of each haystack."""
    return list(
        build_cases(lengths_tokens=(400,), depths=(0.2, 0.8), count_tokens=lambda t: len(t) // 4)
    )

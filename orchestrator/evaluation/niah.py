"""`longspan eval niah`: plant needles, ask for them in several modes, count what was found.

Owns the run over cases and modes, its rows, and their comparison with a baseline mode. Refuses to
know models, tensors and the store: it sees an engine through `protocols.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import UsageError
from orchestrator.evaluation.haystacks import Haystack, NiahCase
from orchestrator.evaluation.protocols import EvaluatedEngine, Span
from orchestrator.types import MODES, Mode

if TYPE_CHECKING:
    from orchestrator.ingest import IngestOptions

# "The special magic number for KEY mentioned in the provided text is 1234567." and some to spare.
MAX_ANSWER_TOKENS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahMode:
    """A way to ask: a mode of `ask` with its budget or mass, both as on the command line."""

    mode: Mode
    budget: str | None = None
    mass: float | None = None
    levels: int | None = None

    @property
    def label(self) -> str:
        """Short name that keeps two settings of one mode apart."""
        settings = (
            self.budget,
            None if self.mass is None else f"mass {self.mass:g}",
            None if self.levels is None else f"levels {self.levels}",
        )
        return " ".join([self.mode, *(text for text in settings if text)])

    @classmethod
    def parse(cls, text: str) -> NiahMode:
        """A mode from `MODE[:BUDGET|:mass=M][:levels=N]`, such as `centroid:12.5%:levels=2`.

        Raises UsageError for an unknown mode or setting, or a number that is none; whether budget
        and mass are in range is the engine's to say.
        """
        name, *settings = (part.strip() for part in text.split(":"))
        mode = next((mode for mode in MODES if mode == name), None)
        if mode is None:
            raise UsageError(f"mode {name!r} does not exist; choose one of {', '.join(MODES)}")
        values = dict(_parse_setting(text, setting) for setting in settings)
        try:
            return cls(
                mode=mode,
                budget=values.get("budget"),
                mass=float(values["mass"]) if "mass" in values else None,
                levels=int(values["levels"]) if "levels" in values else None,
            )
        except ValueError as error:
            raise UsageError(
                f"mode {text!r} has a setting that is no number; mass and levels are numbers; "
                "write centroid:mass=0.9 or centroid:levels=2"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahRow:
    """One case asked in one mode; masses and audits as the answer reported them.

    `evidence_score` is the share of the first span, None where there was no evidence.
    """

    haystack: Haystack
    length_tokens: int
    depth: float
    seed: int
    mode: str
    gold: str
    answer: str
    is_found: bool
    nll_per_token: float
    is_evidence_on_needle: bool
    evidence_score: float | None
    mass_mean: float
    mass_low: float
    mass_high: float
    audited_mass: float | None
    audited_miss_max: float | None

    @property
    def case_id(self) -> tuple[Haystack, int]:
        """What rows of the same case in different modes share."""
        return (self.haystack, self.seed)

    def as_json(self) -> dict[str, object]:
        """All fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahComparison:
    """One mode against a baseline over the same cases of one haystack, or of all (None).

    `kept_share` is the share of the cases found by the baseline that the mode finds too (1.0 where
    the baseline found none); `nll_gap` is the mode's mean nll less the baseline's.
    """

    mode: str
    baseline: str
    haystack: Haystack | None
    num_cases: int
    found_share: float
    baseline_found_share: float
    kept_share: float
    nll_mean: float
    nll_gap: float
    evidence_share: float
    misses: tuple[NiahRow, ...]

    def as_json(self) -> dict[str, object]:
        """All fields as plain JSON values, every miss with its mass."""
        return asdict(self)


def run_niah(
    engine: EvaluatedEngine,
    cases: Iterable[NiahCase],
    modes: Sequence[NiahMode],
    *,
    audit: bool = False,
    options: IngestOptions | None = None,
    on_row: Callable[[NiahRow], object] | None = None,
) -> list[NiahRow]:
    """Ingest each case once, ask and score it in every mode, and remove it again.

    Raises whatever the engine raises; the document of the case at hand is removed first.
    """
    rows: list[NiahRow] = []
    for case in cases:
        with ingested(engine, case, options) as name:
            for mode in modes:
                rows.append(ask_case(engine, name, case, mode, audit=audit))
                if on_row is not None:
                    on_row(rows[-1])
    return rows


@contextmanager
def ingested(
    engine: EvaluatedEngine, case: NiahCase, options: IngestOptions | None = None
) -> Iterator[str]:
    """The name of the case's document while it is in the store."""
    name = f"niah-{case.haystack}-{case.length_tokens}-{case.seed}"
    engine.ingest(text=case.document, name=name, options=options)
    try:
        yield name
    finally:
        engine.remove(name)


def ask_case(
    engine: EvaluatedEngine, name: str, case: NiahCase, mode: NiahMode, *, audit: bool = False
) -> NiahRow:
    """Ask and score an ingested case in one mode."""
    answer = engine.ask(
        name,
        case.question,
        mode=mode.mode,
        budget=mode.budget,
        mass=mode.mass,
        levels=mode.levels,
        max_tokens=MAX_ANSWER_TOKENS,
        temperature=0.0,
        audit=audit,
    )
    score = engine.score(
        name,
        case.question,
        f" {case.answer}",
        prefix=case.answer_prefix,
        mode=mode.mode,
        budget=mode.budget,
        mass=mode.mass,
        levels=mode.levels,
        seed=0,
        audit=False,
    )
    audited = answer.recall.audit
    return NiahRow(
        haystack=case.haystack,
        length_tokens=case.length_tokens,
        depth=case.depth,
        seed=case.seed,
        mode=mode.label,
        gold=case.answer,
        answer=answer.text,
        is_found=contains_gold(answer.text, case.answer),
        nll_per_token=score.nll_per_token,
        is_evidence_on_needle=overlaps_needle(case, answer.evidence),
        evidence_score=answer.evidence[0].score if answer.evidence else None,
        mass_mean=answer.recall.mass_mean,
        mass_low=answer.recall.ci95[0],
        mass_high=answer.recall.ci95[1],
        audited_mass=None if audited is None else audited.mass_mean,
        audited_miss_max=None if audited is None else audited.miss_max,
    )


def compare_with_baseline(
    rows: Sequence[NiahRow],
    *,
    mode: str,
    baseline: str = "exact",
    haystack: Haystack | None = None,
) -> NiahComparison:
    """Compare the rows of two mode labels; raises ValueError unless both have the same cases."""
    chosen = [row for row in rows if haystack in (None, row.haystack)]
    ours = {row.case_id: row for row in chosen if row.mode == mode}
    theirs = {row.case_id: row for row in chosen if row.mode == baseline}
    if not ours or ours.keys() != theirs.keys():
        raise ValueError(
            f"modes {mode!r} and {baseline!r}: {len(ours)} and {len(theirs)} cases; limit the same "
            "cases in both and at least one; run both modes over one list of cases"
        )
    wanted = [case_id for case_id, row in theirs.items() if row.is_found]
    misses = tuple(ours[case_id] for case_id in wanted if not ours[case_id].is_found)
    nll_mean = _mean(row.nll_per_token for row in ours.values())
    return NiahComparison(
        mode=mode,
        baseline=baseline,
        haystack=haystack,
        num_cases=len(ours),
        found_share=_mean(row.is_found for row in ours.values()),
        baseline_found_share=len(wanted) / len(theirs),
        kept_share=1.0 - len(misses) / len(wanted) if wanted else 1.0,
        nll_mean=nll_mean,
        nll_gap=nll_mean - _mean(row.nll_per_token for row in theirs.values()),
        evidence_share=_mean(row.is_evidence_on_needle for row in ours.values() if row.is_found),
        misses=misses,
    )


def contains_gold(answer: str, gold: str) -> bool:
    """Whether the gold number stands in the answer, and not as a part of a longer number."""
    start = answer.find(gold)
    while start >= 0:
        end = start + len(gold)
        around = answer[max(start - 1, 0) : start] + answer[end : end + 1]
        if not any(map(str.isdigit, around)):
            return True
        start = answer.find(gold, start + 1)
    return False


def overlaps_needle(case: NiahCase, evidence: Sequence[Span]) -> bool:
    """Whether the first span shares at least one character with the needle."""
    if not evidence:
        return False
    first = evidence[0]
    return first.start_char < case.needle_end_char and case.needle_start_char < first.end_char


def _parse_setting(mode: str, setting: str) -> tuple[str, str]:
    key, is_named, value = setting.partition("=")
    if not is_named:
        return "budget", setting
    if key not in ("budget", "mass", "levels"):
        raise UsageError(
            f"mode {mode!r} has setting {key!r}; settings are budget, mass and levels; "
            "write centroid:12.5% or centroid:mass=0.9"
        )
    return key, value


def _mean(values: Iterable[float]) -> float:
    """Mean, or 0.0 of nothing."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0

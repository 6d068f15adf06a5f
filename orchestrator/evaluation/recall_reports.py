"""Reports of recall beside their audits: what row A4 judges.

Owns one report of one case, mode and sampling seed, and the two false reporters that a true report
has to beat. Refuses to know statistics (`calibration.py`) and how recall is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from random import Random

import numpy as np

from orchestrator.errors import UsageError
from orchestrator.evaluation.calibration import Calibration, measure_calibration
from orchestrator.evaluation.haystacks import Haystack, NiahCase
from orchestrator.evaluation.niah import NiahMode
from orchestrator.evaluation.protocols import EvaluatedEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallReport:
    """Reported and audited mass of one scored answer; masses are shares in [0, 1].

    `seed` is of the recall sample; `case_seed` of the document.
    """

    haystack: Haystack
    length_tokens: int
    case_seed: int
    mode: str
    seed: int
    mass_mean: float
    mass_low: float
    mass_high: float
    vacuous_share: float
    audited_mass: float
    audited_miss_max: float
    bound_violations: int

    def as_json(self) -> dict[str, object]:
        """All fields as plain JSON values."""
        return asdict(self)


def report_case(
    engine: EvaluatedEngine, name: str, case: NiahCase, mode: NiahMode, *, seed: int
) -> RecallReport:
    """Score the gold answer of an ingested case in a sparse mode, audited.

    Raises UsageError for `exact`, which misses nothing and audits nothing.
    """
    recall = engine.score(
        name,
        case.question,
        f" {case.answer}",
        prefix=case.answer_prefix,
        mode=mode.mode,
        budget=mode.budget,
        mass=mode.mass,
        levels=mode.levels,
        seed=seed,
        audit=True,
    ).recall
    if recall.audit is None:
        raise UsageError(
            f"mode {mode.label!r} has no audit; a report is judged in modes that leave keys "
            "unread; use window or centroid"
        )
    return RecallReport(
        haystack=case.haystack,
        length_tokens=case.length_tokens,
        case_seed=case.seed,
        mode=mode.label,
        seed=seed,
        mass_mean=recall.mass_mean,
        mass_low=recall.ci95[0],
        mass_high=recall.ci95[1],
        vacuous_share=recall.bound.vacuous_share,
        audited_mass=recall.audit.mass_mean,
        audited_miss_max=recall.audit.miss_max,
        bound_violations=recall.audit.bound_violations,
    )


def calibrate(reports: Sequence[RecallReport]) -> Calibration:
    """How true the reports are; needs at least ten."""
    return measure_calibration(
        reported=[report.mass_mean for report in reports],
        ci_low=[report.mass_low for report in reports],
        ci_high=[report.mass_high for report in reports],
        audited=[report.audited_mass for report in reports],
        bound_violations=sum(report.bound_violations for report in reports),
    )


def with_constant_report(reports: Sequence[RecallReport]) -> list[RecallReport]:
    """The best that a reporter can do who looks at nothing: the audited mean, and the interval that
    holds 95 % of the audited masses.
    """
    audited = np.array([report.audited_mass for report in reports])
    low, high = np.quantile(audited, [0.025, 0.975])
    mean = float(audited.mean())
    return [
        replace(report, mass_mean=mean, mass_low=float(low), mass_high=float(high))
        for report in reports
    ]


def with_shuffled_reports(reports: Sequence[RecallReport], *, seed: int = 0) -> list[RecallReport]:
    """Every report of the right size, each beside another's audit."""
    others = list(reports)
    Random(seed).shuffle(others)
    return [
        replace(
            report,
            mass_mean=other.mass_mean,
            mass_low=other.mass_low,
            mass_high=other.mass_high,
        )
        for report, other in zip(reports, others, strict=True)
    ]

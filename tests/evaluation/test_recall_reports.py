"""A report carries what the score said, and false reporters differ in nothing but the report."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.errors import UsageError
from orchestrator.evaluation.niah import ingested
from orchestrator.evaluation.recall_reports import (
    RecallReport,
    calibrate,
    report_case,
    with_constant_report,
    with_shuffled_reports,
)
from tests.evaluation.fakes import EXACT, SPARSE, FakeEngine, make_cases


def make_reports(num_reports: int = 600) -> list[RecallReport]:
    """True reports of masses all over the range."""
    rng = np.random.default_rng(0)
    case = make_cases()[0]
    engine = FakeEngine()
    with ingested(engine, case) as name:
        first = report_case(engine, name, case, SPARSE, seed=0)
    reports = []
    for audited in rng.uniform(0.4, 0.95, num_reports):
        reported = audited + 0.01 * rng.standard_normal()
        reports.append(
            replace(
                first,
                audited_mass=audited,
                mass_mean=reported,
                mass_low=reported - 0.0196,
                mass_high=reported + 0.0196,
            )
        )
    return reports


def test_report_is_the_scores_own() -> None:
    engine, case = FakeEngine(), make_cases()[0]
    with ingested(engine, case) as name:
        report = report_case(engine, name, case, SPARSE, seed=7)
    assert (report.mass_low, report.mass_mean, report.mass_high) == (0.857, 0.907, 0.957)
    assert (report.audited_mass, report.audited_miss_max) == (0.91, 0.2)
    assert (report.vacuous_share, report.bound_violations) == (0.25, 0)
    assert (report.mode, report.seed, report.case_seed) == (SPARSE.label, 7, case.seed)
    assert json.loads(json.dumps(report.as_json()))["seed"] == 7


def test_exact_has_nothing_to_judge() -> None:
    engine, case = FakeEngine(), make_cases()[0]
    with ingested(engine, case) as name, pytest.raises(UsageError, match="'exact' has no audit"):
        report_case(engine, name, case, EXACT, seed=0)


def test_true_reports_hold_and_false_reporters_do_not() -> None:
    reports = make_reports()
    assert calibrate(reports).list_faults() == []
    constant = calibrate(with_constant_report(reports))
    assert [fault.split()[0] for fault in constant.list_faults()] == ["skill"]
    assert calibrate(with_shuffled_reports(reports)).skill < 0


def test_violations_are_added_up() -> None:
    reports = make_reports()
    reports[3] = replace(reports[3], bound_violations=2)
    reports[9] = replace(reports[9], bound_violations=1)
    assert calibrate(reports).list_faults() == ["3 bound violations; limit 0"]


def test_shuffling_keeps_audits_in_place() -> None:
    reports = make_reports(40)
    shuffled = with_shuffled_reports(reports)
    assert [r.audited_mass for r in shuffled] == [r.audited_mass for r in reports]
    assert sorted(r.mass_mean for r in shuffled) == sorted(r.mass_mean for r in reports)
    assert shuffled != reports

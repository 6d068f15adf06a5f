"""Row A4, recall is true: reported mass against audited mass over the cases of A3.

Owns the verdict and the two false reporters that must fail it; limits are those of
`orchestrator/evaluation/calibration.py`. `benchmarks/niah_rows.py` measures, or reads
`--rows FILE`. A report is one scored answer in a sparse mode with one seed of the recall sample:
the interval is over that sample, so seeds of one case are independent trials of its coverage.
"""

from __future__ import annotations

from statistics import fmean

from benchmarks.harness import print_row
from benchmarks.niah_rows import obtain
from orchestrator.evaluation.recall_reports import (
    RecallReport,
    calibrate,
    with_constant_report,
    with_shuffled_reports,
)

MIN_REPORTS = 400
BAR = (
    "at least 400 reports; bias <= 0.01; audited mean within 0.03 in each decile of reported mass; "
    "the 95 % interval covers 93 to 97 %; a constant and a shuffled report fail; the bound is "
    "never violated"
)


def judge(reports: list[RecallReport]) -> tuple[dict[str, object], bool]:
    """What was measured, and whether the bar holds."""
    found = calibrate(reports)
    constant = calibrate(with_constant_report(reports))
    shuffled = calibrate(with_shuffled_reports(reports))
    checks = {
        "enough_reports": len(reports) >= MIN_REPORTS,
        "true": found.holds(),
        "constant_fails": not constant.holds(),
        "shuffled_fails": not shuffled.holds(),
    }
    measured = {
        "checks": checks,
        "calibration": found.as_json(),
        "constant_faults": constant.list_faults(),
        "shuffled_faults": shuffled.list_faults(),
        "modes": {mode: _summary(reports, mode) for mode in sorted({r.mode for r in reports})},
    }
    return measured, all(checks.values())


def main() -> int:
    """Measure or read, judge, print."""
    found = obtain(rows=False, reports=True)
    measured, holds = judge(found.reports)
    return print_row(row="A4", measured=measured | found.origin(), bar=BAR, holds=holds)


def _summary(reports: list[RecallReport], mode: str) -> dict[str, float]:
    chosen = [report for report in reports if report.mode == mode]
    return {
        "num_reports": len(chosen),
        "reported_mean": fmean(report.mass_mean for report in chosen),
        "audited_mean": fmean(report.audited_mass for report in chosen),
        "audited_min": min(report.audited_mass for report in chosen),
        "audited_max": max(report.audited_mass for report in chosen),
        "coverage": fmean(
            report.mass_low <= report.audited_mass <= report.mass_high for report in chosen
        ),
        "interval_width": fmean(report.mass_high - report.mass_low for report in chosen),
        "audited_miss_max": max(report.audited_miss_max for report in chosen),
        "bound_vacuous_share": fmean(report.vacuous_share for report in chosen),
        "bound_violations": sum(report.bound_violations for report in chosen),
    }

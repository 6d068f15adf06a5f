"""Rows travel through their file unchanged, and each verdict can fall either way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import niah_rows
from benchmarks.bars import a3, a4, a5
from benchmarks.niah_rows import CENTROID, EXACT, Measured
from orchestrator.evaluation.haystacks import HAYSTACKS
from orchestrator.evaluation.niah import NiahRow
from orchestrator.evaluation.recall_reports import RecallReport

NUM_CASES = 20


def make_rows() -> list[NiahRow]:
    """Twenty cases of each haystack in both modes: all found, evidence on the needle."""
    return [
        NiahRow(
            haystack=haystack,
            length_tokens=2000,
            depth=0.5,
            seed=case_idx,
            mode=mode.label,
            gold="1234567",
            answer="It is 1234567.",
            is_found=True,
            nll_per_token=0.2 if mode == EXACT else 0.3,
            is_evidence_on_needle=True,
            evidence_score=0.4,
            mass_mean=0.9,
            mass_low=0.88,
            mass_high=0.92,
            audited_mass=None,
            audited_miss_max=None,
        )
        for haystack in HAYSTACKS
        for case_idx in range(NUM_CASES)
        for mode in (EXACT, CENTROID)
    ]


def make_reports(num_reports: int = 500) -> list[RecallReport]:
    """True reports in two modes."""
    rng = np.random.default_rng(0)
    reports = []
    for idx, audited in enumerate(rng.uniform(0.4, 0.95, num_reports).tolist()):
        reported = audited + 0.01 * float(rng.standard_normal())
        reports.append(
            RecallReport(
                haystack="filler",
                length_tokens=2000,
                case_seed=0,
                mode=("window", "centroid 5%")[idx % 2],
                seed=idx,
                mass_mean=reported,
                mass_low=reported - 0.0196,
                mass_high=reported + 0.0196,
                vacuous_share=0.9,
                audited_mass=audited,
                audited_miss_max=0.7,
                bound_violations=0,
            )
        )
    return reports


def make_measured() -> Measured:
    """A run as `obtain` returns it."""
    return Measured(
        grid={"depths": [0.5]},
        rows=make_rows()[:3],
        reports=make_reports(2),
        seconds={"total": 1.5},
        environment={"commit": "abc", "dirty": False},
    )


def test_file_keeps_everything_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "results" / "rows.json"
    made = make_measured()
    made.write(file)
    assert Measured.read(file) == replace(made, source="rows.json")
    assert Measured.read(file).origin()["rows_commit"] == "abc"


def test_given_file_is_judged_and_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    replace(make_measured(), reports=[]).write(file)
    monkeypatch.setattr("sys.argv", ["bar", "A3", "--rows", str(file)])
    assert niah_rows.obtain(rows=True, reports=False).rows == make_rows()[:3]
    with pytest.raises(SystemExit, match="0 reports"):
        niah_rows.obtain(rows=False, reports=True)


def test_parts_of_a_run_are_judged_together_and_others_are_refused(tmp_path: Path) -> None:
    made = replace(make_measured(), part=(0, 2))
    files = [tmp_path / f"{part}.json" for part in range(3)]
    made.write(files[0])
    replace(made, rows=make_rows()[3:5], part=(1, 2)).write(files[1])
    replace(made, environment={"commit": "other"}).write(files[2])
    for wrong in (files[:1], [files[0], files[0]]):
        with pytest.raises(SystemExit, match="each of its 2 parts once"):
            Measured.read_parts(wrong)
    whole = Measured.read_parts(files[:2])
    assert whole.rows == make_rows()[:5]
    assert whole.seconds == {"total": 3.0}
    with pytest.raises(SystemExit, match="another grid, commit or machine"):
        Measured.read_parts(files)


def test_a3_holds_and_falls() -> None:
    rows = make_rows()
    measured, holds = a3.judge(rows)
    assert holds
    assert json.loads(json.dumps(measured))["nll_gap_by_length"] == {"2k": pytest.approx(0.1)}

    def faults(changed: list[NiahRow]) -> list[str]:
        checks = a3.judge(changed)[0]["checks"]
        assert isinstance(checks, dict)
        return [name for name, is_kept in checks.items() if not is_kept]

    sparse = [row for row in rows if row.mode == CENTROID.label]
    lost = {row.case_id for row in sparse[:4]}
    assert faults([row for row in rows if row.seed]) == ["at_least_60_cases"]
    assert faults([replace(row, is_found=row.seed > 1) for row in rows]) == [
        "exact_finds_repetitive"
    ]
    assert faults([replace(r, is_found=not (r in sparse and r.case_id in lost)) for r in rows]) == [
        "centroid_keeps"
    ]
    assert faults([replace(r, nll_per_token=0.4 if r in sparse else 0.2) for r in rows]) == [
        "nll_within"
    ]


def test_a4_holds_and_falls() -> None:
    reports = make_reports()
    measured, holds = a4.judge(reports)
    assert holds
    modes = measured["modes"]
    assert isinstance(modes, dict)
    assert set(modes) == {"window", "centroid 5%"}
    assert not a4.judge(reports[:399])[1]
    assert not a4.judge([replace(report, mass_low=0.0) for report in reports])[1]
    assert not a4.judge([replace(reports[0], bound_violations=1), *reports[1:]])[1]


def test_a5_counts_answered_needles_alone() -> None:
    rows = make_rows()
    assert a5.judge(rows)[1]
    off = [replace(row, is_evidence_on_needle=row.seed > 2) for row in rows]
    measured, holds = a5.judge(off)
    assert not holds
    assert json.loads(json.dumps(measured))["exact"]["haystacks"]["filler"] == "17 of 20"
    # Needles that were not answered do not count, whatever their evidence.
    assert a5.judge([replace(row, is_found=row.is_evidence_on_needle) for row in off])[1]
    assert not a5.judge([row for row in rows if row.seed < 6])[1]

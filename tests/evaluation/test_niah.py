"""The run against an engine that reads the document with a regular expression."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from orchestrator.errors import UsageError
from orchestrator.evaluation.niah import (
    NiahMode,
    NiahRow,
    compare_with_baseline,
    contains_gold,
    overlaps_needle,
    run_niah,
)
from orchestrator.evaluation.protocols import EvaluatedEngine, Span
from orchestrator.ingest import IngestOptions
from tests.evaluation.fakes import (
    EXACT,
    SPARSE,
    BrokenEngineError,
    FakeEngine,
    FakeSpan,
    make_cases,
)

if TYPE_CHECKING:
    from orchestrator.engine import Engine

    def as_niah_engine(engine: Engine) -> EvaluatedEngine:
        """The type checker's proof that the embedded API fulfils the protocol."""
        return engine


@pytest.fixture(name="rows", scope="module")
def make_rows() -> list[NiahRow]:
    """Rows of both modes over all cases, audited."""
    return run_niah(FakeEngine(), make_cases(), [EXACT, SPARSE], audit=True)


def test_each_document_is_ingested_once_and_removed() -> None:
    engine = FakeEngine()
    seen: list[NiahRow] = []
    options = IngestOptions(segment_tokens=512)
    rows = run_niah(engine, make_cases(), [EXACT, SPARSE], options=options, on_row=seen.append)
    assert rows == seen
    assert engine.ingest_options == options
    assert engine.num_ingested == len(make_cases())
    assert len(rows) == 2 * len(make_cases())
    assert engine.documents == {}
    assert rows[0].audited_mass is None


def test_document_is_removed_when_the_engine_fails() -> None:
    engine = FakeEngine(is_broken=True)
    with pytest.raises(BrokenEngineError):
        run_niah(engine, make_cases(), [EXACT])
    assert engine.num_ingested == 1
    assert engine.documents == {}


def test_rows_carry_the_report_and_turn_into_json(rows: list[NiahRow]) -> None:
    assert rows[0].mode == "exact"
    assert (rows[0].mass_mean, rows[0].audited_mass) == (1.0, None)
    row = rows[1]
    assert (row.mass_low, row.mass_mean, row.mass_high) == (0.85, 0.9, 0.95)
    assert (row.audited_mass, row.audited_miss_max) == (0.91, 0.2)
    assert row.is_found
    assert row.is_evidence_on_needle
    assert row.evidence_score == 0.5
    assert json.loads(json.dumps(row.as_json()))["gold"] == row.gold


def test_comparison_counts_what_the_baseline_found(rows: list[NiahRow]) -> None:
    overall = compare_with_baseline(rows, mode=SPARSE.label)
    assert overall.baseline_found_share == 1.0
    assert overall.found_share == pytest.approx(4 / 6)
    assert overall.kept_share == pytest.approx(4 / 6)
    assert overall.nll_gap == pytest.approx(2 / 3)
    assert overall.evidence_share == 1.0
    assert {miss.haystack for miss in overall.misses} == {"lookalike"}
    assert len(overall.misses) == 2
    parsed = json.loads(json.dumps(overall.as_json()))
    assert parsed["misses"][0]["mass_mean"] == 0.9


def test_comparison_within_one_haystack(rows: list[NiahRow]) -> None:
    for haystack, kept in (("filler", 1.0), ("lookalike", 0.0)):
        found = compare_with_baseline(
            rows, mode=SPARSE.label, haystack="filler" if haystack == "filler" else "lookalike"
        )
        assert (found.num_cases, found.kept_share) == (2, kept)


def test_comparison_needs_the_same_cases(rows: list[NiahRow]) -> None:
    with pytest.raises(ValueError, match="the same cases"):
        compare_with_baseline(rows[:-1], mode=SPARSE.label)
    with pytest.raises(ValueError, match="at least one"):
        compare_with_baseline(rows, mode="nothing", baseline="nobody")


@pytest.mark.parametrize(
    ("answer", "is_gold"),
    [
        ("It is 1234567.", True),
        ("1234567", True),
        ("It is 12345678.", False),
        ("It is 91234567.", False),
        ("It is 123456.", False),
        ("91234567, no: 1234567", True),
        ("", False),
    ],
)
def test_gold_is_a_whole_number(answer: str, is_gold: bool) -> None:
    assert contains_gold(answer, "1234567") is is_gold


def test_evidence_has_to_share_a_character_with_the_needle() -> None:
    case = make_cases()[0]
    start, end = case.needle_start_char, case.needle_end_char

    def first(low: int, high: int) -> list[Span]:
        return [FakeSpan(start_char=low, end_char=high), FakeSpan(start_char=start, end_char=end)]

    assert overlaps_needle(case, first(start, end))
    assert overlaps_needle(case, first(end - 1, end + 50))
    assert not overlaps_needle(case, first(end, end + 50))
    assert not overlaps_needle(case, first(start - 50, start))
    assert not overlaps_needle(case, [])


def test_labels_keep_settings_apart() -> None:
    assert EXACT.label == "exact"
    assert SPARSE.label == "centroid 12.5% levels 2"
    assert NiahMode(mode="centroid", mass=0.95).label == "centroid mass 0.95"


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("exact", EXACT),
        ("centroid:12.5%:levels=2", SPARSE),
        ("centroid : budget=12.5% : levels=2", SPARSE),
        ("centroid:800", NiahMode(mode="centroid", budget="800")),
        ("centroid:mass=0.95", NiahMode(mode="centroid", mass=0.95)),
    ],
)
def test_mode_is_read_from_text(text: str, mode: NiahMode) -> None:
    assert NiahMode.parse(text) == mode


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("dense", "'dense'"),
        ("", "''"),
        ("centroid:mass=much", "mass=much"),
        ("centroid:levels=1.5", "levels=1.5"),
        ("centroid:share=3", "'share'"),
    ],
)
def test_mode_that_is_none_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        NiahMode.parse(text)

"""Row A3, needles: what `exact` finds, and how much of that `centroid` at 12.5 % keeps.

Owns the limits and the verdict; `benchmarks/niah_rows.py` measures, or reads `--rows FILE`.
"""

from __future__ import annotations

from benchmarks.harness import print_row
from benchmarks.niah_rows import CENTROID, EXACT, FILE, obtain
from orchestrator.evaluation.haystacks import HAYSTACKS, Haystack
from orchestrator.evaluation.niah import NiahComparison, NiahRow, compare_with_baseline

MIN_CASES = 60
MIN_SHARE = 0.95
MAX_NLL_GAP = 0.15
BAR = (
    "at least 60 cases of 1,024 to 7,000 tokens; exact finds >= 95 % in the repetitive haystack; "
    "centroid at 12.5 % finds >= 95 % of what exact finds; its mean nll within 0.15 of exact"
)


def judge(rows: list[NiahRow]) -> tuple[dict[str, object], bool]:
    """What was measured, and whether the bar holds."""
    total = _compare(rows, None)
    each = {haystack: _compare(rows, haystack) for haystack in _present(rows)}
    checks = {
        "at_least_60_cases": total.num_cases >= MIN_CASES,
        "exact_finds_repetitive": "filler" in each
        and each["filler"].baseline_found_share >= MIN_SHARE,
        "centroid_keeps": total.kept_share >= MIN_SHARE,
        "nll_within": abs(total.nll_gap) <= MAX_NLL_GAP,
    }
    measured = {
        "checks": checks,
        "all": total.as_json(),
        "haystacks": {haystack: found.as_json() for haystack, found in each.items()},
        "nll_gap_by_length": _gap_by_length(rows),
    }
    return measured, all(checks.values())


def main() -> int:
    """Measure or read, judge, print."""
    found = obtain(rows=True, reports=False)
    if found.source is None:
        found.write(FILE)
    measured, holds = judge(found.rows)
    return print_row(row="A3", measured=measured | found.origin(), bar=BAR, holds=holds)


def _compare(rows: list[NiahRow], haystack: Haystack | None) -> NiahComparison:
    return compare_with_baseline(rows, mode=CENTROID.label, baseline=EXACT.label, haystack=haystack)


def _present(rows: list[NiahRow]) -> list[Haystack]:
    return [haystack for haystack in HAYSTACKS if any(row.haystack == haystack for row in rows)]


def _gap_by_length(rows: list[NiahRow]) -> dict[str, float]:
    """Mean nll gap by length to the next thousand tokens: documents end at a sentence."""
    nll = {(row.case_id, row.mode): row.nll_per_token for row in rows}
    gaps: dict[int, list[float]] = {}
    for row in rows:
        if row.mode == CENTROID.label:
            gap = row.nll_per_token - nll[row.case_id, EXACT.label]
            gaps.setdefault(round(row.length_tokens / 1000), []).append(gap)
    return {f"{length}k": sum(each) / len(each) for length, each in sorted(gaps.items())}

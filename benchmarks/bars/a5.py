"""Row A5, evidence: over the needles of A3 that were answered, is the first span on the needle?

Owns the limit and the verdict; `benchmarks/niah_rows.py` measures, or reads `--rows FILE`. That
evidence is computed from attention mass and offsets alone is a test (`tests/test_evidence.py`).
"""

from __future__ import annotations

from benchmarks.harness import print_row
from benchmarks.niah_rows import ASKED, obtain
from orchestrator.evaluation.haystacks import HAYSTACKS
from orchestrator.evaluation.niah import NiahRow

MIN_SHARE = 18 / 20
MIN_ANSWERED = 20
BAR = "first span overlaps the needle in >= 18 of 20 answered needles, in exact and in centroid"


def judge(rows: list[NiahRow]) -> tuple[dict[str, object], bool]:
    """What was measured, and whether the bar holds in every mode."""
    modes = {
        mode.label: [row for row in rows if row.mode == mode.label and row.is_found]
        for mode in ASKED
    }
    holds = all(
        len(answered) >= MIN_ANSWERED and _share(answered) >= MIN_SHARE
        for answered in modes.values()
    )
    return {mode: _summary(answered) for mode, answered in modes.items()}, holds


def main() -> int:
    """Measure or read, judge, print."""
    found = obtain(rows=True, reports=False)
    measured, holds = judge(found.rows)
    return print_row(row="A5", measured=measured | found.origin(), bar=BAR, holds=holds)


def _summary(answered: list[NiahRow]) -> dict[str, object]:
    return {
        "num_answered": len(answered),
        "on_needle_share": _share(answered),
        "haystacks": {
            haystack: f"{sum(row.is_evidence_on_needle for row in chosen)} of {len(chosen)}"
            for haystack in HAYSTACKS
            if (chosen := [row for row in answered if row.haystack == haystack])
        },
        "misses": [row.as_json() for row in answered if not row.is_evidence_on_needle],
    }


def _share(answered: list[NiahRow]) -> float:
    return sum(row.is_evidence_on_needle for row in answered) / len(answered) if answered else 0.0

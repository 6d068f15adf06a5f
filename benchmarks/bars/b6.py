"""Row B6, predictions: what the planner said before against what real commands then took.

Owns the limits and the verdict. `benchmarks/predictions.py` says what was predicted, from a file
that was committed first; `benchmarks/prediction_rows.py` runs the commands, or `--rows FILE` names
what it wrote earlier.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.harness import note, print_row
from benchmarks.prediction_rows import measure_all, read_rows
from benchmarks.predictions import CASES, read_predictions

MAX_TIME_ERROR, MAX_BYTES_ERROR = 0.35, 0.10
BAR = (
    "ingest, first token, time per token and memory, CPU with 1 and 2 ranks and 1, 2 and 4 GPUs: "
    "times within 35 %, memory within 10 % of what was measured; at least half of the cases first "
    "run after their prediction was committed"
)
WANTED_RANKS = {"cpu": {1, 2}, "gpu": {1, 2, 4}}


def errors_of(predicted: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    """(predicted - measured) / measured of each figure."""
    return {name: value / measured[name] - 1.0 for name, value in predicted.items()}


def is_within(name: str, error: float) -> bool:
    """Whether a figure's error is within its limit."""
    return abs(error) <= (MAX_BYTES_ERROR if name.endswith("_bytes") else MAX_TIME_ERROR)


def compare(predictions: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Every case that was measured: predicted, measured, errors, and figures outside."""
    cases = {n: c for machine in predictions.values() for n, c in machine["cases"].items()}
    compared = {}
    for name in sorted(cases.keys() & rows.keys()):
        measured = rows[name]["measured"]
        errors = errors_of(cases[name]["predicted"], measured)
        compared[name] = {
            "predicted": cases[name]["predicted"],
            "measured": measured,
            "errors": {figure: round(error, 3) for figure, error in errors.items()},
            "outside": [figure for figure, error in errors.items() if not is_within(figure, error)],
            "is_fresh": cases[name]["is_fresh"],
            "commit": rows[name]["environment"].get("commit"),
        }
    return compared


def judge(compared: dict[str, Any]) -> tuple[dict[str, object], bool]:
    """What was measured, and whether the row holds."""
    known = {case.name: case for case in CASES}
    ranks: dict[str, set[int]] = {"cpu": set(), "gpu": set()}
    for name in compared:
        case = known[name]
        ranks["cpu" if case.machine == "cpu" else "gpu"].add(case.num_ranks)
    fresh = sum(bool(case["is_fresh"]) for case in compared.values())
    checks = {
        "all_within": bool(compared) and not any(case["outside"] for case in compared.values()),
        "half_are_fresh": 2 * fresh >= len(compared) > 0,
        "cpu_ranks": ranks["cpu"] >= WANTED_RANKS["cpu"],
        "gpu_ranks": ranks["gpu"] >= WANTED_RANKS["gpu"],
    }
    figures = [error for case in compared.values() for error in case["errors"].values()]
    measured = {
        "checks": checks,
        "cases": len(compared),
        "fresh": fresh,
        "figures": len(figures),
        "figures_outside": sum(len(case["outside"]) for case in compared.values()),
        "worst": max((abs(error) for error in figures), default=None),
        "ranks": {kind: sorted(counts) for kind, counts in ranks.items()},
        "compared": compared,
    }
    return measured, all(checks.values())


def main() -> int:
    """Measure or read, compare, print."""
    parser = argparse.ArgumentParser(prog="bar B6")
    parser.add_argument("row")
    parser.add_argument("--rows", type=Path, nargs="*", help="judge these instead of measuring")
    parser.add_argument("--machine", default="cpu")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    for file in arguments.rows or []:
        rows |= read_rows(file)
    compared = compare(read_predictions(), rows or measure_all(arguments.machine))
    for name, case in compared.items():
        note(
            f"{name}: {case['errors']} {'outside: ' + str(case['outside']) * bool(case['outside'])}"
        )
    measured, holds = judge(compared)
    return print_row(row="B6", measured=measured, bar=BAR, holds=holds)

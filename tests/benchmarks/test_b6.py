"""Row B6: what is compared with what, and when the row holds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from benchmarks.bars.b6 import compare, errors_of, is_within, judge
from benchmarks.predictions import CASES, figures, predict_all, predict_case
from benchmarks.watched import ChildrenWatch, children_of, status_bytes
from orchestrator.planner import parse_machine, published_topology
from tests.planner.machines import cpu_machine, machine


def measured_like(predictions: dict[str, Any], factor: float) -> dict[str, Any]:
    """Rows in which everything took `factor` times what was predicted."""
    return {
        name: {
            "measured": {k: v * factor for k, v in case["predicted"].items()},
            "environment": {"commit": "c"},
        }
        for each in predictions.values()
        for name, case in each["cases"].items()
    }


@pytest.fixture(scope="module")
def predictions() -> dict[str, Any]:
    h200 = published_topology(parse_machine("4xH200"))
    return {"H200": predict_all(h200), "other": predict_all(machine(kind="H100"))}


def test_names_of_cases_are_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.num_ranks for case in CASES if case.machine == "cpu"} == {1, 2}
    assert {case.num_ranks for case in CASES if case.machine != "cpu"} == {1, 2, 4}
    assert 2 * sum(case.is_fresh for case in CASES) >= len(CASES)


def test_a_machine_predicts_its_own_cases_alone(predictions: dict[str, Any]) -> None:
    assert predictions["other"]["cases"] == {}
    names = {case.name for case in CASES if case.machine == "H200"}
    assert set(predictions["H200"]["cases"]) == names
    small = predict_all(published_topology(parse_machine("1xH200")))
    assert 0 < len(small["cases"]) < len(names)


def test_a_gpu_counts_its_allocator_and_a_cpu_its_process() -> None:
    case = next(case for case in CASES if case.machine == "H200")
    plans = predict_case(case, published_topology(parse_machine("1xH200")))
    on_gpu, on_cpu = (figures(plans, is_cpu=is_cpu) for is_cpu in (False, True))
    assert on_cpu["ingest_bytes"] > on_gpu["ingest_bytes"]
    assert on_cpu["ingest_s"] == on_gpu["ingest_s"]


def test_errors_have_their_limits() -> None:
    assert errors_of({"a_s": 3.0}, {"a_s": 2.0, "num_tokens": 5}) == {"a_s": 0.5}
    assert is_within("a_s", 0.35)
    assert not is_within("a_s", -0.36)
    assert not is_within("a_bytes", 0.11)


def test_the_row_holds_only_where_everything_was_measured(predictions: dict[str, Any]) -> None:
    good = measured_like(predictions, 1.05)
    _, holds = judge(compare(predictions, good))
    assert not holds  # no CPU among them
    known = {**predictions, "cpu": {"cases": {}}}
    for case in CASES:
        if case.machine == "cpu":
            known["cpu"]["cases"][case.name] = {
                "predicted": {"ingest_s": 1.0, "ingest_bytes": 100.0},
                "is_fresh": case.is_fresh,
            }
    measured, holds = judge(compare(known, measured_like(known, 1.05)))
    assert holds
    assert measured["cases"] == len(CASES)
    bad, holds = judge(compare(known, measured_like(known, 1.2)))
    assert not holds
    assert bad["figures_outside"]
    assert judge({})[1] is False


def test_children_are_watched_while_they_last() -> None:
    watch = ChildrenWatch(os.getpid())
    program = "x = bytearray(50 << 20); import time; time.sleep(0.5)"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", program]) as child:
        time.sleep(0.2)
        assert child.pid in children_of(os.getpid())
    watch.stop()
    assert watch.peak_bytes >= 50 << 20
    assert status_bytes("self", "VmHWM") >= status_bytes("self", "VmRSS") > 0
    assert status_bytes(child.pid, "VmHWM") == 0


def test_cases_of_a_cpu_are_predicted_too() -> None:
    case = next(case for case in CASES if case.machine == "cpu")
    plans = predict_case(case, cpu_machine())
    assert set(plans) == {"exact", "centroid"}

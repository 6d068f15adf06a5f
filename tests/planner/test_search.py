"""Plans: the best of all, nothing that does not fit, and refusals that say what would."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.mesh import Mesh
from orchestrator.errors import LongspanError
from orchestrator.planner import (
    NoPlanFits,
    Plan,
    Topology,
    Workload,
    find_plan,
    parse_machine,
    published_topology,
)
from orchestrator.planner.search import chunk_sizes, fits, meshes, plans_of, splits
from tests.planner.machines import CENTROID, EXACT, choice, cpu_machine, machine, workload
from tests.source import ROOT

GIB = 1 << 30
BOTH = [EXACT, CENTROID]


def test_meshes_are_every_grid_whose_heads_divide() -> None:
    found = [str(mesh) for mesh in meshes(workload(), machine(4))]
    assert found == ["1x1", "1x2", "2x1", "1x3", "1x4", "2x2", "4x1"]


def test_chunks_stay_in_a_segment_and_only_ranks_that_can_hide_split() -> None:
    assert chunk_sizes(workload(segment_tokens=2048)) == [512, 1024, 2048]
    assert chunk_sizes(workload(segment_tokens=256)) == [256]
    two = choice("1x2").mesh
    assert splits(2048, machine(), two) == [None, 1024, 1152, 896]
    assert splits(2048, machine(overlap_share=0.0), two) == [None]
    assert splits(512, machine(), two) == [None]
    assert splits(2048, machine(), choice().mesh) == [None]


def test_the_best_plan_is_the_fastest_and_the_others_follow() -> None:
    report = find_plan(workload(), machine(4), BOTH)
    totals = [plan.prediction.total_s(128) for plan in (report.best, *report.runners_up)]
    assert totals == sorted(totals)
    every = [p for mesh in meshes(workload(), machine(4)) for p in _plans(mesh)]
    assert min(p.prediction.total_s(128) for p in every) == totals[0]


def _plans(mesh: Mesh) -> list[Plan]:
    return plans_of(workload(), machine(4), mesh, BOTH)


@given(st.integers(12, 60), st.integers(0, 60), st.integers(1, 300_000))
@settings(deadline=None, max_examples=30)
def test_more_memory_never_makes_a_plan_infeasible(gib: int, more: int, num_tokens: int) -> None:
    work = workload(num_tokens, segment_tokens=8192)
    if fits(work, machine(2, gib * GIB), BOTH):
        assert fits(work, machine(2, (gib + more) * GIB), BOTH)


def refusal_of(work: Workload, topology: Topology) -> NoPlanFits | None:
    """Why there is no plan; None where there is one, which fits."""
    try:
        report = find_plan(work, topology, BOTH)
    except NoPlanFits as refusal:
        return refusal
    assert report.best.prediction.memory_bytes <= topology.memory_bytes
    return None


@given(st.integers(12, 40), st.integers(100_000, 600_000))
@settings(deadline=None, max_examples=15)
def test_a_refusal_names_what_would_fit_and_that_fits(gib: int, num_tokens: int) -> None:
    work = workload(num_tokens, segment_tokens=8192)
    refusal = refusal_of(work, machine(1, gib * GIB))
    if refusal is None:
        return
    if refusal.fitting_tokens:
        assert str(refusal.fitting_tokens) in str(refusal)
        shorter = replace(work, num_tokens=refusal.fitting_tokens)
        assert refusal_of(shorter, machine(1, gib * GIB)) is None
    assert refusal.fitting_devices is not None
    assert f"--gpus {refusal.fitting_devices}xH100" in str(refusal)
    assert refusal_of(work, machine(refusal.fitting_devices, gib * GIB)) is None
    assert refusal_of(work, machine(refusal.fitting_devices - 1, gib * GIB)) is not None


def test_where_weights_do_not_fit_no_document_does() -> None:
    with pytest.raises(NoPlanFits, match="the weights alone on mesh 1x1 need 15") as caught:
        find_plan(workload(), machine(1, 10 * GIB), BOTH)
    assert caught.value.fitting_tokens == 0
    assert caught.value.fitting_devices == 2
    assert isinstance(caught.value, LongspanError)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_a_cpu_is_shared_by_its_ranks_and_more_cores_are_no_remedy() -> None:
    with pytest.raises(NoPlanFits, match="a smaller model, or a machine with more memory"):
        find_plan(workload(), cpu_machine(), [EXACT])
    small = replace(workload().cfg, num_layers=2, windows=(None, None))
    report = find_plan(workload(cfg=small), cpu_machine(), [EXACT])
    assert report.best.choice.threads * report.best.choice.mesh.num_ranks <= 2


def test_a_report_is_plain_values() -> None:
    report = find_plan(workload(), published_topology(parse_machine("2xH200")), BOTH)
    body = json.loads(json.dumps(report.to_json()))
    assert body["plan"]["mesh"] in {"1x1", "1x2", "2x1"}
    assert body["plan"]["residency"] == "resident"
    predicted = body["plan"]["predicted"]
    assert predicted["ingest_s"] == pytest.approx(sum(predicted["ingest_parts_s"].values()))
    memory = predicted["ingest_memory"]
    assert memory["total_bytes"] == sum(n for name, n in memory.items() if name != "total_bytes")


def test_the_planner_reads_no_clock_and_draws_nothing() -> None:
    """import-linter checks its own imports; this, that it decides the same twice."""
    program = (
        "from tests.planner.machines import *; from orchestrator.planner import find_plan; "
        "print(find_plan(workload(), machine(4), [EXACT, CENTROID]))"
    )
    outs = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert outs[0] == outs[1] != ""

"""A calibration with tiny shapes: every number is there and means something; nothing is timed."""

from __future__ import annotations

import json
import os
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest
import torch

from orchestrator.calibration import Effort, calibrate, questions
from orchestrator.calibration.arithmetic import SIZES, Probe, cluster_curve
from orchestrator.calibration.links import Together, measure_together
from orchestrator.calibration.machine import _kind, _rank_counts, _thread_counts
from orchestrator.calibration.others import Usage
from orchestrator.calibration.questions import TINY_QUESTIONS, make_documents
from orchestrator.calibration.task import Task
from orchestrator.calibration.timing import Stopwatch
from orchestrator.cli import main
from orchestrator.errors import CalibrationFailed, RankFailed
from orchestrator.planner import decode_topology, encode_topology
from orchestrator.planner.topology import OPERATIONS
from sparse_attn.api import find_backend
from tests.planner.machines import rates

TINY = Effort(sizes="tiny", questions=TINY_QUESTIONS, repeats=0.01)
TASK = Task(device="cpu", dtype="float32", backend="torch", sizes="tiny", threads=1)


def test_a_machine_is_measured_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    # Threads that wait for each other on a busy machine take long; one is as good here.
    monkeypatch.setattr("orchestrator.calibration.machine._thread_counts", lambda *_: [1])
    threads, notes = torch.get_num_threads(), list[str]()
    topology = calibrate(
        device="cpu", backend="torch", store=tmp_path / "store", effort=TINY, note=notes.append
    )
    assert torch.get_num_threads() == threads
    assert (topology.kind, topology.num_devices, topology.dtype) == ("cpu", 2, "float32")
    assert [each.threads for each in topology.rates] == [1]
    assert {(link.operation, link.ranks) for link in topology.links} == {
        (operation, 2) for operation in OPERATIONS
    }
    (contention,) = topology.contention
    assert contention.ranks == 2
    assert min(contention.compute, contention.stream) >= 1.0
    assert topology.process_bytes > 1 << 20
    assert topology.memory_bytes > 1 << 30
    assert topology.overlap_share == 0.0
    assert decode_topology(encode_topology(topology), source="file") == topology
    assert len(notes) == 5
    assert notes[-1].startswith("others used")
    assert topology.origin.endswith(notes[-1])
    assert list((tmp_path / "store").iterdir()) == []


def test_the_command_writes_the_file_that_plans_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Effort, "full", lambda device: TINY)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    file = tmp_path / "new" / "topology.json"
    arguments = ["--store", str(tmp_path / "store"), "--output", str(file), "--json"]
    assert main(["calibrate", *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["num_devices"]) == ("cpu", 1)
    wanted = ["--model", "shape:llama-3.1-8b@1", "--context", "3000", "--topology", str(file)]
    assert main(["plan", "--gpus", "cpu:1", *wanted, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["plan"]["mesh"] == "1x1"
    assert planned["figures"].startswith("measured on this machine")
    assert [path.name for path in file.parent.iterdir()] == ["topology.json"]


def test_ranks_that_cannot_measure_say_so() -> None:
    task = Task(device="cpu", dtype="float32", backend="nothing", sizes="tiny", threads=1)
    with pytest.raises(RankFailed, match="rank"):
        measure_together(2, task)


def test_contention_is_never_below_one() -> None:
    alone = rates(1)
    faster = Together(num_ranks=2, links=(), matrix_flops_per_s=9e12, weight_bytes_per_s=5e10)
    contention = faster.contention(alone)
    assert (contention.compute, contention.stream) == (1.0, 2.0)


def test_ranks_and_threads_go_in_powers_of_two_up_to_all_cores() -> None:
    assert _thread_counts("cpu", 6) == [1, 2, 4, 6]
    assert _thread_counts("cuda", 4) == [0]
    assert _rank_counts(6) == [2, 4, 6]
    assert _rank_counts(1) == []


def test_what_others_used_is_what_this_process_did_not() -> None:
    before = Usage(total_s=100.0, busy_s=50.0, own_s=20.0)
    after = Usage(total_s=110.0, busy_s=58.0, own_s=25.0)
    assert after.others_share(before) == pytest.approx(0.3)
    assert before.others_share(before) == 0.0
    assert 0.0 <= Usage.now().others_share(Usage.now()) <= 1.0


def test_a_machine_that_is_too_busy_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([3.0, 2.0, 1.0, 5.0])
    monkeypatch.setattr(questions, "forward_s", lambda *_, **__: next(took))
    probe = Probe(
        backend=find_backend("torch"),
        stopwatch=Stopwatch(device=torch.device("cpu")),
        sizes=SIZES["tiny"],
        dtype=torch.float32,
    )
    documents = make_documents(probe, TINY_QUESTIONS, 16)
    measure = partial(questions._short_and_more, probe, TINY_QUESTIONS, documents, tokens=1)
    assert measure(mode="exact") == (1.0, 4.0)  # the second try
    took = repeat(1.0)
    with pytest.raises(CalibrationFailed, match="while nothing else computes"):
        measure(mode="exact")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("something", "GPU"),
    ],
)
def test_gpus_have_short_names(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert (_kind("cuda"), _kind("cpu")) == (kind, "cpu")


def test_a_task_is_read_as_it_was_written() -> None:
    assert Task.read(TASK.arguments()) == TASK


def test_the_least_of_several_repeats_counts() -> None:
    class Steps(Stopwatch):
        def once_s(self, work: object) -> float:
            return next(seconds)

    seconds = iter([9.0, 3.0, 1.0, 2.0, 5.0])
    watch = Steps(device=torch.device("cpu"), effort=1e-9)
    assert watch.best_s(lambda: None) == 1.0


def test_flops_are_those_that_the_cost_model_counts() -> None:
    """Six assignments of 64 keys to 16 clusters and of 20 columns to 2 groups, 16 dimensions."""

    class Second(Stopwatch):
        def best_s(self, work: object) -> float:
            return 1.0

    probe = Probe(
        backend=find_backend("torch"),
        stopwatch=Second(device=torch.device("cpu")),
        sizes=SIZES["tiny"],
        dtype=torch.float32,
    )
    per_problem = 6 * 2.0 * 16 * (64 * 16 + 20 * 2)
    assert cluster_curve(probe).at(64) == 2 * per_problem

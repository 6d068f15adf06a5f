"""How figures are taken and reported, with functions whose order is all that matters."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import bar, harness
from tests.source import ROOT


def test_rounds_are_interleaved_and_rotate() -> None:
    calls: list[str] = []
    functions = {name: partial(calls.append, name) for name in "abc"}
    timings = harness.interleave(functions, repeats=3, warmup=1)
    # The warm-up round is the last of the rotation, and is not counted.
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert {timing.num_repeats for timing in timings.values()} == {3}


def test_timing_is_median_and_spread() -> None:
    timing = harness.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (timing.min_s, timing.median_s, timing.max_s) == (1.0, 3.5, 6.0)
    assert (timing.p20_s, timing.p80_s) == (2.0, 5.0)
    assert harness.Timing.of([2.0]).as_json()["p80_s"] == 2.0


def test_synchronize_runs_once_a_call() -> None:
    calls: list[str] = []
    harness.interleave(
        {"a": lambda: calls.append("call")},
        repeats=2,
        warmup=0,
        synchronize=lambda: calls.append("wait"),
    )
    assert calls == ["call", "wait"] * 2


@pytest.mark.parametrize("holds", [True, False])
def test_row_is_one_json_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    holds: bool,
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bar.py", "Z1", "--save"])
    code = harness.print_row(row="Z1", measured={"x": 1.5}, bar="x <= 2", holds=holds)
    assert code == (0 if holds else 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    row = json.loads(lines[0])
    assert (row["row"], row["measured"], row["holds"]) == ("Z1", {"x": 1.5}, holds)
    assert row["environment"]["argv"] == ["bar.py", "Z1", "--save"]
    assert json.loads((tmp_path / "results" / "Z1.json").read_text()) == row


def test_row_without_save_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["bar.py", "Z1"])
    harness.print_row(row="Z1", measured={}, bar="none", holds=True)
    assert not (tmp_path / "results").exists()


def test_rows_are_found_and_ordered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("a10.py", "a2.py", "b1.py", "common.py"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(bar, "BARS", tmp_path)
    assert bar.list_rows() == ["A2", "A10", "B1"]


@pytest.mark.parametrize("arguments", [[], ["q99"], ["../lines"]])
def test_unknown_row_is_wrong_usage(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bar", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "run make bar ROW=" in done.stderr
    assert len(done.stderr.splitlines()) == 1

"""`python -m benchmarks.bar ROW ...`: the row sees what comes after its name."""

from __future__ import annotations

import sys
import types

import pytest

from benchmarks import bar


def test_a_row_reads_what_comes_after_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main() -> int:
        seen.append(sys.argv[1:])
        return 3

    row = types.ModuleType("benchmarks.bars.a1")
    monkeypatch.setattr(row, "main", main, raising=False)
    monkeypatch.setitem(sys.modules, "benchmarks.bars.a1", row)
    monkeypatch.setattr(sys, "argv", ["bar.py", "a1", "--tokens", "5"])
    assert bar.main(sys.argv[1:]) == 3
    assert seen == [["--tokens", "5"]]


def test_a_row_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bar.main(["Z9"]) == 2
    assert "no row Z9; rows are A1" in capsys.readouterr().err

"""Every Triton kernel compiles for NVIDIA and for AMD, where there is neither (row C13)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.bars.c13 import TARGETS, compile_all, find_kernels


def compiled(cache: Path, *, each_once: bool) -> list[dict[str, Any]]:
    done = compile_all(cache, each_once=each_once)
    assert [fault for own in done for fault in own["failures"]] == []
    for target in TARGETS:
        wanted = sum(own["num_entries"][target] for own in done)
        assert sum(own["num_compiled"][target] for own in done) == wanted
    return done


def test_each_kernel_compiles_for_both_vendors(tmp_path: Path) -> None:
    done = compiled(tmp_path, each_once=True)
    kernels = find_kernels()
    assert set(done[0]["kernels"]) == kernels
    for target, (_, _, kind) in TARGETS.items():
        assert sum(own["num_compiled"][target] for own in done) == len(kernels)
        objects = {path.stem for path in tmp_path.rglob(f"*.{kind}")}
        assert objects == kernels


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_entry_of_every_list_compiles_for_both_vendors(tmp_path: Path) -> None:
    compiled(tmp_path, each_once=False)

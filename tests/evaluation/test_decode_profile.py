"""What a trace says of a step: figures of one that is small enough to count by hand."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import UsageError
from orchestrator.evaluation.decode_profile import KernelTime, read_trace


def _call(ts: float, correlation: int) -> dict[str, Any]:
    return {"cat": "cuda_runtime", "ts": ts, "dur": 1, "args": {"correlation": correlation}}


def _work(
    name: str, ts: float, dur: float, correlation: int, cat: str = "kernel"
) -> dict[str, Any]:
    args = {"correlation": correlation}
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


# Two steps: a graph of two kernels (one launch) and a copy in each; the second comes late.
TRACE = [
    {"ph": "M", "name": "process_name"},
    _call(0, 1),
    _work("read", 10, 20, 1),
    _work("merge", 30, 10, 1),
    _call(5, 2),
    _work("copy", 35, 10, 2, "gpu_memcpy"),  # beside the merge for a while
    _call(90, 3),
    _work("read", 100, 30, 3),
    _work("merge", 130, 10, 3),
    _call(95, 4),
    _work("copy", 140, 5, 4, "gpu_memcpy"),
]


def test_a_trace_is_counted() -> None:
    profile = read_trace(TRACE, 2, limit_s=27e-6)
    assert profile.span_us == pytest.approx(135 / 2)
    assert profile.busy_us == pytest.approx((35 + 45) / 2)
    assert profile.idle_share == pytest.approx(55 / 135)
    assert profile.is_launch_bound
    assert (profile.num_kernels, profile.num_launches) == (3, 2)
    assert profile.launch_queue_us == pytest.approx((10 + 30 + 10 + 45) / 2)
    assert profile.mean_kernel_us == pytest.approx(85 / 6)
    assert profile.read_share == pytest.approx(0.4)
    assert profile.kernels == (
        KernelTime("read", 1, 25),
        KernelTime("merge", 1, 10),
        KernelTime("copy", 1, 7.5),
    )
    assert "waits for launches" in profile.lines()[0]
    assert profile.lines(most=1)[1:] == ["     25.0 us  62.5%     1.0 x   25.00  read"]


def test_a_device_that_is_never_idle_is_the_limit() -> None:
    trace = [_call(0, 1), _work("a", 1, 10, 1), _work("b", 11, 10, 1)]
    profile = read_trace(trace, 1, limit_s=0.0)
    assert profile.idle_share == 0.0
    assert not profile.is_launch_bound


def test_nothing_on_the_device_is_an_error() -> None:
    with pytest.raises(UsageError, match="nothing ran on the device"):
        read_trace([_call(0, 1)], 1, limit_s=1.0)

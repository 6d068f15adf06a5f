"""Where the time of decode steps goes on a GPU: kernels, launches, waits, and what limits a step.

Reads a trace of torch's profiler; knows no model. Figures are those of SKIP (arXiv 2504.11750,
section 3): TKLQT, the time from a launch's call to the start of what it launched, is flat while the
host is what a step waits for, and grows once the device is. All kernels of a CUDA graph have one
launch, whose time is that of its first kernel.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import UsageError

# Categories of events in a trace, as torch's profiler names them.
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CALLS = ("cuda_runtime", "cuda_driver")
# A device that idles for a larger share of a step waits for the host.
MOST_IDLE = 0.1


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel of a step: how often it runs, and for how long in all, in microseconds."""

    name: str
    count: float
    us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Means over profiled steps. Times in microseconds.

    span_us: from the first start to the last end on the device, waits between steps included;
    num_kernels: of kernels, copies and fills; num_launches: host calls that started them;
    launch_queue_us: TKLQT, over all launches; read_share: of the bandwidth limit, of the span.
    """

    num_steps: int
    span_us: float
    busy_us: float
    idle_share: float
    num_kernels: float
    num_launches: float
    launch_queue_us: float
    mean_kernel_us: float
    is_launch_bound: bool
    read_share: float
    kernels: tuple[KernelTime, ...]

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)

    def lines(self, most: int = 20) -> list[str]:
        """A table for people, the longest kernels first."""
        verdict = "waits for launches" if self.is_launch_bound else "limited by the device"
        head = (
            f"{self.span_us:.0f} us a step, {self.idle_share:.1%} idle: {verdict}; "
            f"{self.num_kernels:.0f} kernels in {self.num_launches:.0f} launches, "
            f"{self.launch_queue_us:.0f} us of launch and queue, "
            f"{self.mean_kernel_us:.2f} us a kernel, {self.read_share:.0%} of the read bandwidth"
        )
        rows = [
            f"{kernel.us:9.1f} us {kernel.us / max(self.busy_us, 1e-9):6.1%} "
            f"{kernel.count:7.1f} x {kernel.us / kernel.count:7.2f}  {kernel.name}"
            for kernel in self.kernels[:most]
        ]
        return [head, *rows]


def profile_steps(step: Callable[[int], None], num_steps: int, *, limit_s: float) -> StepProfile:
    """Run step(0), step(1), ... under the profiler; limit_s: what the bytes of one allow.

    Raises UsageError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UsageError("--profile: no GPU; limit a CUDA device; run it where there is one")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for offset in range(num_steps):
            step(offset)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return read_trace(events, num_steps, limit_s=limit_s)


def read_trace(events: Iterable[dict[str, Any]], num_steps: int, *, limit_s: float) -> StepProfile:
    """The profile of num_steps steps, of a trace's events."""
    work, calls = [], {}
    for event in events:
        category = str(event.get("cat", "")).lower()
        if category in DEVICE_WORK:
            work.append(event)
        elif category in HOST_CALLS and "correlation" in event.get("args", {}):
            calls[event["args"]["correlation"]] = float(event["ts"])
    if not work:
        raise UsageError("--profile: nothing ran on the device; limit one kernel; see --device")
    work.sort(key=lambda event: float(event["ts"]))
    span, busy = _span_and_busy(work)
    started: dict[int, float] = {}
    counts: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for event in work:
        started.setdefault(event["args"].get("correlation", -1), float(event["ts"]))
        counts[event["name"]] += 1
        times[event["name"]] += float(event["dur"])
    waits = [start - calls[key] for key, start in started.items() if key in calls]
    idle = 1.0 - busy / span
    kernels = (KernelTime(name, counts[name] / num_steps, us / num_steps) for name, us in
               times.items())  # fmt: skip
    return StepProfile(
        num_steps=num_steps,
        span_us=span / num_steps,
        busy_us=busy / num_steps,
        idle_share=idle,
        num_kernels=len(work) / num_steps,
        num_launches=len(started) / num_steps,
        launch_queue_us=sum(waits) / num_steps,
        mean_kernel_us=sum(times.values()) / len(work),
        is_launch_bound=idle > MOST_IDLE,
        read_share=limit_s * 1e6 * num_steps / span,
        kernels=tuple(sorted(kernels, key=lambda kernel: -kernel.us)),
    )


def _span_and_busy(work: list[dict[str, Any]]) -> tuple[float, float]:
    """From the first start to the last end, and how long anything ran: work in order of starts."""
    first, end, busy = float(work[0]["ts"]), float(work[0]["ts"]), 0.0
    for event in work:
        start = float(event["ts"])
        stop = start + float(event["dur"])
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return max(end - first, 1e-9), busy

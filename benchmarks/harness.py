"""What every benchmark and every row shares: the environment, timing, and the last line of stdout.

Owns how a figure is taken (interleaved, median and spread) and how it is reported. Refuses to know
what is being measured, and checks no correctness: a benchmark does that itself, once, first.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
LIBRARIES = ("torch", "transformers", "triton", "numpy", "faiss-cpu", "safetensors")
Json = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one function over its repeats."""

    median_s: float
    min_s: float
    max_s: float
    p20_s: float
    p80_s: float
    num_repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summary of at least one measurement; percentiles interpolate linearly."""
        ordered = sorted(seconds)
        return cls(
            median_s=statistics.median(ordered),
            min_s=ordered[0],
            max_s=ordered[-1],
            p20_s=_percentile(ordered, 0.2),
            p80_s=_percentile(ordered, 0.8),
            num_repeats=len(ordered),
        )

    def as_json(self) -> dict[str, float]:
        """Fields by name, seconds rounded to the microsecond."""
        return {name: round(getattr(self, name), 6) for name in self.__slots__}


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time every function in turn, round after round: drift of the machine hits all alike.

    The order rotates by one each round. `synchronize` waits for a device, inside the timing.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_idx in range(-warmup, repeats):
        shift = round_idx % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed_s = _time_once(functions[name], synchronize)
            if round_idx >= 0:
                seconds[name].append(elapsed_s)
    return {name: Timing.of(values) for name, values in seconds.items()}


def environment() -> dict[str, object]:
    """Commit, machine, versions, threads, arguments: a figure is worth nothing without them."""
    import torch

    # A copy without its history says where it came from.
    own = _git("rev-parse", "HEAD")
    return {
        "commit": own or os.environ.get("LONGSPAN_COMMIT"),
        "dirty": bool(_git("status", "--porcelain")) if own else None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "gpu": _gpu(),
        # Where somebody keeps the files is nobody's business.
        "argv": [Path(word).name if word.startswith("/") else word for word in sys.argv],
    }


def print_row(
    *,
    row: str,
    measured: Json,
    bar: str | Json,
    holds: bool,
    save: bool | None = None,
) -> int:
    """Print the row as one JSON line on stdout; return the exit code: 0 holds, 1 does not.

    `save` also writes `benchmarks/results/ROW.json`; None looks for `--save` in `sys.argv`.
    """
    result = {
        "row": row,
        "measured": measured,
        "bar": bar,
        "holds": bool(holds),
        "environment": environment(),
    }
    if save if save is not None else "--save" in sys.argv[1:]:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{row}.json").write_text(
            json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
    print(json.dumps(result, allow_nan=False), flush=True)
    return 0 if holds else 1


def note(text: str) -> None:
    """Say something to whoever watches, on stderr: stdout is for the row alone."""
    print(text, file=sys.stderr, flush=True)


def cpu_name() -> str:
    """Model name of the first core, or the architecture where the kernel does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _time_once(function: Callable[[], object], synchronize: Callable[[], object] | None) -> float:
    start_s = time.perf_counter()
    function()
    if synchronize is not None:
        synchronize()
    return time.perf_counter() - start_s


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> dict[str, object] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return {
        "name": torch.cuda.get_device_name(0),
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)

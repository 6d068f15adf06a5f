"""One of several ranks that are timed together: `python -m orchestrator.calibration.rank FILE ...`.

Owns what is measured among processes: each collective by size, and products while all ranks
compute. Its place is in the environment; rank 0 writes the result, the slowest rank's, to FILE.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from collectives import DistributedGroup, join, read_rendezvous
from orchestrator.calibration.arithmetic import (
    SIZES,
    Probe,
    matrix_curve,
    weight_bytes_per_s,
)
from orchestrator.calibration.task import Task
from orchestrator.calibration.timing import Stopwatch
from orchestrator.planner.topology import OPERATIONS
from sparse_attn.api import find_backend

# Bytes that each rank receives; the first is all latency.
RECEIVED_BYTES = {
    "cpu": (64, 65_536, 1 << 20, 8 << 20),
    "cuda": (64, 1 << 20, 16 << 20, 256 << 20),
    "tiny": (64, 4096),
}
_REPEATS, _ROUNDS = 12, 10


def measure(group: DistributedGroup, task: Task) -> dict[str, object]:
    """Seconds of every operation and size, and rates while all ranks compute."""
    links = {
        operation: [
            (received, _slowest(group, _repeat_collective(group, operation, received)))
            for received in RECEIVED_BYTES[task.sizes]
        ]
        for operation in OPERATIONS
    }
    probe = Probe(
        backend=find_backend(task.backend),
        stopwatch=Stopwatch(device=group.device, effort=2.0),
        sizes=SIZES[task.sizes],
        dtype=getattr(torch, task.dtype),
    )
    group.barrier()
    matrix = matrix_curve(probe).points[-1][1]
    group.barrier()
    weights = weight_bytes_per_s(probe)
    return {
        "links": links,
        "matrix_flops_per_s": 1.0 / _slowest(group, 1.0 / matrix),
        "weight_bytes_per_s": 1.0 / _slowest(group, 1.0 / weights),
    }


def _repeat_collective(group: DistributedGroup, operation: str, received: int) -> float:
    """Mean seconds of a call: ranks that wait for each other do not take turns to be fast."""
    call = _call(group, operation, received)
    for _ in range(3):
        call()
    stopwatch = Stopwatch(device=group.device)

    def work() -> None:
        for _ in range(_REPEATS):
            call()

    group.barrier()
    return min(stopwatch.once_s(work) for _ in range(_ROUNDS)) / _REPEATS


def _call(group: DistributedGroup, operation: str, received: int) -> Callable[[], object]:
    """A call after which each rank has received that many bytes."""

    def tensor(num_bytes: float, *rows: int) -> Tensor:
        shape = (*rows, max(1, int(num_bytes) // 4))
        return torch.ones(shape, dtype=torch.float32, device=group.device)

    others = group.size - 1
    if operation == "all_gather":
        own = tensor(received / others)
        return lambda: group.all_gather(own)
    if operation == "all_to_all":
        rows = tensor(received / others, group.size)
        return lambda: group.all_to_all(rows)
    whole = tensor(received * group.size / (2 * others))
    return lambda: group.all_reduce_(whole)


def _slowest(group: DistributedGroup, seconds: float) -> float:
    """The most of any rank's."""
    most = torch.tensor([seconds], dtype=torch.float64, device=group.device)
    group.all_reduce_(most, op="max")
    return float(most)


def main() -> int:
    """Join the others, measure, and let rank 0 write the result."""
    file, *arguments = sys.argv[1:]
    task = Task.read(arguments)
    torch.set_num_threads(max(1, task.threads))
    with join(read_rendezvous(), device="cuda" if task.device == "cuda" else "cpu") as group:
        found = measure(group, task)
        if group.rank == 0:
            Path(file).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

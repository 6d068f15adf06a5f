"""What ranks beside each other get: links between them, and how much they slow each other down.

Owns starting the ranks of `rank.py` on this machine and reading what they found. Refuses to know
what a topology is made of beside links and contention.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.calibration.task import Task
from orchestrator.cluster.child import Command
from orchestrator.cluster.ended import describe_failure, find_first_failure
from orchestrator.cluster.environment import THREADS, own_packages, rank_environment
from orchestrator.cluster.ports import LOOPBACK, reserve_port
from orchestrator.cluster.processes import Supervisor
from orchestrator.errors import RankFailed
from orchestrator.planner.topology import OPERATIONS, Contention, Curve, Link, Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """What num_ranks ranks measured while all of them computed, the slowest counted."""

    num_ranks: int
    links: tuple[Link, ...]
    matrix_flops_per_s: float
    weight_bytes_per_s: float

    def contention(self, alone: Rates) -> Contention:
        """How much slower that is than a rank alone with as many threads; never faster."""
        matrix = alone.matrix_flops_per_s.points[-1][1]
        return Contention(
            ranks=self.num_ranks,
            compute=max(1.0, matrix / self.matrix_flops_per_s),
            stream=max(1.0, alone.weight_bytes_per_s / self.weight_bytes_per_s),
        )


def measure_together(num_ranks: int, task: Task) -> Together:
    """Start the ranks, let them measure, and read what rank 0 wrote. Raises RankFailed."""
    with tempfile.TemporaryDirectory() as folder, reserve_port() as port:
        file = Path(folder) / "found.json"
        commands = [_command(rank, num_ranks, port, file, task) for rank in range(num_ranks)]
        with Supervisor(commands) as ranks:
            first = find_first_failure(ranks.wait())
        if first is not None:
            raise RankFailed(describe_failure(first, num_ranks=num_ranks))
        return _read(num_ranks, json.loads(file.read_text(encoding="utf-8")))


def _command(rank: int, num_ranks: int, port: int, file: Path, task: Task) -> Command:
    base = {**os.environ, **own_packages(os.environ), THREADS: str(max(1, task.threads))}
    return Command(
        rank=rank,
        argv=(
            sys.executable,
            "-P",
            "-m",
            "orchestrator.calibration.rank",
            str(file),
            *task.arguments(),
        ),
        environ=rank_environment(base, rank=rank, num_ranks=num_ranks, address=LOOPBACK, port=port),
    )


def _read(num_ranks: int, found: dict[str, Any]) -> Together:
    links = []
    for operation in OPERATIONS:
        (_, latency_s), *sized = found["links"][operation]
        points = tuple((float(received), received / seconds) for received, seconds in sized)
        links.append(
            Link(
                operation=operation,
                ranks=num_ranks,
                latency_s=latency_s,
                bytes_per_s=Curve(points=points),
            )
        )
    return Together(
        num_ranks=num_ranks,
        links=tuple(links),
        matrix_flops_per_s=found["matrix_flops_per_s"],
        weight_bytes_per_s=found["weight_bytes_per_s"],
    )

"""Runs `python -m tests.cluster.ray_cluster`: a Ray cluster on loopback, until its input ends.

Prints its address. With `stop` it has ranks of its own instead, one of which is stopped.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.cluster.ray_driver import Job, connected
from orchestrator.cluster.ray_ranks import ray_ranks
from orchestrator.config import resolve
from tests.cluster import stand_in


def serve_cluster() -> None:
    """The cluster that the driver would start, for others."""
    import ray

    config = resolve(threads=1, store=Path("unused"))
    with TemporaryDirectory(prefix="longspan-ray-") as folder:
        job = Job(config=config, num_ranks=2, entry="", settings={}, folder=folder)
        with connected(job):
            print(ray.get_runtime_context().gcs_address, flush=True)
            sys.stdin.read()


def hold_ranks() -> None:
    """Rank 0 of ranks of which the last is stopped as soon as they have met."""
    config = replace(resolve(model="stop", threads=1, store=Path("unused")), timeout_s=60.0)
    with ray_ranks(config, 3, entry=stand_in.ENTRY) as rendezvous:
        stand_in.ask(rendezvous)


if __name__ == "__main__":
    hold_ranks() if "stop" in sys.argv else serve_cluster()

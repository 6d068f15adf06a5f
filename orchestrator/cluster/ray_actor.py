"""One rank as a Ray actor.

Owns what such a rank finds out about its place before it serves. Refuses to know Ray's placement:
`ray_driver.py` decides that. No tensor is an argument or a result here, so none passes through
Ray's object store. The driver imports this too, so that torch is not imported before it serves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from orchestrator.cluster.leash import die_with_parent
from orchestrator.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an actor is. gpu_idx: of the GPU that Ray gave it, as torch counts; 0 without one."""

    pid: int
    gpu_idx: int


class RankActor:
    """A rank; the text form is how Ray marks the lines that it prints."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __repr__(self) -> str:
        return f"rank {self._rank}"

    def place(self, entry: str) -> Place:
        """Where this actor is, once it has loaded what it will run.

        From now on it ends with its node's daemon, stopped or not.
        """
        die_with_parent(os.getppid())
        resolve_name(entry)
        return Place(pid=os.getpid(), gpu_idx=_find_gpu())

    def serve(self, entry: str, meeting: Mapping[str, Any], config: EngineConfig) -> str:
        """Serve as a rank until told to stop; returns the fault that ended it, or nothing.

        meeting: the fields of its Rendezvous.
        """
        from collectives import Rendezvous
        from orchestrator.cluster.entry import run_entry

        return run_entry(entry, Rendezvous(**meeting), config)


def _find_gpu() -> int:
    import ray

    given = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    if not given:
        return 0
    # Ray names a GPU by the variable where that is set; torch counts within the variable.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",").index(given[0]) if visible else int(given[0])

"""The environment of a rank that is started here: the variables that torchrun would set, and a few.

Owns their names and values. Refuses to start anything, and to read them: `collectives.bootstrap`
does that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
# Set by a torchrun around us, it would say that somebody else serves the store.
_FOREIGN = ("TORCHELASTIC_USE_AGENT_STORE",)


def rank_environment(
    base: Mapping[str, str], *, rank: int, num_ranks: int, address: str, port: int
) -> dict[str, str]:
    """`base`, and who the rank is and where the ranks of this one machine meet."""
    kept = {name: value for name, value in base.items() if name not in _FOREIGN}
    return kept | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def own_packages(base: Mapping[str, str]) -> dict[str, str]:
    """PYTHONPATH with which another Python finds the packages that this one runs."""
    path = (str(Path(__file__).resolve().parents[2]), base.get("PYTHONPATH", ""))
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def threads_per_rank(num_ranks: int) -> int:
    """CPU threads of each of the ranks that share this process's cores; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)

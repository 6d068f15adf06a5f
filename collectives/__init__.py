"""The rank grid, who owns what on it, and collectives as methods of a Group.

Refuses to know attention, documents and files: it sees ranks, ints and tensors. Importing it
starts nothing. `mesh.py` is arithmetic alone; `group.py` says what a collective promises, for one
rank; `local.py` does the same over threads, `distributed.py` over processes, which `bootstrap.py`
brings together and `neighbours.py` connects on one machine; `overlap.py` lets two computations take
turns over a group.
"""

from collectives.bootstrap import Rendezvous, join, read_rendezvous
from collectives.checks import Reduction
from collectives.distributed import DistributedGroup
from collectives.errors import (
    CollectivesError,
    GroupMisuse,
    MeshInvalid,
    PeerLost,
    RendezvousFailed,
    RendezvousInvalid,
)
from collectives.group import Group, Pending, SoloGroup
from collectives.local import ThreadGroup, run_threads
from collectives.mesh import (
    NUM_VIRTUAL_SHARDS,
    Coordinates,
    Mesh,
    context_owner,
    parse_mesh,
    split_evenly,
    virtual_shard,
)
from collectives.overlap import Steps, run_pair, run_steps

__all__ = [
    "CollectivesError",
    "GroupMisuse",
    "MeshInvalid",
    "PeerLost",
    "RendezvousFailed",
    "RendezvousInvalid",
    "Group",
    "Pending",
    "Reduction",
    "SoloGroup",
    "ThreadGroup",
    "run_threads",
    "DistributedGroup",
    "Steps",
    "run_pair",
    "run_steps",
    "Rendezvous",
    "join",
    "read_rendezvous",
    "NUM_VIRTUAL_SHARDS",
    "Coordinates",
    "Mesh",
    "context_owner",
    "parse_mesh",
    "split_evenly",
    "virtual_shard",
]

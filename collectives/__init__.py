"""The rank grid, who owns what on it, and collectives as methods of a Group.

Refuses to know attention, documents and files: it sees ranks, ints and tensors. Importing it
starts nothing. `mesh.py` is arithmetic alone; `group.py` moves tensors.
"""

from collectives.errors import CollectivesError, GroupMisuse, MeshInvalid
from collectives.group import Group, SoloGroup
from collectives.mesh import (
    NUM_VIRTUAL_SHARDS,
    Coordinates,
    Mesh,
    context_owner,
    parse_mesh,
    split_evenly,
    virtual_shard,
)

__all__ = [
    "CollectivesError",
    "GroupMisuse",
    "MeshInvalid",
    "Group",
    "SoloGroup",
    "NUM_VIRTUAL_SHARDS",
    "Coordinates",
    "Mesh",
    "context_owner",
    "parse_mesh",
    "split_evenly",
    "virtual_shard",
]

"""Faults of this leaf. Every message is one line: *what, value, limit, remedy*.

CollectivesError
|- MeshInvalid     a mesh that cannot be read, or that does not fit the model or the ranks
|- GroupMisuse     a tensor, rank or operation that a collective cannot take
"""

from __future__ import annotations


class CollectivesError(Exception):
    """Base of the faults that this package raises."""


class MeshInvalid(CollectivesError):
    """The rank grid is malformed, or does not fit the model or the number of ranks."""


class GroupMisuse(CollectivesError):
    """A collective was called with something that it cannot take."""

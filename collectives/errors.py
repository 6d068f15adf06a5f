"""Faults of this leaf. Every message is one line: *what, value, limit, remedy*.

CollectivesError
|- MeshInvalid         a mesh that cannot be read, or that does not fit the model or the ranks
|- GroupMisuse         a tensor, rank or operation that a collective cannot take
|- RendezvousInvalid   the environment names no usable place for the ranks to meet
|- RendezvousFailed    the ranks did not all meet within the deadline
|- PeerLost            a rank left, or did not take part in an operation within the deadline
"""

from __future__ import annotations


class CollectivesError(Exception):
    """Base of the faults that this package raises."""


class MeshInvalid(CollectivesError):
    """The rank grid is malformed, or does not fit the model or the number of ranks."""


class GroupMisuse(CollectivesError):
    """A collective was called with something that it cannot take."""


class RendezvousInvalid(CollectivesError):
    """A variable of the environment is missing, malformed or against the project's rules."""


class RendezvousFailed(CollectivesError):
    """Not all ranks met in time; nothing was joined."""


class PeerLost(CollectivesError):
    """A rank left or stopped; the group cannot be used any more.

    `rank` noticed it in `operation`; `peer` is the lost rank where that is known. Both count in the
    whole job's numbering, also when the operation belonged to a subgroup.
    """

    def __init__(
        self, *, rank: int, operation: str, peer: int | None, timeout_s: float, cause: str
    ) -> None:
        self.rank = rank
        self.operation = operation
        self.peer = peer
        lost = "a rank of its group" if peer is None else f"rank {peer}"
        super().__init__(
            f"{operation}: rank {rank} lost {lost} ({cause}); limit {timeout_s:g} s an operation; "
            "read the log of the rank that failed first, then start all ranks again"
        )

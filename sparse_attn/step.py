"""What the steps of a look-up give each other, whichever backend computed them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sparse_attn.folds import Kept
from sparse_attn.select.base import Tail
from sparse_attn.state import Part


class Scores(NamedTuple):
    """The estimated mass of units, each and all.

    log_mass: [T, H, U] float32, -inf where a unit does not count; log_mass_linear: without the
    spread within units; lse: [T, H], of all log_mass, folds by the tree.
    """

    log_mass: Tensor
    log_mass_linear: Tensor
    lse: Tensor


class Ranks(NamedTuple):
    """What a selection goes by.

    benefit: [G, T, U] float32, never negative; for a limit of mass also shares: [G, H/G, T, U], of
    the query's attention, and steady: [G, H/G, T], the share that is read anyway; else None.
    """

    benefit: Tensor
    shares: Tensor | None
    steady: Tensor | None


class UnitsRead(NamedTuple):
    """Attention of one tile over the units of one caller: read, and estimated.

    part: everything merged; lse_read: [T, H], of what was read alone; tail: what stands for the
    rest. num_attended: [G, T], keys that each query read; num_read: [G], keys that the tile read;
    kept: the last query's scores, if they were asked for.
    """

    part: Part
    lse_read: Tensor
    tail: Tail
    num_attended: Tensor
    num_read: Tensor
    kept: Kept | None

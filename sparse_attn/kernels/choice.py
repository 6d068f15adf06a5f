"""A choice among units in one layer: what a launch of `take_kernel` reads, and where it writes."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from sparse_attn.kernels.decode import Heads
from sparse_attn.kernels.early import early_launch
from sparse_attn.kernels.score import TILE_MEMBERS
from sparse_attn.kernels.search import MOST_AT_ONCE, shift_of
from sparse_attn.kernels.take import take_kernel
from sparse_attn.kernels.worth import QUANTA
from sparse_attn.select.base import Limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Tensors as in `take_kernel`; units: of heads a table of addresses, else `members`.

    opened: log masses [Z, n, P] of tiles of opened clusters, None where the units are those of
    heads; places: slots, or clusters of groups, of what is taken; span: how many of them an entry
    has, about, a power of two; most_keys: that the units of one problem can have; expected: how
    many units these are, about.
    """

    heads: Heads
    limit: Limit
    mass: Tensor
    units: Tensor
    bounds: Tensor
    steady_lse: Tensor
    num_steady: int
    tile_lse: Tensor
    num_tiles: int
    opened: Tensor | None
    scratch: Tensor
    entries: Tensor
    place_bounds: Tensor
    places: Tensor
    span: int
    most_keys: int
    expected: int

    def take(self) -> None:
        """Choose."""
        heads, limit, opened, width = self.heads, self.limit, self.opened, self.mass.shape[2]
        # As many at once as are expected, or fewer: units that are asked for again cost little.
        most = MOST_AT_ONCE if self.expected > MOST_AT_ONCE // 2 else MOST_AT_ONCE // 2
        block = min(most, triton.next_power_of_2(max(width, 128)))
        take_kernel[(heads.num_problems,)](
            self.mass, self.units, self.bounds,
            self.steady_lse, self.tile_lse,
            opened, self.scratch, self.entries, self.place_bounds, self.places,
            width, heads.num_queries, self.num_steady, self.steady_lse.shape[1], self.num_tiles,
            self.tile_lse.stride(0) // heads.per_group,
            1 if opened is None else opened.shape[1],
            limit.keys or 0, int((limit.mass or 0.0) * QUANTA.value), self.entries.shape[1],
            self.places.shape[1],
            G=heads.num_kv_heads, P=heads.per_group,
            BLOCK_P=triton.next_power_of_2(heads.per_group),
            BLOCK=block, SHIFT=shift_of(width, self.most_keys),
            BY_HEAD=opened is None, BY_MASS=limit.mass is not None, TILE_OPENED=TILE_MEMBERS,
            SPAN=self.span, **early_launch(self.mass.device),
            num_warps=8 if block == MOST_AT_ONCE else 4,
        )  # fmt: skip

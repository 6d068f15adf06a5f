"""The limit that a selector is given, and what stands for the keys that it leaves unread.

A selector answers, for one tile of queries and each KV head, which units are read exactly; every
other key of the body stands in exactly one unit of the `Tail`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_attn.errors import InvalidBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How much may be read: `keys` retrieved keys per KV head, or enough clusters for a `mass`
    share.

    Exactly one of the two is set. `mass` is the estimated share of a query's attention (steady zone
    included) that must be read, for every query and head of the tile.
    """

    keys: int | None = None
    mass: float | None = None

    def __post_init__(self) -> None:
        if (self.keys is None) == (self.mass is None):
            raise InvalidBudget(
                f"limit needs keys or mass, not keys={self.keys} mass={self.mass}; give one"
            )
        if self.keys is not None and self.keys < 0:
            raise InvalidBudget(f"limit keys={self.keys} is below 0; give a number of keys")
        if self.mass is not None and not (math.isfinite(self.mass) and 0.0 < self.mass <= 1.0):
            raise InvalidBudget(f"mass {self.mass} is outside (0, 1]; give a share such as 0.95")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """Units (clusters, and groups of clusters that the look-up did not open) that stand for unread
    keys.

    log_mass: [T, H, U] float32, estimated log sum of exp(score) over the unit, -inf where the query
    read it; log_mass_linear: the same without the spread within units, nowhere masked.
    radii: [G, U] float32, greatest distance of a key from the centroid; starts, sizes: [G, U]
    int64, the unit's run of flat slots.
    """

    log_mass: Tensor
    log_mass_linear: Tensor
    radii: Tensor
    starts: Tensor
    sizes: Tensor

    def of_queries(self, chosen: Tensor) -> Tail:
        """The tail of some of the queries only; chosen: [n] int64."""
        return replace(
            self,
            log_mass=self.log_mass[chosen],
            log_mass_linear=self.log_mass_linear[chosen],
        )

    def join(self, other: Tail) -> Tail:
        """Both tails side by side, of the same queries."""
        return Tail(
            log_mass=torch.cat([self.log_mass, other.log_mass], dim=2),
            log_mass_linear=torch.cat([self.log_mass_linear, other.log_mass_linear], dim=2),
            radii=torch.cat([self.radii, other.radii], dim=1),
            starts=torch.cat([self.starts, other.starts], dim=1),
            sizes=torch.cat([self.sizes, other.sizes], dim=1),
        )

"""The `centroid` selector: k-means clusters per KV head and segment, flat or two-level.

Owns the look-up tables and the estimate of a unit's mass; which units are read by it is
`take.py`, and `lists.py` where several callers choose together. The clusters themselves are built
by `centroid_build.py`. Sources: Squeezed Attention (arXiv 2411.09688, section 3), RetroInfer (arXiv
2505.02922, section 4), with the second-order estimate of `log_mass`.

A cluster of n keys with mean c and diagonal variance var has, for a query q (scores scaled by s),
sigma^2 = s^2 * sum_i q_i^2 var_i, and its estimated mass is
    log n + s q.c + m (sigma - m / 2),   m = min(sigma, sqrt(2 log n)).
Below the critical spread this is the Gaussian sigma^2 / 2; above it, n samples no longer reach the
tail that a Gaussian average lives on, and the free energy grows linearly (random energy model,
Derrida 1981). `docs/maths.md`, section 3, derives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_attn.folds import each_fold
from sparse_attn.select.base import Limit, Tail

# How many keys the groups opened by the two-level look-up hold, as a multiple of the keys to be
# read.
_OPEN_FACTOR = 4
# By mass, the estimated share left in unopened groups, as a share of what may stay unread.
_UNOPENED_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Units:
    """Runs of slots with their statistics, of one layer: clusters, or groups of clusters.

    centroids, variances, value_sums: [G, C, D], any float type; log_sizes (-inf at padding),
    critical (the spread sqrt(2 log n) where the estimate bends), rank_weights (benefit of reading
    the unit per share of attention), radii: [G, U] float32; starts, sizes: [G, U] int64, in flat
    slots. bounds: [G, 9] int64 on the host, the columns of head g's fold v are bounds[g, v] to
    bounds[g, v + 1]; columns after the last are padding, of size 0. ids: [G, U] int64 below 2^31,
    rising along a head's columns, unique for a head over all callers: equal benefits are taken by
    lowest id.
    columns: [G, U] int64, the column of each unit in the large tables (-1: padding), None where
    each is its own. The large tables are those of the store, never copied.
    """

    centroids: Tensor
    variances: Tensor
    value_sums: Tensor
    log_sizes: Tensor
    critical: Tensor
    rank_weights: Tensor
    radii: Tensor
    starts: Tensor
    sizes: Tensor
    bounds: Tensor
    ids: Tensor
    columns: Tensor | None = None
    _bounds: list[list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_bounds", self.bounds.tolist())

    @classmethod
    def from_tables(
        cls,
        *,
        centroids: Tensor,
        variances: Tensor,
        value_sums: Tensor,
        radii: Tensor,
        starts: Tensor,
        sizes: Tensor,
        bounds: Tensor,
        ids: Tensor,
    ) -> Units:
        """Units from what is stored; a size of 0 is padding."""
        log_sizes = torch.log(sizes.float())
        return cls(
            centroids=centroids,
            variances=variances,
            value_sums=value_sums,
            log_sizes=log_sizes,
            critical=log_sizes.clamp(min=0.0).mul_(2.0).sqrt_(),
            rank_weights=sizes.clamp(min=1).float().rsqrt_(),
            radii=radii,
            starts=starts.long(),
            sizes=sizes.long(),
            bounds=bounds.long(),
            ids=ids.long(),
        )

    @property
    def num_units(self) -> int:
        """Columns of a head, padding included."""
        return self.sizes.shape[1]

    def each_fold(self) -> Iterator[tuple[int, int, slice]]:
        """(head, fold, columns) of every fold that has units."""
        return each_fold(self._bounds)

    def rows(self, table: Tensor, head: int, columns: slice) -> Tensor:
        """The rows [n, D] of a large table that belong to columns of a head."""
        if self.columns is None:
            return table[head, columns]
        return table[head].index_select(0, self.columns[head, columns])

    def take(self, columns: Tensor) -> Units:
        """The units at columns [G, W], rising along a head, -1 (padding) last; the large tables
        stay whole.
        """
        assert self.columns is None, "units of units"
        padding = columns < 0
        safe = columns.clamp(min=0)
        ordered = columns.masked_fill(padding, self.num_units)
        return replace(
            self,
            log_sizes=self.log_sizes.gather(1, safe).masked_fill_(padding, -math.inf),
            critical=self.critical.gather(1, safe),
            rank_weights=self.rank_weights.gather(1, safe),
            radii=self.radii.gather(1, safe),
            starts=self.starts.gather(1, safe),
            sizes=self.sizes.gather(1, safe).masked_fill_(padding, 0),
            bounds=torch.searchsorted(ordered.cpu(), self.bounds),  # bounds stay with the host
            ids=self.ids.gather(1, safe),
            columns=columns,
        )

    def tail(self, log_mass: Tensor, log_mass_linear: Tensor) -> Tail:
        """The tail of these units; log_mass [T, H, U] is -inf where a query reads one."""
        return Tail(
            log_mass=log_mass,
            log_mass_linear=log_mass_linear,
            radii=self.radii,
            starts=self.starts,
            sizes=self.sizes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CentroidIndex:
    """Clusters of one layer over the document's body, and their groups.

    group_starts, group_counts: [G, P] int64, each group's run of cluster columns.
    """

    clusters: Units
    groups: Units
    group_starts: Tensor
    group_counts: Tensor

    def members(self, opened: Tensor) -> Units:
        """The clusters of the groups that are opened [G, P] bool."""
        return self.clusters.take(expand_runs(self.group_starts, self.group_counts, opened)[0])


def expand_runs(starts: Tensor, sizes: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """The members of the taken runs, run after run, and the run that each came from.

    starts, sizes: [G, U] int64; taken: [G, U] bool. Returns two [G, B] int64 tensors, B the most
    members of any head; members are -1 where padded.
    """
    ends = torch.where(taken, sizes, 0).cumsum(dim=1)
    counts = ends[:, -1:]
    width = int(counts.max()) if ends.shape[1] else 0
    place = torch.arange(width, device=ends.device).repeat(ends.shape[0], 1)
    run = torch.searchsorted(ends, place, right=True).clamp_(max=max(0, ends.shape[1] - 1))
    if width == 0:
        return place, place
    first = starts + sizes - ends  # the runs that were not taken are empty, so `run` skips them
    return (first.gather(1, run) + place).masked_fill_(place >= counts, -1), run


def opening_limit(limit: Limit) -> Limit:
    """How much the groups that the two-level look-up opens may hold."""
    if limit.keys is not None:
        return Limit(keys=_OPEN_FACTOR * limit.keys)
    assert limit.mass is not None
    return Limit(mass=1.0 - (1.0 - limit.mass) * _UNOPENED_SHARE)


def lookup_bytes(units: Units) -> int:
    """Bytes of the large tables that a look-up of all these columns reads."""
    num_bytes = units.centroids.nbytes + units.variances.nbytes + units.value_sums.nbytes
    return num_bytes * units.num_units // max(1, units.centroids.shape[1])

"""The `centroid` selector: k-means clusters per KV head and segment, flat or two-level.

Owns the look-up (which clusters to read, by budget or by mass) and what stands for the rest; the
clusters themselves are built by `centroid_build.py`. Sources: Squeezed Attention (arXiv 2411.09688,
section 3), RetroInfer (arXiv 2505.02922, section 4), with the second-order estimate of `log_mass`.

A cluster of n keys with mean c and diagonal variance var has, for a query q (scores scaled by s),
sigma^2 = s^2 * sum_i q_i^2 var_i, and its estimated mass is
    log n + s q.c + m (sigma - m / 2),   m = min(sigma, sqrt(2 log n)).
Below the critical spread this is the Gaussian sigma^2 / 2; above it, n samples no longer reach the
tail that a Gaussian average lives on, and the free energy grows linearly (random energy model,
Derrida 1981). `docs/maths.md`, section 3, derives it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sparse_attn.select.base import Limit, Selection, Tail
from sparse_attn.torch_backend import fold_rows, gather_slots, log_sum_exp, unfold_rows

# How many keys the groups opened by the two-level look-up hold, as a multiple of the keys to be
# read.
_OPEN_FACTOR = 4
# By mass, the estimated share left in unopened groups, as a share of what may stay unread.
_UNOPENED_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Units:
    """Runs of slots with their statistics, of one layer: clusters, or groups of clusters.

    centroids, variances, value_sums: [G, U, D], any float type; log_sizes (-inf at padding),
    critical (the spread sqrt(2 log n) where the estimate bends), rank_weights (benefit of reading
    the unit per share of attention), radii: [G, U] float32; starts, sizes: [G, U] int64, in slots.
    The large tables are those of the store, never copied.
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
        )

    def take(self, columns: Tensor) -> Units:
        """The units at columns [G, W]; a column of -1 becomes padding."""
        return replace(
            self.take_small(columns),
            centroids=gather_slots(self.centroids, columns),
            variances=gather_slots(self.variances, columns),
            value_sums=gather_slots(self.value_sums, columns),
        )

    def take_small(self, columns: Tensor) -> Units:
        """`take` that leaves the large tables whole: unit w is column `columns[g, w]` of them."""
        padding = columns < 0
        safe = columns.clamp(min=0)
        return replace(
            self,
            log_sizes=self.log_sizes.gather(1, safe).masked_fill_(padding, -math.inf),
            critical=self.critical.gather(1, safe),
            rank_weights=self.rank_weights.gather(1, safe),
            radii=self.radii.gather(1, safe),
            starts=self.starts.gather(1, safe),
            sizes=self.sizes.gather(1, safe).masked_fill_(padding, 0),
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


def select(
    index: CentroidIndex,
    q: Tensor,
    *,
    scale: float,
    lse_steady: Tensor,
    limit: Limit,
    levels: int,
) -> Selection:
    """Choose the clusters that each query of a tile reads exactly; the tile reads their union once.

    q: [T, H, D]; lse_steady: [T, H], natural log of the mass that is read anyway. For each query
    and KV head, clusters are ranked by the share of attention they are expected to hold, summed
    over the heads of the group, over the root of their size; ties go to the lowest slot. A cluster
    is read whole or not at all.
    levels: 1 looks at every cluster; 2 looks at groups first and only at the clusters of groups
    that some query of the tile opened.
    """
    num_kv_heads = index.clusters.sizes.shape[0]
    lse = fold_rows(lse_steady.unsqueeze(-1), num_kv_heads).squeeze(-1)
    rows = fold_rows(q.float() * scale, num_kv_heads)
    tile = _Tile(rows=rows, lse_steady=lse, num_tokens=q.shape[0])
    if levels == 1:
        return _select_among(index.clusters, tile, limit, unopened=None)
    scores = _score(index.groups, tile)
    opened = _take(index.groups, scores, tile, opening_limit(limit), lse_other=lse)
    opened_by_any = opened.any(dim=1, keepdim=True)
    num_bytes = lookup_bytes(index.groups)
    columns, _ = expand_runs(index.group_starts, index.group_counts, opened_by_any[:, 0])
    unopened = _tail(index.groups, scores, opened_by_any.expand_as(opened), tile)
    if columns.shape[1] == 0:
        return Selection(
            slots=columns,
            visible=None,
            tail=unopened,
            value_sums=index.groups.value_sums,
            lookup_bytes=num_bytes,
        )
    clusters = index.clusters.take(columns)
    selection = _select_among(clusters, tile, limit, unopened=unopened)
    return replace(
        selection,
        value_sums=torch.cat([selection.value_sums, index.groups.value_sums], dim=1),
        lookup_bytes=selection.lookup_bytes + num_bytes,
    )


def select_nothing(index: CentroidIndex, q: Tensor, *, scale: float) -> Selection:
    """No cluster is read; the tail says what stays unread."""
    lse_steady = q.new_zeros(q.shape[:2], dtype=torch.float32)
    limit = Limit(keys=0)
    return select(index, q, scale=scale, lse_steady=lse_steady, limit=limit, levels=1)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Queries that read together: rows [G, R, D] float32, R = (H/G) * T, times the score scale.

    lse_steady: [G, R] natural log of the mass that is read anyway.
    """

    rows: Tensor
    lse_steady: Tensor
    num_tokens: int

    def per_query(self, x: Tensor) -> Tensor:
        """[G, R, U] -> [G, H/G, T, U]."""
        per_group = x.shape[1] // self.num_tokens
        return x.view(x.shape[0], per_group, self.num_tokens, x.shape[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scores:
    """Log mass of each unit with and without its spread: [G, R, U]."""

    log_mass: Tensor
    log_mass_linear: Tensor


def opening_limit(limit: Limit) -> Limit:
    """How much the groups that the two-level look-up opens may hold."""
    if limit.keys is not None:
        return Limit(keys=_OPEN_FACTOR * limit.keys)
    assert limit.mass is not None
    return Limit(mass=1.0 - (1.0 - limit.mass) * _UNOPENED_SHARE)


def _select_among(
    clusters: Units, tile: _Tile, limit: Limit, *, unopened: Tail | None
) -> Selection:
    scores = _score(clusters, tile)
    lse_other = tile.lse_steady
    if unopened is not None:
        elsewhere = log_sum_exp(fold_rows(unopened.log_mass, tile.rows.shape[0]))
        lse_other = torch.logaddexp(lse_other, elsewhere)
    taken = _take(clusters, scores, tile, limit, lse_other=lse_other)
    visible = None
    if tile.num_tokens == 1:
        slots, _ = expand_runs(clusters.starts, clusters.sizes, taken[:, 0])
    else:
        slots, run = expand_runs(clusters.starts, clusters.sizes, taken.any(dim=1))
        visible = taken.gather(2, run.unsqueeze(1).expand(-1, tile.num_tokens, -1))
    tail = _tail(clusters, scores, taken, tile)
    if unopened is not None:
        tail = tail.join(unopened)
    return Selection(
        slots=slots,
        visible=visible,
        tail=tail,
        value_sums=clusters.value_sums,
        lookup_bytes=lookup_bytes(clusters),
    )


def _score(units: Units, tile: _Tile) -> _Scores:
    centroids, variances = (x.float().transpose(1, 2) for x in (units.centroids, units.variances))
    linear = torch.baddbmm(units.log_sizes.unsqueeze(1), tile.rows, centroids)
    sigma = torch.bmm(tile.rows.square(), variances).sqrt_()
    knee = torch.minimum(sigma, units.critical.unsqueeze(1))
    log_mass = torch.addcmul(linear, knee, sigma.sub_(knee, alpha=0.5))
    return _Scores(log_mass=log_mass, log_mass_linear=linear)


def _take(units: Units, scores: _Scores, tile: _Tile, limit: Limit, *, lse_other: Tensor) -> Tensor:
    """Which units each query takes, [G, T, U] bool.

    lse_other: [G, R], natural log of the mass of everything that is not among the units.
    """
    total = torch.logaddexp(log_sum_exp(scores.log_mass), lse_other)
    shares = tile.per_query(torch.exp(scores.log_mass - total.unsqueeze(-1)))
    order = _descending(shares.sum(dim=1) * units.rank_weights.unsqueeze(1))
    if limit.keys is not None:
        sizes = units.sizes.unsqueeze(1).expand_as(order).gather(2, order)
        taken = sizes.cumsum(dim=-1) <= limit.keys
    else:
        assert limit.mass is not None
        in_order = shares.gather(3, order.unsqueeze(1).expand_as(shares))
        steady = tile.per_query(torch.exp(tile.lse_steady - total).unsqueeze(-1))
        before = in_order.cumsum(dim=-1) - in_order + steady
        taken = (before < limit.mass).any(dim=1)
    return torch.zeros_like(taken).scatter_(2, order, taken)


def _descending(benefit: Tensor) -> Tensor:
    """Order of non-negative float32 rows from greatest to least, equal values by lowest index.

    On the CPU each value and its index become one integer that sorts the same way (bits of a
    non-negative float are ordered as it is): numpy sorts those in vector registers, several times
    faster than a stable sort.
    """
    if benefit.device.type != "cpu":
        return benefit.sort(dim=-1, descending=True, stable=True).indices
    bits = benefit.contiguous().view(torch.int32).numpy().astype(np.int64)
    packed = -(bits << 32) + np.arange(benefit.shape[-1])
    packed.sort(axis=-1)
    return torch.from_numpy(packed & 0xFFFFFFFF)


def _tail(units: Units, scores: _Scores, taken: Tensor, tile: _Tile) -> Tail:
    """What stands for the units that a query did not take; taken: [G, T, U]."""
    untaken = tile.per_query(scores.log_mass).masked_fill(taken.unsqueeze(1), -math.inf)
    return units.tail(
        unfold_rows(untaken.view_as(scores.log_mass), tile.num_tokens),
        unfold_rows(scores.log_mass_linear, tile.num_tokens),
    )


def lookup_bytes(units: Units, num_units: int | None = None) -> int:
    """Bytes of the large tables that a look-up of `num_units` columns (all) a KV head reads."""
    num_bytes = units.centroids.nbytes + units.variances.nbytes + units.value_sums.nbytes
    num_columns = units.centroids.shape[1]
    return num_bytes if num_units is None else num_bytes * num_units // max(1, num_columns)

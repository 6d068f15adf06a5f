"""Look-up tables of the documents of a plan, as kernels take them: addresses and int32 numbers.

Owns the division of each head's units into tiles that no fold's bound crosses. Knows no queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn.folds import NUM_FOLDS
from sparse_attn.kernels.score import TILE_UNITS
from sparse_attn.select.centroid import CentroidIndex


class UnitTables:
    """Clusters, or groups of clusters, of every document in every layer.

    Addresses of each head's rows, [L, B * G] int64: sizes, slots (first ones) [U] int32; firsts:
    slots, or of groups the first columns of their clusters; counted: sizes, or the clusters of
    groups. tiles: [n, 4] int32 (`score.score_tile`); tile_bounds, bounds: [B * G, 9] int32, of each
    head's folds among its tiles and its units; tile_first: [B * G + 1] int32; counts: [B * G]
    int32, units of a head, padding included; addresses: [L, B, 6] int64, what a kernel's `tables`
    is, by layer.
    """

    def __init__(self, indexes: Sequence[CentroidIndex], *, of_groups: bool) -> None:
        """Of one document: an index a layer, whose columns are the same in every layer. Keeps the
        small tables alive, not the indexes: who has both can give a document up.
        """
        units = [i.groups if of_groups else i.clusters for i in indexes]
        device, width = units[0].sizes.device, units[0].num_units
        sizes, slots = (
            [x.int().contiguous() for x in own]
            for own in ([u.sizes for u in units], [u.starts for u in units])
        )
        firsts, counted = slots, sizes
        if of_groups:
            firsts = [i.group_starts.int().contiguous() for i in indexes]
            counted = [i.group_counts.int().contiguous() for i in indexes]
        self._kept: Sequence[object] = (sizes, slots, firsts, counted)
        self.sizes, self.slots, self.firsts, self.counted = (
            torch.stack([rows_of(x) for x in own]) for own in (sizes, slots, firsts, counted)
        )
        bounds = units[0].bounds
        tiles, tile_bounds = _tile(bounds.tolist())
        self.bounds = bounds.int().to(device)
        self.counts = torch.full((len(bounds),), width, dtype=torch.int32, device=device)
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=device).view(-1, 4)
        self.tile_bounds = torch.tensor(tile_bounds, dtype=torch.int32, device=device)
        own_tiles = [0, *(row[-1] for row in tile_bounds)]
        self.tile_first = torch.tensor(own_tiles, device=device).cumsum(0).int()
        self.max_units, self.max_tiles = width, max(own_tiles)
        rows = [
            [
                u.centroids.data_ptr(),
                u.variances.data_ptr(),
                sizes[i].data_ptr(),
                width,
                firsts[i].data_ptr(),
                u.value_sums.data_ptr(),
            ]
            for i, u in enumerate(units)
        ]
        self.addresses = torch.tensor(rows, device=device).unsqueeze(1)

    @classmethod
    def joined(cls, parts: Sequence[UnitTables]) -> UnitTables:
        """The tables of several documents, which stay where they are."""
        if len(parts) == 1:
            return parts[0]
        whole = cls.__new__(cls)
        whole._kept = parts
        for name in ("sizes", "slots", "firsts", "counted", "addresses"):
            setattr(whole, name, torch.cat([getattr(part, name) for part in parts], dim=1))
        for name in ("bounds", "counts", "tile_bounds"):
            setattr(whole, name, torch.cat([getattr(part, name) for part in parts]))
        heads_before, tiles_before = 0, 0
        tiles, tile_first = [], []
        for part in parts:
            shift = torch.zeros_like(part.tiles[:1])
            shift[:, 0] = heads_before
            tiles.append(part.tiles + shift)
            tile_first.append(part.tile_first[:-1] + tiles_before)
            heads_before += part.counts.shape[0]
            tiles_before += part.tiles.shape[0]
        tile_first.append(torch.full_like(part.tile_first[:1], tiles_before))
        whole.tiles, whole.tile_first = torch.cat(tiles), torch.cat(tile_first)
        whole.max_units = max(part.max_units for part in parts)
        whole.max_tiles = max(part.max_tiles for part in parts)
        return whole


Tables = tuple[UnitTables, UnitTables]


def tables_of(indexes: Sequence[CentroidIndex]) -> Tables:
    """Tables of one document's clusters and of its groups, which plans may share."""
    return UnitTables(indexes, of_groups=False), UnitTables(indexes, of_groups=True)


def join_tables(parts: Sequence[Tables]) -> Tables:
    """The tables of several documents, side by side."""
    clusters, groups = zip(*parts, strict=True)
    return UnitTables.joined(clusters), UnitTables.joined(groups)


def rows_of(table: Tensor) -> Tensor:
    """Address of each row of a contiguous table: int64, on its device."""
    row = torch.arange(table.shape[0], device=table.device)
    return table.data_ptr() + row * (table.stride(0) * table.element_size())


def _tile(heads: list[list[int]]) -> tuple[list[tuple[int, int, int, int]], list[list[int]]]:
    """(head, first unit, units, index among the head's) of every tile, and the folds' bounds among
    each head's tiles, of heads' 9 bounds among their units.
    """
    tiles, all_bounds = [], []
    for head, edges in enumerate(heads):
        own, bounds = 0, [0]
        for fold in range(NUM_FOLDS):
            for first in range(edges[fold], edges[fold + 1], TILE_UNITS):
                tiles.append((head, first, min(TILE_UNITS, edges[fold + 1] - first), own))
                own += 1
            bounds.append(own)
        all_bounds.append(bounds)
    return tiles, all_bounds

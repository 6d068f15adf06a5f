"""Look-up tables of the documents of a plan, as kernels take them: addresses and int32 numbers.

Owns the division of each head's units into tiles that no fold's bound crosses. Knows no queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparse_attn.folds import NUM_FOLDS
from sparse_attn.kernels.score import TILE_UNITS
from sparse_attn.select.centroid import CentroidIndex, Units


class UnitTables:
    """Clusters, or groups of clusters, of every document in every layer.

    Per layer: sizes, slots (first ones) [sum of U over all heads] int32; firsts: slots, or of
    groups the first columns of their clusters; counted: sizes, or the clusters of groups. head_at
    [B * G + 1]: where each head's begin in them. tiles: [n, 4] int32 (`score.score_tile`);
    tile_bounds, bounds: [B * G, 9] int32, of each head's folds among its tiles and its units;
    tile_first: [B * G + 1] int32; counts: [B * G] int32, units of a head, padding included;
    addresses: [B, 6] int64 a layer, what a kernel's `tables` is.
    """

    def __init__(self, indexes: Sequence[Sequence[CentroidIndex]], *, of_groups: bool) -> None:
        """indexes: [document][layer]; columns are the same in every layer of a document."""
        units = [[i.groups if of_groups else i.clusters for i in own] for own in indexes]
        heads, device = [own[0] for own in units], units[0][0].sizes.device
        self.sizes = _side_by_side([[u.sizes for u in own] for own in units])
        self.slots = _side_by_side([[u.starts for u in own] for own in units])
        self.firsts, self.counted = self.slots, self.sizes
        if of_groups:
            self.firsts = _side_by_side([[i.group_starts for i in own] for own in indexes])
            self.counted = _side_by_side([[i.group_counts for i in own] for own in indexes])
        widths = [u.num_units for u in heads for _ in range(u.sizes.shape[0])]
        self._edges = [0]
        for width in widths:
            self._edges.append(self._edges[-1] + width)
        self.head_at = torch.tensor(self._edges, device=device)
        self.counts = torch.tensor(widths, dtype=torch.int32, device=device)
        bounds = torch.cat([u.bounds for u in heads])
        self.bounds = bounds.int().to(device)
        tiles, tile_bounds = _tile(bounds.tolist())
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=device).view(-1, 4)
        self.tile_bounds = torch.tensor(tile_bounds, dtype=torch.int32, device=device)
        own_tiles = [0, *(row[-1] for row in tile_bounds)]
        self.tile_first = torch.tensor(own_tiles, device=device).cumsum(0).int()
        self.max_units = max(widths)
        self.max_tiles = max(own_tiles)
        self.addresses = [
            torch.tensor([self._row(own[i], b, i) for b, own in enumerate(units)], device=device)
            for i in range(len(units[0]))
        ]

    def _row(self, units: Units, document: int, layer: int) -> list[int]:
        first_unit = self._edges[document * units.sizes.shape[0]]
        return [
            units.centroids.data_ptr(),
            units.variances.data_ptr(),
            self.sizes[layer][first_unit:].data_ptr(),
            units.num_units,
            self.firsts[layer][first_unit:].data_ptr(),
            units.value_sums.data_ptr(),
        ]

    def rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """sizes, firsts, counted of a layer, a row for each head: [B * G, max_units], 0 behind."""
        return (
            self._row_of_head(self.sizes[layer]),
            self._row_of_head(self.firsts[layer]),
            self._row_of_head(self.counted[layer]),
        )

    def _row_of_head(self, flat: Tensor) -> Tensor:
        widths = [b - a for a, b in pairwise(self._edges)]
        if len(set(widths)) == 1:
            return flat.view(len(widths), -1)
        return pad_sequence(list(torch.split(flat, widths)), batch_first=True)


def _side_by_side(tables: list[list[Tensor]]) -> list[Tensor]:
    """[document][layer] tables [G, U]: for each layer, every document's heads, int32."""
    layers = zip(*tables, strict=True)
    return [torch.cat([own.int().flatten() for own in layer]) for layer in layers]


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

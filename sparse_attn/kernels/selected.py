"""The `centroid` step: select, read, estimate, merge.

One level: every cluster is scored, the best are read, the others stand for their keys. Two levels:
groups are scored and the best opened, their clusters scored and the best read; clusters that were
opened but not read, and groups that were not opened, stand for their keys. Every unread key is in
exactly one of them. Everything is decided when the plan is made: `run` only launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from sparse_attn.estimate import Missed
from sparse_attn.folds import NUM_FOLDS
from sparse_attn.kernels.choice import Choice
from sparse_attn.kernels.decode import (
    KV_TYPES,
    Attended,
    DecodeDocument,
    Heads,
    Rows,
    check_documents,
)
from sparse_attn.kernels.dense import STEADY_SLOTS
from sparse_attn.kernels.early import early_launch
from sparse_attn.kernels.evidence import Evidence
from sparse_attn.kernels.pieces import count_steady, runs_of, steady_pieces
from sparse_attn.kernels.read import read_launch, read_options
from sparse_attn.kernels.score import TILE_MEMBERS, TILE_UNITS
from sparse_attn.kernels.steps import look_kernel, open_kernel, read_kernel
from sparse_attn.kernels.tables import Tables, join_tables, rows_of, tables_of
from sparse_attn.kernels.tails import sample_unread
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import opening_limit

# Programs that share what is opened, and what is read: as many as run at once, and of one problem
# at least so many, where there are enough problems.
_PROGRAMS, _LEAST = (528, 264), (16, 8)


class CentroidDecode:
    """Attention over the clusters that a limit lets each query have, everything else estimated.

    visible, evidence: as in `DenseDecode`; levels: of the look-up; estimates: whether the rest
    counts in `Attended.out`; tables: of these documents, where they were made before. After `run`:
    slots [Z, capacity] int32, what each problem read, cut by slot_bounds [layer, Z, 9] (the last is
    their number), as packed_bounds [layer, Z, 9] cuts the clusters of opened groups.
    """

    def __init__(
        self,
        heads: Heads,
        documents: Sequence[DecodeDocument],
        visible: Tensor,
        *,
        limit: Limit,
        levels: int,
        scale: float,
        estimates: bool = True,
        evidence: Sequence[Sequence[Tensor]] | None = None,
        tables: Tables | None = None,
    ) -> None:
        check_documents(heads, documents, visible)
        self.heads, self._visible, self._scale = heads, visible, scale
        self._limit, self._is_deep = limit, levels == 2
        self._estimates, self._keeps = estimates, evidence is not None
        if evidence is not None:
            self._evidence = Evidence(heads, evidence, [0] * len(documents))
        self._kept = documents  # the plan holds addresses
        layers, device = range(len(documents[0].k)), visible.device
        self._clusters, groups = tables or join_tables(
            [tables_of(document.indexes) for document in documents]
        )
        self._first = groups if self._is_deep else self._clusters
        self._num_steady = count_steady(x for d in documents for x in d.steady_k)
        steady = steady_pieces([d.steady_k[0] for d in documents])
        self._steady = [
            torch.cat(
                [runs_of(steady[b], d.steady_k[i], d.steady_v[i]) for b, d in enumerate(documents)]
            )
            for i in layers
        ]
        self._kv = [
            torch.tensor([d.addresses(i) for d in documents], device=device) for i in layers
        ]
        self._stored = KV_TYPES[documents[0].k[0].dtype]
        self._allocate(documents, len(layers))
        self._choices = [self._first_choice(i) for i in layers]
        self._unread: dict[int, Tensor] = {}
        self._seconds = [self._second_choice(i) for i in layers] if self._is_deep else []

    def _allocate(self, documents: Sequence[DecodeDocument], num_layers: int) -> None:
        """What one launch writes and the next ones read, for all layers."""
        z, p, like = self.heads.num_problems, self.heads.per_group, documents[0].steady_k[0]

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=like.device)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=like.device)

        first, opening = self._first, opening_limit(self._limit)
        self._most_keys = max(longest_head(document) for document in documents)
        self.capacity = max(1, _least(self._most_keys, self._limit.keys))
        self._division = read_options(self._limit.keys, self.heads.head_dim)
        self.slots, self.slot_bounds = ints(z, self.capacity), ints(num_layers, z, 9)
        self._scores = floats(z, p, self.capacity if self._keeps else 1)
        self._width = first.max_units
        # Columns without a unit, and tiles that a head does not have, are never written.
        self._mass = floats(z, p, self._width).fill_(-float("inf"))
        self._tile_lse = floats(z, max(1, first.max_tiles), p).fill_(-float("inf"))
        self._packed = _least(self._clusters.max_units, opening.keys) if self._is_deep else 1
        self._members = ints(3, z, self._packed)
        self._packed_mass = floats(z, p, self._packed).fill_(-float("inf"))
        self._opened = ints(z, first.max_units if self._is_deep else 1, 3)
        self._entries = ints(z, min(self.capacity, max(1, self._clusters.max_units)), 3)
        self.packed_bounds = ints(num_layers, z, 9)
        self._opened_lse = floats(z, self._packed // TILE_MEMBERS + NUM_FOLDS, p)
        widest = max(self._width, self._packed)
        self._scratch = ints(z, widest)
        tiles = self._num_steady + self.capacity // self._division["TILE_READ"] + NUM_FOLDS
        members = tiles + first.max_tiles
        self._bases = (self._num_steady, tiles, members)
        num_members = self._packed // TILE_UNITS + NUM_FOLDS if self._is_deep else 0
        self._rows = Rows(self.heads, members + num_members, like)

    def _first_choice(self, layer: int) -> Choice:
        """Among the units that are looked at first."""
        first, is_deep = self._first, self._is_deep
        addresses = [x[layer] for x in (first.sizes, first.firsts, first.counted)]
        return Choice(
            heads=self.heads,
            limit=opening_limit(self._limit) if is_deep else self._limit,
            mass=self._mass,
            units=torch.stack(addresses, dim=1),
            bounds=first.bounds,
            steady_lse=self._rows.lse,
            num_steady=self._num_steady,
            tile_lse=self._tile_lse,
            num_tiles=self._tile_lse.shape[1],
            opened=None,
            scratch=self._scratch,
            entries=self._opened if is_deep else self._entries,
            place_bounds=(self.packed_bounds if is_deep else self.slot_bounds)[layer],
            places=self._members[0] if is_deep else self.slots,
            span=64 if is_deep else 8,
            most_keys=self._most_keys,
            expected=self._width,
        )

    def _second_choice(self, layer: int) -> Choice:
        """Among the clusters of opened groups."""
        most_keys = _least(self._most_keys, opening_limit(self._limit).keys)
        mean_keys = max(1, self._most_keys // max(1, self._clusters.max_units))
        return Choice(
            heads=self.heads,
            limit=self._limit,
            mass=self._packed_mass,
            units=self._members,
            bounds=self.packed_bounds[layer],
            steady_lse=self._rows.lse,
            num_steady=self._num_steady,
            tile_lse=self._rows.lse[:, self._bases[1] :],
            num_tiles=self._first.max_tiles,
            opened=self._opened_lse,
            scratch=self._scratch,
            entries=self._entries,
            place_bounds=self.slot_bounds[layer],
            places=self.slots,
            span=8,
            most_keys=most_keys,
            expected=most_keys // mean_keys,
        )

    def _each(self, table: Tensor) -> Tensor:
        return rows_of(table)

    def run(self, layer: int, q: Tensor) -> Attended:
        """Attention of q [B, T, H, D]; overwrites what the last call gave."""
        self._rows.check(layer, len(self._choices), q)
        self._look(layer, q)
        self._choices[layer].take()
        if self._is_deep:
            self._open(layer, q)
            self._seconds[layer].take()
        self._read(layer, q)
        num_lists = 1
        if self._estimates:
            num_lists = 3 if self._is_deep else 2
        return self._rows.merge(
            (self.slot_bounds[layer], self._first.tile_bounds, self.packed_bounds[layer]),
            num_steady=self._num_steady,
            bases=self._bases,
            tiles=(self._division["TILE_READ"], TILE_UNITS),
            num_lists=num_lists,
        )

    def spread(self, layer: int) -> None:
        """Each slot that the last `run` read, of this layer, gains its share of all that was read,
        over all heads.
        """
        self._evidence.spread(
            layer,
            self._scores,
            self.slot_bounds[layer],
            self._rows.result.lse_read,
            num_places=self.capacity,
            slots=self.slots,
        )

    def sample(
        self,
        layer: int,
        q: Tensor,
        *,
        seeds: Tensor,
        num_strata: int,
        chosen: Tensor | None = None,
        out: Missed | None = None,
    ) -> Missed:
        """What the last `run` of this layer missed, of one query of each document, q [B, H, D], and
        of a seed each, int64 [B]; the rest as `tails.sample_unread` takes it.
        """
        if layer not in self._unread:
            lists = [self._unread_first(layer)]
            if self._is_deep:
                lists.append(self._unread_opened(layer))
            self._unread[layer] = torch.stack(lists, dim=1)
        return sample_unread(
            q,
            self._kv[layer],
            self._unread[layer],
            self._rows.result.lse_read,
            kind=self._stored,
            scale=self._scale,
            seeds=seeds,
            visible=self._visible,
            layer=layer,
            num_strata=num_strata,
            chosen=chosen,
            out=out,
        )

    def _unread_first(self, layer: int) -> Tensor:
        """The units that are looked at first, as `sample_kernel` takes them."""
        first, mass = self._first, self._each(self._mass)
        return torch.stack(
            [
                mass,
                first.sizes[layer],
                first.slots[layer],
                self._each(first.counts),
                torch.full_like(mass, self._width),
                torch.zeros_like(mass),
                *self._units_of(layer, "groups" if self._is_deep else "clusters"),
            ],
            dim=1,
        )

    def _units_of(self, layer: int, kind: str) -> list[Tensor]:
        """Addresses of each problem's centroids and radii, of one query a document."""
        units = [getattr(document.indexes[layer], kind) for document in self._kept]
        names = ("centroids", "radii")
        return [torch.cat([rows_of(getattr(u, name)) for u in units]) for name in names]

    def _unread_opened(self, layer: int) -> Tensor:
        """The clusters of opened groups, as `sample_kernel` takes them."""
        mass = self._each(self._packed_mass)
        return torch.stack(
            [
                mass,
                self._each(self._members[1]),
                self._each(self._members[2]),
                self._each(self.packed_bounds[layer, :, 8:]),
                torch.full_like(mass, self._packed),
                self._each(self._members[0]),
                *self._units_of(layer, "clusters"),
            ],
            dim=1,
        )

    def _look(self, layer: int, q: Tensor) -> None:
        heads, first, rows, steady = self.heads, self._first, self._rows, self._steady[layer]
        num_rows = heads.num_queries * heads.per_group
        block_r = min(64, max(16, triton.next_power_of_2(num_rows)))
        items = steady.shape[0] + first.tiles.shape[0]
        look_kernel[items, triton.cdiv(num_rows, block_r)](
            q, steady, steady.shape[0], self._visible, first.tiles, first.addresses[layer],
            self._mass, self._tile_lse, rows.out, rows.lse,
            self._scale, heads.num_queries, rows.num_parts, self._width, self._tile_lse.shape[1],
            G=heads.num_kv_heads, P=heads.per_group, D=heads.head_dim, KV=rows.kv, BLOCK_R=block_r,
            BLOCK_N=STEADY_SLOTS, TILE=TILE_UNITS, num_warps=8, **early_launch(q.device),
        )  # fmt: skip

    def _open(self, layer: int, q: Tensor) -> None:
        heads, first, rows = self.heads, self._first, self._rows
        programs = max(_LEAST[0], _PROGRAMS[0] // heads.num_problems)
        open_kernel[programs, heads.num_problems](
            q, first.tiles, first.tile_first, first.addresses[layer], self._mass,
            self._clusters.addresses[layer], self.packed_bounds[layer], self._packed_mass,
            self._members, self._opened_lse, rows.out, rows.lse,
            self._scale, heads.num_queries, rows.num_parts, self._width, self._packed,
            self._opened_lse.shape[1], self._bases[1],
            G=heads.num_kv_heads, P=heads.per_group, D=heads.head_dim,
            BLOCK_R=heads.columns, BLOCK_N=TILE_MEMBERS,
            TILE_MEMBERS=TILE_MEMBERS, num_warps=4, **early_launch(q.device),
        )  # fmt: skip

    def _read(self, layer: int, q: Tensor) -> None:
        heads, first, rows = self.heads, self._first, self._rows
        mass = self._packed_mass if self._is_deep else self._mass
        programs = max(_LEAST[1], _PROGRAMS[1] // heads.num_problems)
        read_kernel[programs, heads.num_problems](
            q, self._kv[layer], self.slots, self.slot_bounds[layer], self._scores, first.tiles,
            first.tile_first, self._clusters.addresses[layer], self._members,
            self.packed_bounds[layer],
            mass, rows.out, rows.lse,
            self._scale, heads.num_queries, rows.num_parts, self.capacity, mass.shape[2],
            *self._bases,
            G=heads.num_kv_heads, P=heads.per_group, D=heads.head_dim, KV=rows.kv,
            TILE=TILE_UNITS, IS_DEEP=self._is_deep, KEEPS=self._keeps, STORED=self._stored,
            ESTIMATES=self._estimates,
            **read_launch(self._division, heads.head_dim, heads.per_group, early_launch(q.device)),
        )  # fmt: skip


def longest_head(document: DecodeDocument) -> int:
    """Most keys of the body that one KV head has."""
    bounds, count = document.runs.bounds, document.runs.count
    return max((int(count[row[0] : row[-1]].sum()) for row in bounds.tolist()), default=0)


def _least(number: int, limit: int | None) -> int:
    return max(1, number if limit is None else min(number, limit))

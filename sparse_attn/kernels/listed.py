"""Decode attention over selections that were made elsewhere: by an indexer, or by a plan before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn.errors import ShapeMismatch
from sparse_attn.folds import NUM_FOLDS
from sparse_attn.kernels.decode import Attended, Heads, Rows
from sparse_attn.kernels.decode_checks import check_keys
from sparse_attn.kernels.early import ordered_launch
from sparse_attn.kernels.read import read_launch, read_options
from sparse_attn.kernels.score import TILE_UNITS
from sparse_attn.kernels.steps import read_kernel

_PROGRAMS = 1056  # that share all selections: as many as run at once


class ListedDecode:
    """Attention over the slots that each query and KV head is given, and nothing else.

    k, v: per document [N, D], all heads'; capacity: most slots of a problem. `run` launches two
    kernels and decides nothing: it can be captured in a CUDA graph.
    """

    def __init__(
        self,
        heads: Heads,
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        *,
        capacity: int,
        scale: float,
    ) -> None:
        like, device = k[0], k[0].device
        if not len(k) == len(v) == heads.num_documents:
            raise ShapeMismatch(
                f"keys of {len(k)} and values of {len(v)} documents; limit {heads.num_documents} "
                "of both; give one tensor of each for a document"
            )
        for name, tensors in (("k", k), ("v", v)):
            for x in tensors:
                check_keys(name, x, like, (None, heads.head_dim))
        self._heads, self._scale, self._capacity = heads, scale, capacity
        self._kept = (k, v)  # the plan holds addresses
        self._kv = torch.tensor(
            [[x.data_ptr(), y.data_ptr(), 0] for x, y in zip(k, v, strict=True)], device=device
        )
        self._division = read_options(capacity, heads.head_dim)
        tile = self._division["TILE_READ"]
        self._rows = Rows(heads, capacity // tile + NUM_FOLDS, like)
        num_heads = heads.num_documents * heads.num_kv_heads
        # Of units that stand for what is not read there are none.
        self._none = torch.zeros(num_heads + 1, 9, dtype=torch.int32, device=device)
        self._tables = torch.zeros(heads.num_documents, 6, dtype=torch.int64, device=device)

    def run(self, q: Tensor, slots: Tensor, bounds: Tensor) -> Attended:
        """Attention of q [B, T, H, D] over slots [Z, capacity] int32, rows of the document's keys;
        bounds [Z, 9] int32 cut each list into 8 folds, its last is the number of slots.
        """
        heads, rows, none = self._heads, self._rows, self._none
        rows.check(0, 1, q)
        self._check(slots, bounds)
        programs = max(1, _PROGRAMS // heads.num_problems)
        # Not early itself: what it reads may be what the kernel ahead writes.
        early = ordered_launch(q.device)
        read_kernel[programs, heads.num_problems](
            q, self._kv, slots, bounds, rows.lse, none, none, self._tables, none, bounds,
            rows.lse, rows.out, rows.lse,
            self._scale, heads.num_queries, rows.num_parts, self._capacity, 1, 0, 0, 0,
            G=heads.num_kv_heads, P=heads.per_group, D=heads.head_dim, KV=rows.kv,
            TILE=TILE_UNITS, IS_DEEP=False, KEEPS=False, STORED=rows.kv, ESTIMATES=False,
            **read_launch(self._division, heads.head_dim, heads.per_group, early),
        )  # fmt: skip
        return rows.merge(
            (bounds, none, none),
            num_steady=0,
            bases=(0, 0, 0),
            tiles=(self._division["TILE_READ"], 1),
        )

    def _check(self, slots: Tensor, bounds: Tensor) -> None:
        num_problems = self._heads.num_problems
        for name, x, shape in (
            ("slots", slots, (num_problems, self._capacity)),
            ("bounds", bounds, (num_problems, NUM_FOLDS + 1)),
        ):
            if tuple(x.shape) != shape or x.dtype != torch.int32 or not x.is_contiguous():
                raise ShapeMismatch(
                    f"{name} {tuple(x.shape)} {x.dtype}; limit {shape} int32, contiguous; give a "
                    "row for each document, query and KV head"
                )

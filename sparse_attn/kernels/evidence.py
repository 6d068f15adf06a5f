"""Evidence of a step: launches of `dense.spread_kernel`, and where each document's is added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from sparse_attn.errors import ShapeMismatch
from sparse_attn.folds import Runs
from sparse_attn.kernels.dense import spread_kernel

if TYPE_CHECKING:
    from sparse_attn.kernels.decode import Heads

_SPREAD = 1024  # slots of a program


class Evidence:
    """Where the attention that each slot got is added up, over heads and steps.

    masses: [document][layer], [N] float32 each, whose addresses are kept; first_slots: of each
    document among the flat slots that a plan's scores are of.
    """

    def __init__(
        self, heads: Heads, masses: Sequence[Sequence[Tensor]], first_slots: Sequence[int]
    ) -> None:
        if heads.num_queries != 1 or len(masses) != heads.num_documents:
            raise ShapeMismatch(
                f"evidence of {len(masses)} documents, {heads.num_queries} queries each; limit "
                f"{heads.num_documents} and 1 query; plan without evidence"
            )
        self._heads, self._kept = heads, masses
        rows = [
            [[own[layer].data_ptr(), first] for own, first in zip(masses, first_slots, strict=True)]
            for layer in range(len(masses[0]))
        ]
        device = masses[0][0].device if masses[0] else None
        self._tables = torch.tensor(rows, dtype=torch.int64, device=device)

    def spread(
        self,
        layer: int,
        scores: Tensor,
        bounds: Tensor,
        lse: Tensor,
        *,
        num_places: int,
        slots: Tensor | None = None,
    ) -> None:
        """The launch of `dense.spread_kernel`; num_places: the most of a problem."""
        heads = self._heads
        grid = (max(1, triton.cdiv(num_places, _SPREAD)), heads.num_problems)
        spread_kernel[grid](
            scores, bounds if slots is None else slots, bounds, lse, self._tables[layer],
            scores.shape[-1], G=heads.num_kv_heads, P=heads.per_group, BLOCK=_SPREAD,
            GATHERS=slots is not None,
        )  # fmt: skip


def spans_of(runs: Runs) -> Tensor:
    """The first and past-the-last slot of each head's runs, [G, 2]."""
    rows = []
    for row in runs.bounds.tolist():
        first, count = (x[row[0] : row[-1]] for x in (runs.first, runs.count))
        rows.append([int(first.min()), int((first + count).max())] if len(first) else [0, 0])
    return torch.tensor(rows, dtype=torch.int64)

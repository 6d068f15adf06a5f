"""How keys are cut for `dense.attend_run`: pieces of steady buffers and of a document's body.

Owns the bounds of pieces, which depend on nothing but the document, and the tables that kernels
read. Knows no plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparse_attn.folds import NUM_FOLDS, Runs
from sparse_attn.kernels.dense import FAR_BEFORE, STEADY_SLOTS, run_slots


def count_steady(buffers: Iterable[Tensor]) -> int:
    """Parts that the steady keys of a head take, the most of any of buffers [G, capacity, D]."""
    return max(1, -(-max(x.shape[1] for x in buffers) // STEADY_SLOTS))


def steady_pieces(buffers: Sequence[Tensor]) -> list[Tensor]:
    """Pieces [n, 6] of each document's steady buffer [G, capacity, D], heads counted over all
    documents: first row of the flattened buffer, slots, part, head, place of the first among
    tokens, and -1: no slot.
    """
    pieces = []
    for b, buffer in enumerate(buffers):
        num_kv_heads, capacity, _ = buffer.shape
        rows = [
            (g * capacity + first, min(STEADY_SLOTS, capacity - first), part,
             b * num_kv_heads + g, first, -1)
            for g in range(num_kv_heads)
            for part, first in enumerate(range(0, capacity, STEADY_SLOTS))
        ]  # fmt: skip
        pieces.append(torch.tensor(rows, dtype=torch.int64).view(-1, 6))
    return pieces


def runs_of(pieces: Tensor, k: Tensor, v: Tensor, scales: Tensor | None = None) -> Tensor:
    """The table of runs (`dense.RUN_COLUMNS`) of pieces of one layer's k, v, [..., D]; scales: [G,
    2] of k and v in e4m3.
    """
    at = pieces[:, 0] * (k.shape[-1] * k.element_size())
    scales_at = torch.zeros_like(at)
    if scales is not None:
        scales_at = scales.data_ptr() + pieces[:, 3] % len(scales) * (2 * scales.element_size())
    columns = [k.data_ptr() + at, v.data_ptr() + at, *pieces[:, 1:].unbind(1), scales_at]
    return torch.stack(columns, dim=1).to(k.device)


def split_runs(runs: Runs, num_keys: int | None = None) -> tuple[Tensor, Tensor]:
    """Pieces [n, 6] of at most `run_slots` slots, as in `steady_pieces` but with their flat slots,
    heads counted from 0; and bounds [G, 9] of each head's folds among its pieces. num_keys: of the
    document, which alone decides how it is cut; None: those of `runs`.
    """
    pieces, bounds, most = [], [], run_slots(num_keys or runs.num_keys)
    for g in range(runs.num_kv_heads):
        edges, own = [0], 0
        for fold in range(NUM_FOLDS):
            for span in runs.of_fold(g, fold):
                for first in range(span.start, span.stop, most):
                    count = min(most, span.stop - first)
                    pieces.append((first, count, own, g, FAR_BEFORE, first))
                    own += 1
            edges.append(own)
        bounds.append(edges)
    return torch.tensor(pieces, dtype=torch.int64).view(-1, 6), torch.tensor(bounds)

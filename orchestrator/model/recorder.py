"""What a question's attention saw: evidence mass, recall, audit, bytes. Adds up; decides nothing.

Owns the accumulators of one question. Masses stay on the device until the answer is complete; each
method is called once per full-attention layer and tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kv_store import ResidentDocument
from orchestrator.recall import estimate_mean
from orchestrator.types import Audit, Bound, Recall
from sparse_attn.step import Step

# A bound above this share of a query's attention says nothing about what was missed.
VACUOUS_SHARE = 0.99
# Float32 rounding between a mass audited by dense attention and one summed from parts.
_ROUNDING = 1e-5


class Recorder:
    """Accumulates over one question.

    resident: gives shapes only; recall_period: one query in so many of a layer is sampled.
    """

    def __init__(self, resident: ResidentDocument, *, recall_period: int) -> None:
        self._resident, self._recall_period = resident, recall_period
        self._mass = [torch.zeros(k.shape[:2], device=k.device) for k in resident.k]
        self._recalls: list[list[Tensor]] = [[] for _ in resident.k]
        self._pairs: list[tuple[int, int]] = []
        self._num_queries = 0
        self._bounds: list[Tensor] = []
        self._audits: list[list[Tensor]] = [[] for _ in resident.k]
        self._num_violations = 0
        self._keys: list[tuple[Tensor, float]] = []
        self._rows: list[tuple[Tensor, int]] = []
        self._lookup_bytes = 0

    def mass(self, full_layer: int) -> Tensor:
        """Where the attention mass of answer queries over each slot is added up: [G, N] float32."""
        return self._mass[full_layer]

    def add_exact(self, num_queries: int, num_keys: int) -> None:
        """Every key was read by `num_queries` queries at once."""
        self._keys.append((torch.zeros(1, num_queries), float(num_keys)))
        self._rows.append((torch.zeros(1), 2 * self._resident.num_kv_heads * num_keys))

    def add_read(
        self,
        full_layer: int,
        num_queries: int,
        num_steady: int,
        step: Step,
        *,
        num_sampled: int,
    ) -> None:
        """What one tile read: steady and retrieved keys, sampled keys (no values), the look-up.

        num_sampled: keys read for the recall sample, over all queries and KV heads.
        """
        self._num_queries += num_queries if full_layer == 0 else 0
        num_kv_heads = self._resident.num_kv_heads
        sampled = num_sampled / (num_kv_heads * num_queries)
        self._keys.append((step.num_attended, num_steady + sampled))
        self._rows.append((step.num_read, 2 * num_kv_heads * num_steady + num_sampled))
        self._lookup_bytes += step.lookup_bytes

    def add_recall(
        self, full_layer: int, queries: Sequence[int], recall: Tensor, bound: Tensor
    ) -> None:
        """Sampled recall [n, H] of queries, and the bound on their missed share [n, H]."""
        self._recalls[full_layer].append(recall)
        self._pairs.extend((full_layer, query) for query in queries)
        self._bounds.append(bound.flatten())

    def add_audit(self, full_layer: int, recall: Tensor, bound: Tensor) -> None:
        """True recall [T, H] of every query, and the bound that must hold for it."""
        self._audits[full_layer].append(recall)
        self._num_violations += int((1.0 - recall > bound + _ROUNDING).sum())

    def token_mass(self) -> NDArray[np.float64]:
        """Attention mass of each document token, [N], summed over answer queries, layers and
        heads.
        """
        total = torch.zeros(self._resident.num_tokens, dtype=torch.float64)
        for mass, positions in zip(self._mass, self._resident.positions, strict=True):
            total.index_add_(0, positions.flatten().long().cpu(), mass.flatten().double().cpu())
        return total.numpy()

    def attended_keys(self) -> tuple[float, int]:
        """Mean and greatest number of keys read per KV head, over queries and full layers."""
        if not self._keys:
            return 0.0, 0
        counts = torch.cat([keys.double().mean(dim=0).cpu() + more for keys, more in self._keys])
        return float(counts.mean()), math.ceil(float(counts.max()))

    def bytes_read(self) -> int:
        """Bytes of KV and look-up tables that attention read in the full-attention layers."""
        num_rows = sum(2 * int(read.sum()) + others for read, others in self._rows)
        return num_rows * self._row_bytes() + self._lookup_bytes

    def recall(self) -> Recall:
        """The report; `exact`, and a model without full-attention layers, recall everything."""
        if not self._pairs:
            nothing_missed = Bound(p50=0.0, p99=0.0, vacuous_share=0.0)
            return Recall(
                mass_mean=1.0,
                mass_p10=1.0,
                ci95=(1.0, 1.0),
                bound=nothing_missed,
                audit=self._audit(),
            )
        pairs = sorted(self._pairs)
        per_layer = [torch.cat(rows).double().cpu() for rows in self._recalls if rows]
        estimate = estimate_mean(
            torch.cat([rows.mean(dim=1) for rows in per_layer]).tolist(),
            [layer for layer, _ in pairs],
            [query for _, query in pairs],
            num_queries=self._num_queries,
            period=self._recall_period,
        )
        heads = torch.cat([rows.mean(dim=0) for rows in per_layer])
        return Recall(
            mass_mean=estimate.mean,
            mass_p10=float(torch.quantile(heads, 0.1)),
            ci95=estimate.ci95,
            bound=self._bound(),
            audit=self._audit(),
        )

    def _bound(self) -> Bound:
        missed = torch.cat(self._bounds).double().cpu()
        ranks = torch.quantile(missed, torch.tensor([0.5, 0.99], dtype=torch.float64))
        return Bound(
            p50=float(ranks[0]),
            p99=float(ranks[1]),
            vacuous_share=float((missed > VACUOUS_SHARE).double().mean()),
        )

    def _audit(self) -> Audit | None:
        if not any(self._audits):
            return None
        of_layers = [torch.cat(rows).double() for rows in self._audits]
        heads = torch.cat([rows.mean(dim=0) for rows in of_layers])
        return Audit(
            mass_mean=float(heads.mean()),
            mass_p10=float(torch.quantile(heads, 0.1)),
            miss_max=1.0 - min(float(rows.min()) for rows in of_layers),
            bound_violations=self._num_violations,
        )

    def _row_bytes(self) -> int:
        k = self._resident.k[0]
        return int(k.shape[2] * k.element_size())

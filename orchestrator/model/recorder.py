"""What a question's attention saw: evidence mass, recall, audit, bytes. Adds up; decides nothing.

Owns the accumulators of one question. Masses stay on the device until the answer is complete; each
`add` is called once per full-attention layer and tile, on every rank in the same order. Whoever has
something to add later says so (`owe`), and is asked for it before anything else is added or read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kv_store import ResidentDocument
from orchestrator.place import Place
from orchestrator.recall import estimate_mean
from orchestrator.types import Audit, Bound, Recall
from sparse_attn.step import UnitsRead

# A bound above this share of a query's attention says nothing about what was missed.
VACUOUS_SHARE = 0.99
# Float32 rounding between a mass audited by dense attention and one summed from parts.
_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merged:
    """What all ranks saw: keys [n] of each query of each call, mean over KV heads."""

    token_mass: NDArray[np.float64]
    keys: Tensor
    bytes_read: int
    num_violations: int


class Recorder:
    """Accumulates over one question, on one rank; `merge` brings the ranks' together.

    resident: gives shapes only; place: whom it merges with; recall_period: one query in so many of
    a layer is sampled.
    """

    def __init__(self, resident: ResidentDocument, place: Place, *, recall_period: int) -> None:
        self._resident, self._place, self._recall_period = resident, place, recall_period
        self._mass = [torch.zeros(k.shape[0], device=k.device) for k in resident.k]
        self._recalls: list[list[Tensor]] = [[] for _ in resident.k]
        self._pairs: list[tuple[int, int]] = []
        self._num_queries = 0
        self._bounds: list[Tensor] = []
        self._audits: list[list[Tensor]] = [[] for _ in resident.k]
        self._num_violations = 0
        # Per call: keys of each query here, summed over KV heads [T], of which some more were read
        # by each of them, and those all ranks read.
        self._keys: list[tuple[Tensor, float, float]] = []
        self._num_rows: list[tuple[Tensor, int]] = []
        self._lookup_bytes = 0
        self._packed_bytes: list[Tensor] = []
        self._merged: _Merged | None = None
        self._owed: Callable[[], None] | None = None

    def owe(self, tell: Callable[[], None]) -> None:
        """There is more to add: `tell` does it once it is called, in its place among the rest."""
        if tell != self._owed:
            self.settle()
            self._owed = tell

    def settle(self) -> None:
        """Have all of it added now, and let go of whoever owed it."""
        owed, self._owed = self._owed, None
        if owed is not None:
            owed()

    def mass(self, full_layer: int) -> Tensor:
        """Where the attention mass of answer queries over each slot is added up: [N] float32."""
        return self._mass[full_layer]

    def add_exact(self, num_queries: int, num_keys: int, *, num_layers: int = 1) -> None:
        """Every key was read by `num_queries` queries at once, by one rank or another, in each of
        num_layers layers.
        """
        self.settle()
        self._keys.append((torch.zeros(num_layers * num_queries), 0.0, float(num_keys)))
        num_rows = 2 * num_layers * self._num_shared_heads() * num_keys
        self._num_rows.append((torch.zeros(1), num_rows))

    def add_read(
        self,
        full_layer: int,
        num_steady: int,
        read: UnitsRead,
        *,
        lookup_bytes: int,
        num_sampled: int,
    ) -> None:
        """What one tile read here: retrieved keys, sampled keys (no values), the look-up; and the
        steady keys, which every rank of a head group reads and which count once.

        num_sampled: keys read for the recall sample, over all queries and KV heads.
        """
        self.settle()
        num_queries = read.num_attended.shape[1]
        self._num_queries += num_queries if full_layer == 0 else 0
        attended = read.num_attended.double().sum(dim=0)
        self._keys.append((attended, num_sampled / num_queries, float(num_steady)))
        steady_rows = 2 * self._num_shared_heads() * num_steady
        self._num_rows.append((read.num_read, steady_rows + num_sampled))
        self._lookup_bytes += lookup_bytes

    def add_selected(
        self,
        counts: Tensor,
        *,
        num_steady: int,
        lookup_bytes: int,
        packed_bytes: Tensor,
        num_sampled: int,
        has_first_layer: bool,
    ) -> None:
        """What queries read here that each selected for itself, in one or more layers at once.

        counts: [layers, T], retrieved keys over all KV heads; lookup_bytes and packed_bytes []: of
        tables, known and on the device; num_sampled: keys read for the recall sample, over all of
        them.
        """
        self.settle()
        num_layers, num_queries = counts.shape
        self._num_queries += num_queries if has_first_layer else 0
        sampled = num_sampled / (num_layers * num_queries)
        self._keys.append((counts.flatten(), sampled, float(num_steady)))
        steady_rows = 2 * self._num_shared_heads() * num_steady * num_layers
        self._num_rows.append((counts, steady_rows + num_sampled))
        self._lookup_bytes += lookup_bytes
        self._packed_bytes.append(packed_bytes)

    def add_recall(
        self, full_layer: int, queries: Sequence[int], recall: Tensor, bound: Tensor
    ) -> None:
        """Sampled recall [n, H] of queries, and the bound on their missed share [n, H]."""
        self.settle()
        self._recalls[full_layer].append(recall)
        self._pairs.extend((full_layer, query) for query in queries)
        self._bounds.append(bound)

    def add_audit(self, full_layer: int, recall: Tensor, bound: Tensor) -> None:
        """True recall [T, H] of every query, and the bound that must hold for it."""
        self._audits[full_layer].append(recall)
        self._num_violations += int((1.0 - recall > bound + _ROUNDING).sum())

    def bytes_read_here(self) -> int:
        """Bytes of KV and look-up tables that this rank's attention read so far; not collective."""
        self.settle()
        num_rows = sum(2 * int(read.sum()) + others for read, others in self._num_rows)
        packed = sum(int(num_bytes) for num_bytes in self._packed_bytes)
        return num_rows * self._row_bytes() + self._lookup_bytes + packed

    def merge(self) -> None:
        """Bring the ranks' accounts together; every rank calls it once, after the last forward."""
        self.settle()
        place, num_tokens = self._place, self._resident.num_tokens
        mass = torch.zeros(num_tokens, dtype=torch.float64)
        for own, positions in zip(self._mass, self._resident.positions, strict=True):
            mass.index_add_(0, positions.long().cpu(), own.double().cpu())
        keys = torch.cat(
            [own.cpu().double() + more for own, more, _ in self._keys] or [torch.zeros(0).double()]
        )
        counts = torch.tensor([self.bytes_read_here(), self._num_violations], dtype=torch.int64)
        for tensor in (mass, keys, counts):
            place.flat.control.all_reduce_(tensor)
        shared = [torch.full(own.shape, more) for own, _, more in self._keys]
        everywhere = torch.cat(shared) if shared else torch.zeros(0)
        self._merged = _Merged(
            token_mass=mass.numpy(),
            keys=keys / place.num_kv_heads + everywhere.double(),
            bytes_read=int(counts[0]),
            # Ranks of one head group found the same violations.
            num_violations=int(counts[1]) // place.context.size,
        )
        for rows in (*self._recalls, self._bounds, *self._audits):
            rows[:] = [self._of_all_heads(own) for own in rows]

    def _of_all_heads(self, own: Tensor) -> Tensor:
        """[n, all heads] from each head group's [n, H]."""
        heads = self._place.heads
        if heads.size == 1:
            return own.cpu()
        gathered = heads.control.all_gather(own.cpu().contiguous())
        return gathered.transpose(0, 1).reshape(own.shape[0], -1)

    def _num_shared_heads(self) -> int:
        """KV heads whose steady keys this rank counts: its head group's, on the first rank."""
        return self._resident.num_kv_heads if self._place.context.rank == 0 else 0

    @property
    def _all(self) -> _Merged:
        assert self._merged is not None, "merge() comes first"
        return self._merged

    def token_mass(self) -> NDArray[np.float64]:
        """Attention mass of each document token, [N], summed over answer queries, layers and
        heads.
        """
        return self._all.token_mass

    def attended_keys(self) -> tuple[float, int]:
        """Mean and greatest number of keys read per KV head, over queries and full layers."""
        keys = self._all.keys
        return (float(keys.mean()), math.ceil(float(keys.max()))) if len(keys) else (0.0, 0)

    def bytes_read(self) -> int:
        """Bytes of KV and look-up tables that attention read in the full-attention layers."""
        return self._all.bytes_read

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
        missed = torch.cat([bound.flatten() for bound in self._bounds]).double().cpu()
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
            bound_violations=self._all.num_violations,
        )

    def _row_bytes(self) -> int:
        k = self._resident.k[0]
        return int(k.shape[1] * k.element_size())

"""A backend out of plain operations on parts: the steps of a question, one operation after another.

Owns the order of operations; the operations are those of a module (`torch_backend`, `reference`).
What a step is, is defined here; a backend with fused kernels computes the same.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_attn.estimate import bound_missed_share, sample_recall
from sparse_attn.select.base import Limit, Tail
from sparse_attn.select.centroid import CentroidIndex, select
from sparse_attn.state import Part, merge_parts
from sparse_attn.step import Step


class Composed:
    """Operations of a module, and the steps made of them."""

    def __init__(self, operations: ModuleType) -> None:
        self._operations: Any = operations

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] in x's dtype."""
        return torch.nn.functional.linear(x, weight, bias)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
    ) -> Part:
        """Every query over every key; q [T, H, D]; k, v [G, S, D]; mask [T, S] bool."""
        part: Part = self._operations.attend(q, k, v, scale=scale, mask=mask)
        return part

    def attend_causal(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part:
        """A chunk over itself: token t of q [T, H, D] sees keys 0 to t of k, v [G, T, D]."""
        part: Part = self._operations.attend_causal(q, k, v, scale=scale)
        return part

    def attend_estimated(self, log_mass: Tensor, value_sums: Tensor, sizes: Tensor) -> Part:
        """The part of keys that were not read; see `reference.attend_estimated`."""
        part: Part = self._operations.attend_estimated(log_mass, value_sums, sizes)
        return part

    def attend_prefix(self, q: Tensor, k: Tensor, v: Tensor, *, past: int, scale: float) -> Part:
        """Token t of q [T, H, D] sees slots 0 to past + t of k, v [G, past + T, D]."""
        if q.shape[0] == 1:
            return self.attend(q, k, v, scale=scale)
        before = self.attend(q, k[:, :past], v[:, :past], scale=scale)
        return merge_parts([before, self.attend_causal(q, k[:, past:], v[:, past:], scale=scale)])

    def attend_body(
        self, q: Tensor, k: Tensor, v: Tensor, steady: Part, *, scale: float, evidence: Tensor
    ) -> Part:
        """`steady` merged with attention over every slot of k, v [G, S, D]; evidence [G, S] gains
        each slot's share of the last query's attention.
        """
        operations = self._operations
        if q.shape[0] == 1:
            part, shares = operations.attend_shared(q, k, v, scale=scale)
            merged = merge_parts([steady, part])
            weight = torch.exp(part.lse[0] - merged.lse[0])
        else:
            merged = merge_parts([steady, self.attend(q, k, v, scale=scale)])
            shares = operations.key_mass(q[-1:], k, merged.lse[-1:], scale=scale)
            weight = torch.ones_like(merged.lse[-1])
        evidence += _mass_per_slot(shares[0], weight, k.shape[0])
        return merged

    def attend_selected(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: CentroidIndex,
        steady: Part,
        *,
        scale: float,
        limit: Limit,
        levels: int,
        is_estimating: bool,
        evidence: Tensor | None,
    ) -> Step:
        """`steady` merged with the clusters of k, v [G, S, D] that each query of the tile reads
        and, if `is_estimating`, with what stands for the others.

        evidence [G, S], where given, gains the last query's mass of what it read, as a share of all
        that was read.
        """
        selection = select(index, q, scale=scale, lse_steady=steady.lse, limit=limit, levels=levels)
        read = steady
        if selection.slots.shape[1]:
            part, shares = self._operations.attend_slots(
                q, k, v, selection.slots, visible=selection.visible, scale=scale
            )
            read = merge_parts([steady, part])
            if evidence is not None:
                weight = torch.exp(part.lse[-1] - read.lse[-1])
                mass = _mass_per_slot(shares[-1], weight, k.shape[0])
                evidence.scatter_add_(1, selection.slots.clamp(min=0), mass)
        tail, out = selection.tail, read.out
        if is_estimating:
            rest = self.attend_estimated(tail.log_mass, selection.value_sums, tail.sizes)
            out = merge_parts([read, rest]).out
        num_attended, num_read = selection.count_read()
        num_attended = num_attended.expand(-1, q.shape[0])
        return Step(out, read.lse, tail, num_attended, num_read, selection.lookup_bytes)

    def sample_recall(
        self,
        q: Tensor,
        k: Tensor,
        tail: Tail,
        lse_read: Tensor,
        *,
        scale: float,
        num_strata: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Sampled recall of each query and head, and the bound on its missed share: [T, H] each."""
        recall = sample_recall(
            q, k, tail, lse_read, scale=scale, num_strata=num_strata, generator=generator
        )
        return recall, bound_missed_share(q, tail, lse_read, scale=scale)


def _mass_per_slot(shares: Tensor, weight: Tensor, num_kv_heads: int) -> Tensor:
    """[G, S] attention mass of slots: shares [H, S] of a part times its weight [H] in the whole."""
    rows = shares.view(num_kv_heads, -1, shares.shape[1])
    return torch.bmm(weight.view(num_kv_heads, 1, -1), rows).squeeze(1)

"""A question's attention by plans of kernels, where one rank holds the whole document.

Owns which plan (`device_plans.py`) attends in which layer to several tokens of a question; one
token, of this question alone or of several together, is `step_attention.py`'s. The same contract as
`attention.QuestionAttention`, which it replaces on a GPU.

Question tokens come up to `TILE_QUERIES` at a time. Each selects for itself, as one token does, in
both levels of the look-up. Evidence and recall are always those of single queries: the plan of one
query runs once more for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from orchestrator.model.attention import count_per_kind
from orchestrator.model.decoder import Room
from orchestrator.model.device_question import DeviceQuestion
from orchestrator.model.step_attention import StepAttention
from sparse_attn.kernels.selected import CentroidDecode

TILE_QUERIES = 16


class DeviceAttention:
    """Attention of one question: call it once per layer and forward, in layer order, after
    `prepare` and before `advance`.
    """

    is_static = True

    def __init__(self, question: DeviceQuestion) -> None:
        self.question = question
        self._windows, self._plans = question.windows, question.plans
        self._places = count_per_kind(question.windows)
        # Of the tiles of a forward in one layer: slots of each query, opened clusters.
        self._tiles: list[tuple[Tensor, Tensor]] = []

    @cached_property
    def _step(self) -> StepAttention:
        return StepAttention([self.question])

    def prepare(self, num_tokens: int) -> None:
        """A forward of num_tokens comes next."""
        if num_tokens == 1:
            self._step.prepare(1)

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output [T, H, D] in q's dtype, for q [T, H, D] and the new k, v [T, G, D]."""
        self.question.tail_of(layer_idx).append(self._places[layer_idx], k, v)
        return self.attend_placed(layer_idx, q.contiguous())

    def room(self, layer_idx: int) -> Room:
        """Where the keys and values of the forward's tokens go in a layer."""
        tail, place = self.question.tail_of(layer_idx), self._places[layer_idx]
        return Room(k=tail.k[place], v=tail.v[place], at=tail.at)

    def attend_placed(self, layer_idx: int, q: Tensor) -> Tensor:
        """As calling it, where keys and values are in their room."""
        if q.shape[0] == 1:
            return self._step.attend_placed(layer_idx, q)
        place = self._places[layer_idx]
        if self._windows[layer_idx] is not None:
            return self._in_tiles(self._attend_sliding, place, q)
        out = self._in_tiles(self._attend_tile, place, q)
        self._account(place, q)
        return out

    def advance(self, num_tokens: int) -> None:
        """The forward of num_tokens is over: the next token comes after them."""
        if num_tokens == 1:
            self._step.advance(1)
            return
        self.question.num_past += num_tokens
        for tail in self.question.tails:
            tail.at.add_(num_tokens)

    def _in_tiles(
        self, attend: Callable[[int, Tensor, int], Tensor], place: int, q: Tensor
    ) -> Tensor:
        tiles = torch.split(q, TILE_QUERIES)
        return torch.cat([attend(place, tile, i * TILE_QUERIES) for i, tile in enumerate(tiles)])

    def _attend_tile(self, place: int, q: Tensor, first: int) -> Tensor:
        plan, visible = self._plans.of(q.shape[0])
        self._plans.full.show(visible, first)
        out = plan.run(place, q.unsqueeze(0)).out[0].clone()
        if isinstance(plan, CentroidDecode):
            counts = plan.slot_bounds[place, :, 8].view(q.shape[0], -1).sum(dim=1)
            self._tiles.append((counts, plan.packed_bounds[place, :, 8].sum()))
        return out

    def _attend_sliding(self, place: int, q: Tensor, first: int) -> Tensor:
        plan, visible = self._plans.sliding(q.shape[0])
        self._plans.sliding_tail.show(visible, first)
        return plan.run(place, q.unsqueeze(0)).out[0].clone()

    def _account(self, place: int, q: Tensor) -> None:
        """Evidence of the last of several queries, recall of those that are sampled, and what all
        of them read.
        """
        question, num_tokens = self.question, q.shape[0]
        chosen = question.sampled_queries(place, num_tokens)
        plan, _ = self._plans.of(1)
        for t in sorted({*chosen, num_tokens - 1}):
            attended = question.run_one(place, q, t)
            if t == num_tokens - 1:
                plan.spread(place)
            if t in chosen:
                question.sample(place, q[t : t + 1], attended, question.num_past + t)
        tiles, self._tiles = self._tiles, []
        if not tiles:
            question.tell_exact(num_tokens, num_layers=1)
            return
        assert isinstance(plan, CentroidDecode)
        counts = torch.cat([counts for counts, _ in tiles]).unsqueeze(0)
        packed = torch.stack([packed for _, packed in tiles]).sum()
        packed_bytes = packed * (6 * plan.heads.head_dim)
        question.tell(counts, packed_bytes, len(chosen), [place], first_query=question.num_past)
        if question.plan.audit:
            for t in range(num_tokens):
                question.audit(place, q, t)

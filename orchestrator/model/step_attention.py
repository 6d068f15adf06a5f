"""One forward of one token each of several questions: a row of queries a question.

Owns which questions share a plan, and what is sampled and told after the forward. The same contract
as `attention.QuestionAttention` for a row; each question's output, recall and evidence are to the
bit what they would be alone. A forward decides nothing on the host, so that `decode_graph.py` can
capture it: which queries are sampled, `prepare` puts in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from orchestrator.model.attention import count_per_kind
from orchestrator.model.decoder import Rooms
from orchestrator.model.device_plans import Kind
from orchestrator.model.device_question import DeviceQuestion
from sparse_attn.estimate import Missed, bound_of, recall_of
from sparse_attn.kernels.rotary import rooms_of
from sparse_attn.kernels.selected import CentroidDecode


def kind_of(question: DeviceQuestion) -> tuple[Kind, int]:
    """What questions must have in common to share a plan and its samples."""
    return question.plans.kind, question.plan.num_strata


class StepAttention:
    """Attention of several questions' next tokens; those of one kind stand side by side.

    Call it once per layer and forward, in layer order, after `prepare` and before `advance`.
    """

    is_static = True

    def __init__(self, questions: Sequence[DeviceQuestion]) -> None:
        self._questions = questions
        self._windows = questions[0].windows
        self._places = count_per_kind(self._windows)
        self._groups = [_Group(list(own)) for _, own in groupby(questions, key=kind_of)]
        first, *others = (question.plans for question in questions)
        self._sliding = first.sliding_together(others) if first.sliding_tail.k else None
        self._rooms: dict[int, Rooms] = {}

    def prepare(self, num_tokens: int) -> None:
        """A forward of one token of each question comes next."""
        assert num_tokens == 1
        for group in self._groups:
            group.prepare()

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output [B, H, D] in q's dtype, for q [B, H, D] and the new k, v [B, G, D]."""
        for b, question in enumerate(self._questions):
            own = slice(b, b + 1)
            question.tail_of(layer_idx).append(self._places[layer_idx], k[own], v[own])
        return self.attend_placed(layer_idx, q.contiguous())

    def room(self, layer_idx: int) -> Rooms:
        """Where each question's key and value go in a layer."""
        if layer_idx not in self._rooms:
            place = self._places[layer_idx]
            tails = [question.tail_of(layer_idx) for question in self._questions]
            rooms = [(tail.k[place], tail.v[place], tail.at) for tail in tails]
            self._rooms[layer_idx] = Rooms(table=rooms_of(rooms[0][0], rooms))
        return self._rooms[layer_idx]

    def attend_placed(self, layer_idx: int, q: Tensor) -> Tensor:
        """As calling it, where keys and values are in their room."""
        place = self._places[layer_idx]
        if self._windows[layer_idx] is not None:
            assert self._sliding is not None
            plan, visible = self._sliding
            if place == 0:
                _show(visible, [question.plans.sliding_tail.at for question in self._questions])
            return plan.run(place, q.unsqueeze(1)).out.squeeze(1).clone()
        outs, first = [], 0
        for group in self._groups:
            last = first + len(group.questions)
            outs.append(group.attend(place, q[first:last]))
            first = last
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def advance(self, num_tokens: int) -> None:
        """The forward is over: recorders are told, and each question's next token comes after."""
        for group in self._groups:
            group.account()
        tails = [tail for question in self._questions for tail in question.tails]
        ats = [tail.at for tail in tails if tail.k]
        torch._foreach_add_(ats, num_tokens)
        for question in self._questions:
            question.num_past += num_tokens


class _Group:
    """Questions of one kind: their plan, and what is sampled of them."""

    def __init__(self, questions: list[DeviceQuestion]) -> None:
        self.questions = questions
        first, *others = (question.plans for question in questions)
        self._plan, self._visible = first.together(others)
        layers, n = questions[0].num_layers, len(questions)
        like, device = first.full.k, first.full.at.device
        num_heads = self._plan.heads.num_heads
        self._samples: list[tuple[int, int]] = []  # of the forward: layer and question
        if isinstance(self._plan, CentroidDecode):
            self._seeds = torch.cat([question.seed for question in questions])
            self._chosen = torch.zeros(layers, n, dtype=torch.int32, device=device)
            self._missed = torch.zeros(3, layers, n, num_heads, device=device)
            self._lse_read = torch.zeros(layers, n, num_heads, device=device)
        self._last_q: list[Tensor] | None = None
        if like and any(question.plan.audit for question in questions):
            shape = (layers, n, num_heads, like[0].shape[2])
            self._last_q = list(like[0].new_zeros(shape))

    def prepare(self) -> None:
        """Choose what is sampled."""
        if not isinstance(self._plan, CentroidDecode):
            return
        chosen = torch.zeros(self._chosen.shape, dtype=torch.int32)
        self._samples = []
        for b, question in enumerate(self.questions):
            for place in question.sampled_layers():
                chosen[place, b] = 1
                self._samples.append((place, b))
        self._chosen.copy_(chosen)

    def attend(self, place: int, q: Tensor) -> Tensor:
        """Output [n, H, D] of q [n, H, D]; evidence is spread, recall sampled."""
        plan = self._plan
        if place == 0:
            _show(self._visible, [question.plans.full.at for question in self.questions])
        attended = plan.run(place, q.unsqueeze(1))
        plan.spread(place)
        if isinstance(plan, CentroidDecode):
            plan.sample(
                place,
                q,
                seeds=self._seeds,
                num_strata=self.questions[0].plan.num_strata,
                chosen=self._chosen[place],
                out=Missed(*self._missed[:, place]),
            )
            self._lse_read[place].copy_(attended.lse_read.squeeze(1))
        if self._last_q is not None:
            self._last_q[place].copy_(q)
        return attended.out.squeeze(1).clone()

    def account(self) -> None:
        """Tell each recorder what its question's query saw, in all layers."""
        num_layers = self.questions[0].num_layers
        if not isinstance(self._plan, CentroidDecode):
            for question in self.questions:
                question.tell_exact(1, num_layers=num_layers)
            return
        if not num_layers:
            return
        self._tell_read(self._plan, num_layers)
        self._tell_recall()
        for b, question in enumerate(self.questions):
            if question.plan.audit:
                assert self._last_q is not None
                for place in range(num_layers):
                    question.audit(place, self._last_q[place][b : b + 1], 0)

    def _tell_read(self, plan: CentroidDecode, num_layers: int) -> None:
        shape = (num_layers, len(self.questions), -1)
        counts = plan.slot_bounds[:, :, 8].view(shape).sum(dim=2).t().contiguous()
        opened = plan.packed_bounds[:, :, 8].view(shape).sum(dim=(0, 2))
        packed_bytes = opened * (6 * plan.heads.head_dim)
        num_sampled = [0] * len(self.questions)
        for _, b in self._samples:
            num_sampled[b] += 1
        layers = list(range(num_layers))
        for b, question in enumerate(self.questions):
            question.tell(counts[b].unsqueeze(1), packed_bytes[b], num_sampled[b], layers)

    def _tell_recall(self) -> None:
        if not self._samples:
            return
        n = len(self.questions)
        rows = torch.tensor([place * n + b for place, b in self._samples])
        rows = rows.to(self._chosen.device)
        mean, variance, log_most = self._missed.flatten(1, 2)[:, rows]
        recall = recall_of(mean, variance)
        bound = bound_of(log_most, self._lse_read.flatten(0, 1)[rows])
        for i, (place, b) in enumerate(self._samples):
            question, own = self.questions[b], slice(i, i + 1)
            question.recorder.add_recall(place, [question.num_past], recall[own], bound[own])


def _show(visible: Tensor, ats: list[Tensor]) -> None:
    """visible [n]: how many keys each question's next query sees, its own included."""
    torch.add(torch.cat(ats) if len(ats) > 1 else ats[0], 1, out=visible)

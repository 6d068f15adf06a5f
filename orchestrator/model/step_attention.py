"""One forward of one token each of several questions: a row of queries a question.

Owns which questions share a plan, and what goes beside the forward: evidence, and what is sampled
and told after it (`step_tally.py`). The same contract as `attention.QuestionAttention` for a row;
each question's output, recall and evidence are to the bit what they would be alone. A forward
decides nothing on the host, so that `decode_graph.py` can capture it: which queries are sampled is
put in place before.
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
from orchestrator.model.step_tally import Tally
from orchestrator.model.streams import Beside
from sparse_attn.kernels.decode import Attended
from sparse_attn.kernels.rotary import rooms_of
from sparse_attn.kernels.selected import CentroidDecode


def kind_of(question: DeviceQuestion) -> tuple[Kind, int]:
    """What questions must have in common to share a plan and its samples."""
    return question.plans.kind, question.plan.num_strata


class StepAttention:
    """Attention of several questions' next tokens; those of one kind stand side by side.

    Call it once per layer and forward, in layer order, after `prepare` and before `finish` and
    `advance`. An output is valid until the next layer's.
    """

    is_static = True

    def __init__(self, questions: Sequence[DeviceQuestion]) -> None:
        self._questions = questions
        self._windows = questions[0].windows
        self._places = count_per_kind(self._windows)
        self._beside = Beside(questions[0].seed.device)
        self._groups = [
            _Group(list(own), self._beside) for _, own in groupby(questions, key=kind_of)
        ]
        first, *others = (question.plans for question in questions)
        self._sliding = first.sliding_together(others) if first.sliding_tail.k else None
        tails = [tail for question in questions for tail in question.tails]
        self._ats = [tail.at for tail in tails if tail.k]
        self._rooms: dict[int, Rooms] = {}

    def prepare(self, num_tokens: int) -> None:
        """A forward of one token of each question comes next."""
        assert num_tokens == 1
        self._beside.join()
        for group in self._groups:
            group.prepare()

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output [B, H, D] in q's dtype, for q [B, H, D] and the new k, v [B, G, D]."""
        for b, question in enumerate(self._questions):
            own = slice(b, b + 1)
            question.tail_of(layer_idx).append(self._places[layer_idx], k[own], v[own])
        return self.attend_placed(layer_idx, q.contiguous())

    def room(self, layer_idx: int) -> Rooms:
        """Where each question's key and value go in a layer, for what is launched next."""
        if self._windows[layer_idx] is None:
            self._beside.join()  # plans overwrite what was read there
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
            return plan.run(place, q.unsqueeze(1)).out.squeeze(1)
        self._beside.join()  # where no room was asked for
        sizes = [len(group.questions) for group in self._groups]
        each = list(zip(self._groups, torch.split(q, sizes), strict=True))
        attended = [group.attend(place, own) for group, own in each]
        with self._beside.fork(q):
            for (group, own), seen in zip(each, attended, strict=True):
                group.see(place, own, seen)
        outs = [seen.out.squeeze(1) for seen in attended]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def finish(self) -> None:
        """All layers were called: what is launched from now on comes after all of the forward."""
        self._beside.join()

    def advance(self, num_tokens: int) -> None:
        """The forward is over: recorders are told, and each question's next token comes after."""
        self.finish()
        for group in self._groups:
            group.account()
        torch._foreach_add_(self._ats, num_tokens)
        for question in self._questions:
            question.num_past += num_tokens


class _Group:
    """Questions of one kind: their plan, and what is seen of them."""

    def __init__(self, questions: list[DeviceQuestion], beside: Beside) -> None:
        self.questions = questions
        first, *others = (question.plans for question in questions)
        self._plan, self._visible = first.together(others)
        self._tally: Tally | None = None
        if isinstance(self._plan, CentroidDecode):
            self._tally = Tally(questions, self._plan, beside)
        self._last_q: list[Tensor] | None = None
        if any(question.plan.audit for question in questions):
            heads, num_layers = self._plan.heads, questions[0].num_layers
            shape = (num_layers, len(questions), heads.num_heads, heads.head_dim)
            self._last_q = list(first.full.k[0].new_zeros(shape))

    def prepare(self) -> None:
        """Choose what is sampled."""
        if self._tally is not None:
            self._tally.prepare()

    def attend(self, place: int, q: Tensor) -> Attended:
        """Attention of q [n, H, D], overwritten by the next layer's."""
        if place == 0:
            _show(self._visible, [question.plans.full.at for question in self.questions])
        return self._plan.run(place, q.unsqueeze(1))

    def see(self, place: int, q: Tensor, attended: Attended) -> None:
        """After `attend`, for nobody in the forward: evidence is spread, recall sampled."""
        self._plan.spread(place)
        if self._tally is not None:
            self._tally.see(place, q, attended.lse_read.squeeze(1))
        if self._last_q is not None:
            self._last_q[place].copy_(q)

    def account(self) -> None:
        """Tell each recorder what its question's query saw, in all layers, now or later."""
        num_layers = self.questions[0].num_layers
        if self._tally is None:
            for question in self.questions:
                question.tell_exact(1, num_layers=num_layers)
            return
        self._tally.keep()
        for b, question in enumerate(self.questions):
            if question.plan.audit:
                assert self._last_q is not None
                for place in range(num_layers):
                    question.audit(place, self._last_q[place][b : b + 1], 0)


def _show(visible: Tensor, ats: list[Tensor]) -> None:
    """visible [n]: how many keys each question's next query sees, its own included."""
    torch.add(torch.cat(ats) if len(ats) > 1 else ats[0], 1, out=visible)

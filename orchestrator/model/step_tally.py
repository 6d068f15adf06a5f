"""What the queries of a group's steps saw: figures on the device, told to recorders later.

Owns which queries are sampled next, the figures of a step and their copies on the host, of several
steps. A step launches two copies for all questions and layers, and waits for none; recorders are
told when somebody asks one of them, or when no more steps have room. Refuses to know what
recorders make of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.model.device_question import DeviceQuestion
from orchestrator.model.streams import Beside, Mark, Upload, pinned
from sparse_attn.estimate import Missed, bound_of, recall_of
from sparse_attn.kernels.selected import CentroidDecode

# Steps whose figures wait on the host, 18 KB each for a question of the 8B shape. Telling of all of
# them goes beside a step and should be shorter: 3 ms for 16 questions on a slow core.
MAX_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """queries: of each question, the number of its query; samples: layer and question."""

    queries: list[int]
    samples: list[tuple[int, int]]


class Tally:
    """Of questions that share a plan: `prepare` before a forward, `see` in each layer of it, `keep`
    after it.
    """

    def __init__(
        self, questions: Sequence[DeviceQuestion], plan: CentroidDecode, beside: Beside
    ) -> None:
        self._questions, self._plan, self._beside = questions, plan, beside
        self._num_layers, device = questions[0].num_layers, questions[0].seed.device
        shape = (self._num_layers, len(questions))
        self._seeds = torch.cat([question.seed for question in questions])
        self._chosen = Upload(shape, torch.int32, device)
        self._next = _Step(queries=[], samples=[])
        # One tensor, so that it is one copy: what `Missed` has and what was read, then two bounds.
        self._num_floats = 4 * self._num_layers * len(questions) * plan.heads.num_heads
        num_bounds = 2 * self._num_layers * plan.heads.num_problems
        num_figures = self._num_floats + num_bounds
        self._figures = torch.zeros(num_figures, dtype=torch.int32, device=device)
        floats = self._figures[: self._num_floats].view(torch.float32)
        self._sampled = floats.view(4, *shape, plan.heads.num_heads)
        self._bounds = self._figures[self._num_floats :].view(2, self._num_layers, -1)
        self._copies = pinned((MAX_STEPS, num_figures), torch.int32, device)
        self._copied = Mark(device)
        self._steps: list[_Step] = []

    def prepare(self) -> None:
        """The next forward samples what it should, also where a question had tokens elsewhere."""
        queries = [question.num_past for question in self._questions]
        if queries != self._next.queries:
            self._choose(queries)

    def see(self, place: int, q: Tensor, lse_read: Tensor) -> None:
        """Launch the figures of a layer's queries q [n, H, D]; lse_read [n, H]: of the plan."""
        plan = self._plan
        plan.sample(
            place,
            q,
            seeds=self._seeds,
            num_strata=self._questions[0].plan.num_strata,
            chosen=self._chosen.there[place],
            out=Missed(*self._sampled[:3, place]),
        )
        self._sampled[3, place].copy_(lse_read)
        if place == self._num_layers - 1:
            self._bounds[0].copy_(plan.slot_bounds[:, :, 8])
            self._bounds[1].copy_(plan.packed_bounds[:, :, 8])

    def keep(self) -> None:
        """The forward was launched: its figures go to the host, and the next one is prepared."""
        if len(self._steps) == MAX_STEPS:
            self.tell()
        with self._beside.fork():
            self._copies[len(self._steps)].copy_(self._figures, non_blocking=True)
            self._copied.put()
        self._steps.append(self._next)
        for question in self._questions:
            question.recorder.owe(self.tell)
        self._choose([query + 1 for query in self._next.queries])

    def tell(self) -> None:
        """Tell the recorders of all steps that they were not told of, in order."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        self._copied.wait()
        copies = self._copies[: len(steps)]
        bounds = copies[:, self._num_floats :]
        shape = (len(steps), 2, self._num_layers, len(self._questions), -1)
        slots, opened = bounds.view(shape).sum(-1).unbind(1)
        counts = slots.transpose(1, 2).contiguous().unsqueeze(3)
        packed_bytes = opened.sum(1) * (6 * self._plan.heads.head_dim)
        recalls = self._recalls(copies[:, : self._num_floats].view(torch.float32), steps)
        for step, *read in zip(steps, counts.unbind(0), packed_bytes.unbind(0), strict=True):
            self._tell_read(step, *read)
            for place, b in step.samples:
                recorder = self._questions[b].recorder
                recorder.add_recall(place, [step.queries[b]], *next(recalls))

    def _choose(self, queries: list[int]) -> None:
        """Put in place which of these queries are sampled, in which layers."""
        chosen = torch.zeros(self._chosen.there.shape, dtype=torch.int32)
        samples = [
            (place, b)
            for b, question in enumerate(self._questions)
            for place in question.sampled_layers(queries[b])
        ]
        if samples:
            places, own = zip(*samples, strict=True)
            chosen[list(places), list(own)] = 1
        self._chosen.send(chosen)
        self._next = _Step(queries=queries, samples=samples)

    def _tell_read(self, step: _Step, counts: Tensor, packed_bytes: Tensor) -> None:
        """counts [n, layers, 1]; packed_bytes [n]."""
        num_sampled = [0] * len(self._questions)
        for _, b in step.samples:
            num_sampled[b] += 1
        layers = range(self._num_layers)
        each = zip(self._questions, step.queries, counts.unbind(0), packed_bytes.unbind(0),
                   num_sampled, strict=True)  # fmt: skip
        for question, query, own_counts, own_bytes, own_sampled in each:
            question.tell(own_counts, own_bytes, own_sampled, layers, first_query=query)

    def _recalls(self, floats: Tensor, steps: list[_Step]) -> Iterator[tuple[Tensor, Tensor]]:
        """Recall and bound [1, H] of each sample, of floats [steps, .]: in float64, so that bits do
        not depend on how many there are.
        """
        n = len(self._questions)
        rows = [(i, place * n + b) for i, step in enumerate(steps) for place, b in step.samples]
        step_idx, row_idx = torch.tensor(rows, dtype=torch.int64).view(-1, 2).unbind(1)
        figures = floats.view(len(steps), 4, self._num_layers * n, -1)[step_idx, :, row_idx]
        mean, variance, log_most, lse_read = figures.double().unbind(1)
        recalls, bounds = recall_of(mean, variance).float(), bound_of(log_most, lse_read).float()
        return zip(torch.split(recalls, 1), torch.split(bounds, 1), strict=True)

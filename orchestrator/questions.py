"""The questions in progress on one rank: their attention, how far they are, and their forwards.

Owns what a rank keeps of a question between steps. One token each of several questions is one
forward where kernels give each row the bits that it has alone (`model/decode_batch.py`), and one
forward after another elsewhere. Refuses to decide which questions take a step together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orchestrator.model.attention import Attention, make_attention
from orchestrator.model.context import DocumentContext
from orchestrator.model.load import LoadedModel
from orchestrator.model.recorder import Recorder
from orchestrator.place import Place
from orchestrator.steps import BeginQuestion, EndQuestion, Forward, ForwardEach
from sparse_attn.api import Backend

if TYPE_CHECKING:
    from orchestrator.model.decode_batch import DecodeBatch

# Sets of questions whose plans and graph are kept: those that come and go, and who goes on alone.
MAX_BATCHES = 4


@dataclass(slots=True, kw_only=True)
class _Question:
    attention: Attention
    recorder: Recorder
    position: int


class Questions:
    """Every rank of `place` does the same with them at the same time."""

    def __init__(self, model: LoadedModel, backend: Backend, place: Place) -> None:
        self._model, self._backend, self._place = model, backend, place
        self._questions: dict[int, _Question] = {}
        self._batches: OrderedDict[tuple[int, ...], DecodeBatch] = OrderedDict()

    @property
    def is_batching(self) -> bool:
        """Whether tokens of several questions are one forward."""
        is_planned = self._backend.makes_plans and self._place.is_alone
        return is_planned and self._model.decoder.is_fused

    def begin(self, action: BeginQuestion, context: DocumentContext) -> None:
        """Make room for a question; its document's clusters are here if it needs them."""
        cfg, period = self._model.cfg, action.attention.recall_period
        recorder = Recorder(context.resident, self._place, recall_period=period)
        attention = make_attention(
            context,
            action.attention,
            self._backend,
            recorder,
            scale=cfg.attention_scale,
            windows=cfg.windows,
            capacity_tokens=action.capacity_tokens,
        )
        self._questions[action.question_id] = _Question(
            attention=attention, recorder=recorder, position=context.num_tokens
        )

    def recorder_of(self, question_id: int) -> Recorder:
        """What a question has seen so far on this rank."""
        return self._questions[question_id].recorder

    def forward(self, action: Forward) -> Tensor:
        """Logits [V] float32 after the last token."""
        if self.is_batching and len(action.ids) == 1:
            question_ids = (action.question_id,)
            return self._step(self._batch_of(question_ids), question_ids, action.ids)[0]
        question, decoder = self._questions[action.question_id], self._model.decoder
        start, stop = question.position, question.position + len(action.ids)
        question.position = stop
        with torch.inference_mode():
            ids = torch.tensor(action.ids, device=decoder.device)
            positions = torch.arange(start, stop, device=decoder.device)
            question.attention.prepare(len(action.ids))
            hidden = decoder.forward(ids, positions, question.attention)
            logits = decoder.logits(hidden[-1:])[0]
            question.attention.advance(len(action.ids))
            self._place.flat.settle()
            return logits

    def forward_each(self, action: ForwardEach) -> list[Tensor | Exception]:
        """For each question, logits [V] float32 after its token, or the error that it met where
        that is its own.
        """
        pairs = list(zip(action.question_ids, action.ids, strict=True))
        if not self.is_batching:
            return [self._alone(*pair) for pair in pairs]
        from orchestrator.model.decode_batch import MAX_QUESTIONS

        outcomes: list[Tensor | Exception] = []
        for first in range(0, len(pairs), MAX_QUESTIONS):
            own = pairs[first : first + MAX_QUESTIONS]
            question_ids, ids = zip(*own, strict=True)
            try:
                batch = self._batch_of(question_ids)
            except torch.OutOfMemoryError:  # their plans do not fit: each has one of its own
                outcomes += [self._alone(*pair) for pair in own]
            else:
                outcomes += self._step(batch, question_ids, ids)
        return outcomes

    def end(self, action: EndQuestion) -> Recorder | None:
        """Forget a question; what attention saw, on all ranks together, if that is wanted."""
        recorder = self._questions.pop(action.question_id).recorder
        for key in [key for key in self._batches if action.question_id in key]:
            del self._batches[key]
        recorder.settle()  # what still has to be told holds on to the question
        if not action.reports:
            return None
        recorder.merge()
        return recorder

    def clear(self) -> None:
        """Forget all of them."""
        self._batches.clear()
        self._questions.clear()

    def _alone(self, question_id: int, token: int) -> Tensor | Exception:
        """One question's forward. Over several ranks an error is everybody's: it leaves them out of
        step.
        """
        try:
            return self.forward(Forward(question_id=question_id, ids=(token,)))
        except Exception as error:
            if not self._place.is_alone:
                raise
            return error

    def _step(
        self, batch: DecodeBatch, question_ids: Sequence[int], ids: Sequence[int]
    ) -> list[Tensor]:
        questions = [self._questions[question_id] for question_id in question_ids]
        with torch.inference_mode():
            logits = batch.forward(ids, [question.position for question in questions])
        for question in questions:
            question.position += 1
        return logits

    def _batch_of(self, question_ids: tuple[int, ...]) -> DecodeBatch:
        """The batch of a set of questions, made where it is new."""
        if question_ids not in self._batches:
            from orchestrator.model.decode_batch import DecodeBatch
            from orchestrator.model.device_attention import DeviceAttention

            attentions = []
            for question_id in question_ids:
                attention = self._questions[question_id].attention
                assert isinstance(attention, DeviceAttention)
                attentions.append(attention)
            while len(self._batches) >= MAX_BATCHES:
                self._batches.popitem(last=False)
            with torch.inference_mode():
                self._batches[question_ids] = DecodeBatch(self._model.decoder, attentions)
        self._batches.move_to_end(question_ids)
        return self._batches[question_ids]

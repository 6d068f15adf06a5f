"""Steps of several questions as one forward on one GPU: weights are read once for all of them.

Owns the order in which questions stand in the forward: those that share a plan side by side.
Refuses to know which questions there are (`questions.py`) and who waits for whom (`batcher.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from orchestrator.model.decode_graph import DecodeGraph
from orchestrator.model.decoder import Decoder
from orchestrator.model.device_attention import DeviceAttention
from orchestrator.model.step_attention import StepAttention, kind_of
from sparse_attn.kernels.layer import MAX_ROWS

MAX_QUESTIONS = MAX_ROWS


class DecodeBatch:
    """Forwards of one token of each of these questions, at most MAX_QUESTIONS."""

    def __init__(self, decoder: Decoder, attentions: Sequence[DeviceAttention]) -> None:
        questions = [attention.question for attention in attentions]
        self._order = sorted(range(len(questions)), key=lambda i: repr(kind_of(questions[i])))
        attention = StepAttention([questions[i] for i in self._order])
        self._graph = DecodeGraph(decoder, attention, num_tokens=len(questions))

    def forward(self, tokens: Sequence[int], positions: Sequence[int]) -> list[Tensor]:
        """Each question's logits [V] float32 after its token at its position."""
        ordered = ([own[i] for i in self._order] for own in (tokens, positions))
        logits = self._graph.forward(*ordered).clone()
        rows = dict(zip(self._order, logits.unbind(0), strict=True))
        return [rows[i] for i in range(len(rows))]

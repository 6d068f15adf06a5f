"""A decode step as one CUDA graph: captured once a set of questions, replayed for every token.

Owns the tensors that a captured forward reads (tokens, positions) and writes (logits). The first
step runs as it is, so that every kernel is compiled; the second one is captured. Refuses to know
what attention does: it keeps all that changes from step to step on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orchestrator.model.decoder import Decoder
from orchestrator.model.step_attention import StepAttention
from orchestrator.model.streams import Upload


class DecodeGraph:
    """Forwards of num_tokens tokens, one each of as many questions."""

    def __init__(self, decoder: Decoder, attention: StepAttention, *, num_tokens: int) -> None:
        self._decoder, self._attention = decoder, attention
        self._inputs = Upload((2, num_tokens), torch.int64, decoder.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._is_warm = False

    def forward(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits [num_tokens, V] float32 after each token at its position, the attention prepared
        before and advanced after it; valid until the next call.
        """
        self._attention.prepare(1)
        self._inputs.send(torch.tensor([tokens, positions]))
        logits = self._replay()
        self._attention.advance(1)
        return logits

    def _replay(self) -> Tensor:
        if self._decoder.device.type != "cuda" or not self._is_warm:
            self._is_warm = True
            return self._compute()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Other threads choose tokens meanwhile, which is no part of the graph.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._logits = self._compute()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _compute(self) -> Tensor:
        ids, positions = self._inputs.there
        hidden = self._decoder.forward(ids, positions, self._attention)
        logits = self._decoder.logits(hidden)
        self._attention.finish()
        return logits

"""A decode step as one CUDA graph: captured once a question, replayed for every further token.

Owns the tensors that a captured forward reads (token, position) and writes (logits). The first
token runs as it is, so that every kernel is compiled; the second one is captured. Refuses to know
what attention does: one that `is_static` keeps all that changes from step to step on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.model.attention import Attention
from orchestrator.model.decoder import Decoder


class DecodeGraph:
    """Forwards of one token of one question."""

    def __init__(self, decoder: Decoder, attention: Attention) -> None:
        self._decoder, self._attention = decoder, attention
        self._ids = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        self._positions = torch.zeros_like(self._ids)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._is_warm = False

    def forward(self, token: int, position: int) -> Tensor:
        """Logits [V] float32 after `token` at `position`; valid until the next call."""
        self._ids.fill_(token)
        self._positions.fill_(position)
        if not self._is_warm:
            self._is_warm = True
            return self._compute()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._compute()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _compute(self) -> Tensor:
        hidden = self._decoder.forward(self._ids, self._positions, self._attention)
        return self._decoder.logits(hidden)[0]

"""Dense causal attention with a growing KV cache: the simplest `attend` there is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from orchestrator.model.config import ModelConfig
from orchestrator.model.decoder import Decoder


class DenseCache:
    """Keeps every key and value of one sequence in token order and attends to all of them."""

    def __init__(self, cfg: ModelConfig) -> None:
        self._cfg = cfg
        self._kv: list[tuple[Tensor, Tensor] | None] = [None] * cfg.num_layers
        self._positions = torch.empty(0, dtype=torch.long)
        self._new_positions = self._positions

    def forward(self, decoder: Decoder, ids: list[int]) -> Tensor:
        """Run `ids` [T] behind what came before; returns hidden [T, E]."""
        start = len(self._positions)
        self._new_positions = torch.arange(start, start + len(ids))
        self._positions = torch.arange(start + len(ids))
        with torch.inference_mode():
            return decoder.forward(torch.tensor(ids), self._new_positions, self.attend)

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax over all earlier keys inside the layer's window; float32 [T, H, D]."""
        cfg = self._cfg
        old = self._kv[layer_idx]
        if old is not None:
            k, v = torch.cat((old[0], k)), torch.cat((old[1], v))
        self._kv[layer_idx] = (k, v)
        distance = self._new_positions[:, None] - self._positions
        window = cfg.windows[layer_idx]
        seen = (distance >= 0) & (distance < (len(k) if window is None else window))
        q, k, v = (x.float().transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=cfg.attention_scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)


def dense_logits(decoder: Decoder, ids: list[int]) -> Tensor:
    """Logits [T, V] of one prompt, in one go."""
    with torch.inference_mode():
        return decoder.logits(DenseCache(decoder.cfg).forward(decoder, ids))


def dense_greedy(decoder: Decoder, ids: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation of `ids`, one token a step through the cache."""
    cache = DenseCache(decoder.cfg)
    hidden = cache.forward(decoder, ids)
    answer: list[int] = []
    for _ in range(num_tokens):
        with torch.inference_mode():
            answer.append(int(decoder.logits(hidden[-1:]).argmax()))
        hidden = cache.forward(decoder, answer[-1:])
    return answer

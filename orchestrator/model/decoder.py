"""One decoder for Llama, Mistral, Qwen2, Qwen3 and Gemma 3: token ids in, hidden states out.

Owns the order of operations. Refuses to know KV: where keys and values are kept, which of them a
query reads and how the parts are merged is the business of `attend`, which the caller brings
(`ingest.py` appends and attends, `attention.py` selects). No batch dimension: a request is a
sequence of tokens, and requests that share weights are the caller's to stack along T.

Callers run it under `torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.model.config import ModelConfig, RopeConfig
from orchestrator.model.layers import LayerWeights, Linear, ModelWeights, mlp, residual, rms_norm
from orchestrator.model.rope import Rotation, inverse_frequencies, rotate, rotation

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`attend(layer_idx, q [T, H, D], k [T, G, D], v [T, G, D]) -> out [T, H, D]`.

q and k are rotated; the caller multiplies scores by `ModelConfig.attention_scale`, masks by
position and honours `ModelConfig.windows[layer_idx]`. `out` may be float32 whatever q is.
"""

Store = Callable[[int, Tensor, Tensor], None]
"""`store(layer_idx, k [T, G, D], v [T, G, D])`: keep keys and values, attend to nothing."""


class Decoder:
    """A model ready to compute; holds weights and rotary frequencies, and nothing of any call.

    linear: how weights are multiplied.
    """

    def __init__(
        self, cfg: ModelConfig, weights: ModelWeights, linear: Linear = functional.linear
    ) -> None:
        self.cfg = cfg
        self._linear = linear
        self.weights = weights
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        # The scale is rounded to the weights' dtype: that is how Gemma was trained.
        self._embedding_scale = torch.tensor(cfg.embedding_scale).to(self.dtype).item()
        self._ropes: dict[RopeConfig, Tensor] = {
            rope: inverse_frequencies(rope, cfg.head_dim).to(self.device)
            for rope in {cfg.rope, cfg.rope_sliding}
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one forward reads: every layer and the LM head."""
        tensors = [self.weights.lm_head, self.weights.final_norm]
        for layer in self.weights.layers:
            values = (getattr(layer, field.name) for field in fields(layer))
            tensors.extend(value for value in values if value is not None)
        return sum(tensor.nbytes for tensor in tensors)

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return hidden states [T, E] after the final norm, for `ids` [T] at `positions` [T].

        `positions` are document token indices; they need be neither contiguous nor ordered.
        """
        x, turns = self._embed(ids), self._turns(positions)
        for layer_idx, layer in enumerate(self.weights.layers):
            x = self._layer(x, layer_idx, layer, turns[layer_idx], attend)
        return rms_norm(x, self.weights.final_norm, self.cfg.norm_eps)

    def fill(self, ids: Tensor, positions: Tensor, attend: Attend, store: Store) -> None:
        """Run `ids` [T] for the keys and values of every layer alone.

        The last layer calls `store` instead of `attend`: its attention and MLP feed nothing.
        """
        x, turns = self._embed(ids), self._turns(positions)
        *before, last = enumerate(self.weights.layers)
        for layer_idx, layer in before:
            x = self._layer(x, layer_idx, layer, turns[layer_idx], attend)
        layer_idx, layer = last
        normed = rms_norm(x, layer.attn_norm, self.cfg.norm_eps)
        _, k, v = self._qkv(normed, layer, turns[layer_idx])
        store(layer_idx, k, v)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [T, V] float32 for `hidden` [T, E]; pass only the rows that are needed."""
        logits = self._linear(hidden, self.weights.lm_head, None).float()
        cap = self.cfg.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _embed(self, ids: Tensor) -> Tensor:
        x = functional.embedding(ids, self.weights.embedding)
        return x if self.cfg.embedding_scale == 1.0 else x * self._embedding_scale

    def _turns(self, positions: Tensor) -> list[Rotation]:
        """The rotation of each layer; layers of one kind share it."""
        cfg = self.cfg
        turns = {
            rope: rotation(freq, positions, factor=rope.attention_factor, dtype=self.dtype)
            for rope, freq in self._ropes.items()
        }
        return [turns[cfg.rope if w is None else cfg.rope_sliding] for w in cfg.windows]

    def _layer(
        self, x: Tensor, layer_idx: int, layer: LayerWeights, turn: Rotation, attend: Attend
    ) -> Tensor:
        eps = self.cfg.norm_eps
        q, k, v = self._qkv(rms_norm(x, layer.attn_norm, eps), layer, turn)
        out = attend(layer_idx, q, k, v).to(self.dtype).reshape(x.shape[0], -1)
        x = residual(x, self._linear(out, layer.o, layer.o_bias), layer.post_attn_norm, eps)
        branch = mlp(rms_norm(x, layer.mlp_norm, eps), layer, self.cfg.activation, self._linear)
        return residual(x, branch, layer.post_mlp_norm, eps)

    def _qkv(self, x: Tensor, layer: LayerWeights, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Project, norm and rotate; queries and keys go through as the heads of one tensor."""
        cfg = self.cfg
        num_rotated = cfg.num_heads + cfg.num_kv_heads
        heads = self._linear(x, layer.qkv, layer.qkv_bias)
        heads = heads.view(-1, num_rotated + cfg.num_kv_heads, cfg.head_dim)
        qk = heads[:, :num_rotated]
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, cfg.norm_eps)
        qk = rotate(qk, turn)
        return qk[:, : cfg.num_heads], qk[:, cfg.num_heads :], heads[:, num_rotated:]

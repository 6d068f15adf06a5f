"""One decoder for Llama, Mistral, Qwen2, Qwen3 and Gemma 3: token ids in, hidden states out.

Owns the order of operations. Refuses to know KV: where keys and values are kept, which of them a
query reads and how the parts are merged is the business of `attend`, which the caller brings
(`ingest.py` appends and attends, `attention.py` selects). No batch dimension: a request is a
sequence of tokens, and requests that share weights are the caller's to stack along T.

Sharded over ranks (`shard.py`), every product gives a rank its own columns of the result, which are
then gathered: four collectives a layer, none of which adds anything up, so that the bits of a
forward do not depend on the number of ranks. Callers run it under `torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from collectives import Group, SoloGroup
from collectives.overlap import Steps, run_steps
from orchestrator.model.config import ModelConfig, RopeConfig
from orchestrator.model.layers import (
    Fused,
    LayerWeights,
    Linear,
    LinearSplit,
    ModelWeights,
    add_norm,
    gated,
    rms_norm,
)
from orchestrator.model.rope import Rotation, inverse_frequencies, rotate, rotation
from orchestrator.model.shard import Columns, ModelShard, whole_model

Attend = Callable[[int, Tensor, Tensor, Tensor], "Tensor | Steps[Tensor]"]
"""`attend(layer_idx, q [T, H, D], k [T, G, D], v [T, G, D]) -> out [T, all heads, D]`.

q, k and v are those of this rank's heads, q and k rotated; `out` is of all heads of the model,
whoever computed them, and may be float32 whatever q is. The caller multiplies scores by
`ModelConfig.attention_scale`, masks by position and honours `ModelConfig.windows[layer_idx]`. An
attention that waits for other ranks returns steps. `out` is read before the next call, which may
overwrite it.
"""

Store = Callable[[int, Tensor, Tensor], None]
"""`store(layer_idx, k [T, G, D], v [T, G, D])`: keep keys and values, attend to nothing."""


class Stream(NamedTuple):
    """The stream [T, E] between layers, what is still to be added to it, normed by post_norm."""

    x: Tensor
    branch: Tensor | None
    post_norm: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where the keys and values of the next tokens go: k, v [G, capacity, D], from row at [1]."""

    k: Tensor
    v: Tensor
    at: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """A room for each of the next tokens: their table (`kernels.rotary.rooms_of`)."""

    table: Tensor


@runtime_checkable
class Placing(Protocol):
    """An attention whose keys and values are written to their place before it is called."""

    def room(self, layer_idx: int) -> Room | Rooms: ...

    def attend_placed(self, layer_idx: int, q: Tensor) -> Tensor:
        """As `Attend`, for keys and values that are in their room."""
        ...


class Decoder:
    """A model ready to compute, or one rank's shard of it; holds weights and rotary frequencies,
    and nothing of any call.

    linear: how weights are multiplied; linear_split: the same with bits that do not depend on how
    columns are cut over ranks, None for `linear` everywhere; group: all ranks, where `shard` is not
    the whole model; fused: what computes the rest of a layer, None for torch's operators.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        weights: ModelWeights,
        linear: Linear = functional.linear,
        *,
        linear_split: LinearSplit | None = None,
        shard: ModelShard | None = None,
        group: Group | None = None,
        fused: Fused | None = None,
    ) -> None:
        self.cfg, self._fused = cfg, fused
        self.shard = shard or whole_model(cfg)
        self._group = group or SoloGroup()
        assert self._group.size == self.shard.model.size
        self._linear, self._linear_split = linear, linear_split
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
    def is_fused(self) -> bool:
        """Whether a layer is computed by kernels, whose bits of a row depend on no other row."""
        return self._fused is not None

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
        Collective where the model is sharded, as is every method below.
        """
        return run_steps(self.forward_steps(ids, positions, attend))

    def forward_steps(self, ids: Tensor, positions: Tensor, attend: Attend) -> Steps[Tensor]:
        """`forward`, giving way wherever it waits for other ranks."""
        x, turns = (yield from self._embed(ids)), self._turns(positions)
        stream = Stream(x, None, None)
        for layer_idx in range(len(self.weights.layers)):
            stream = yield from self._layer(stream, layer_idx, turns, attend, exact=True)
        return self._add(stream, self.weights.final_norm)[1]

    def fill(self, ids: Tensor, positions: Tensor, attend: Attend, store: Store) -> None:
        """Run `ids` [T] for the keys and values of every layer alone.

        The last layer calls `store` instead of `attend`: its attention and MLP feed nothing.
        """
        run_steps(self.fill_steps(ids, positions, attend, store))

    def fill_steps(
        self, ids: Tensor, positions: Tensor, attend: Attend, store: Store
    ) -> Steps[None]:
        """`fill`, giving way wherever it waits for other ranks."""
        x, turns = (yield from self._embed(ids)), self._turns(positions)
        stream, last = Stream(x, None, None), len(self.weights.layers) - 1
        for layer_idx in range(last):
            stream = yield from self._layer(stream, layer_idx, turns, attend, exact=False)
        _, normed = self._add(stream, self.weights.layers[last].attn_norm)
        _, k, v = self._rotated(self._heads(normed, last), last, turns[last])
        store(last, k, v)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [T, V] float32 for `hidden` [T, E]; pass only the rows that are needed."""
        vocab = self.shard.vocab
        own = self._product(hidden, self.weights.lm_head, None, vocab.pieces).float()
        logits = run_steps(self._gather(own, vocab))
        cap = self.cfg.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _embed(self, ids: Tensor) -> Steps[Tensor]:
        vocab = self.shard.vocab
        if vocab.size == 1:
            x = functional.embedding(ids, self.weights.embedding)
        else:
            own = ids - vocab.own.start
            is_other = (own < 0) | (own >= vocab.width)
            rows = functional.embedding(own.masked_fill(is_other, 0), self.weights.embedding)
            x = rows.masked_fill_(is_other.unsqueeze(1), 0.0)
            yield self._group.start_all_reduce_(x)  # every row is one rank's, and zero elsewhere
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
        self,
        stream: Stream,
        layer_idx: int,
        turns: list[Rotation],
        attend: Attend,
        *,
        exact: bool,
    ) -> Steps[Stream]:
        """One layer; exact: with bits that do not depend on the number of ranks."""
        shard, layer = self.shard, self.weights.layers[layer_idx]

        def columns(pieces: Sequence[int]) -> Linear:
            return partial(self._product, pieces=pieces) if exact else self._linear

        x, normed = self._add(stream, layer.attn_norm)
        attended = self._attend(normed, layer_idx, turns[layer_idx], attend)
        out = attended if isinstance(attended, Tensor) else (yield from attended)
        heads = out.to(self.dtype).reshape(x.shape[0], -1)
        own = columns(shard.model.pieces)(heads, layer.o, layer.o_bias)
        branch = yield from self._gather(own, shard.model)
        x, normed = self._add(Stream(x, branch, layer.post_attn_norm), layer.mlp_norm)
        both = (*shard.mlp.pieces, *(shard.mlp.width + edge for edge in shard.mlp.pieces[1:]))
        own = self._gated(normed, layer, columns(both), exact=exact)
        inner = yield from self._gather(own, shard.mlp)
        own = columns(shard.model.pieces)(inner, layer.down, layer.down_bias)
        branch = yield from self._gather(own, shard.model)
        return Stream(x, branch, layer.post_mlp_norm)

    def _add(self, stream: Stream, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The stream with its branch, and its norm."""
        return add_norm(*stream[:2], weight, stream[2], self.cfg.norm_eps, self._fused)

    def _gated(self, normed: Tensor, layer: LayerWeights, linear: Linear, *, exact: bool) -> Tensor:
        activation = self.cfg.activation
        if self._fused is None:
            is_split = exact and self._linear_split is not None
            return gated(normed, layer, activation, linear, exact=is_split)
        return self._fused.gate(linear(normed, layer.gate_up, layer.gate_up_bias), activation)

    def _attend(
        self, normed: Tensor, layer_idx: int, turn: Rotation, attend: Attend
    ) -> Tensor | Steps[Tensor]:
        heads, layer = self._heads(normed, layer_idx), self.weights.layers[layer_idx]
        placing: object = attend
        if self._fused is None or not isinstance(placing, Placing):
            return attend(layer_idx, *self._rotated(heads, layer_idx, turn))
        room, eps, norm = placing.room(layer_idx), self.cfg.norm_eps, layer.qk_norm
        if isinstance(room, Rooms):
            num_kv_heads = len(self.shard.kv_heads)
            q = self._fused.rotate_append_each(
                heads, *turn, norm, room.table, num_kv_heads=num_kv_heads, eps=eps
            )
        else:
            q = self._fused.rotate_append(heads, *turn, norm, room.k, room.v, room.at, eps=eps)
        return placing.attend_placed(layer_idx, q)

    def _heads(self, normed: Tensor, layer_idx: int) -> Tensor:
        """Queries, keys and values [T, H + 2G, D], as they are multiplied."""
        layer = self.weights.layers[layer_idx]
        heads = self._linear(normed, layer.qkv, layer.qkv_bias)
        return heads.view(normed.shape[0], -1, self.cfg.head_dim)

    def _rotated(
        self, heads: Tensor, layer_idx: int, turn: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norm and rotate; queries and keys go through as the heads of one tensor."""
        num_heads, num_kv_heads = len(self.shard.heads), len(self.shard.kv_heads)
        num_rotated, qk_norm = num_heads + num_kv_heads, self.weights.layers[layer_idx].qk_norm
        qk = heads[:, :num_rotated]
        if qk_norm is not None:
            qk = rms_norm(qk, qk_norm, self.cfg.norm_eps)
        qk = rotate(qk, turn)
        return qk[:, :num_heads], qk[:, num_heads:], heads[:, num_rotated:]

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, pieces: Sequence[int]
    ) -> Tensor:
        """Own columns of a product, piece by piece where bits must not depend on the mesh."""
        if self._linear_split is None:
            return self._linear(x, weight, bias)
        return self._linear_split(x, weight, bias, pieces)

    def _gather(self, own: Tensor, columns: Columns) -> Steps[Tensor]:
        """All columns [T, N] on every rank, from each rank's own [T, n]."""
        if columns.size == 1:
            return own
        return (yield self._group.start_gather_columns(own, columns.widths))

"""The parts of a decoder layer as plain functions, and the weights they read.

Owns the weight dataclasses and norm, attention projection and MLP. Norm weights are always
float32, with Gemma's "+ 1" applied when they are loaded, so that one norm serves every model.
Refuses to know files, KV and positions; `decoder.py` strings the parts together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.model.config import Activation

_GELU_SLOPE = 2.0 * (2.0 / math.pi) ** 0.5

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`linear(x [T, K], weight [N, K], bias [N] or None) -> [T, N]` in x's dtype."""

LinearSplit = Callable[[Tensor, Tensor, Tensor | None, Sequence[int]], Tensor]
"""`linear` in pieces of columns: bits between two bounds depend on no other column."""


class Fused(Protocol):
    """Operators of a layer as one launch each (`sparse_attn.kernels.layer`), for a GPU."""

    def add_rms_norm(
        self,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        *,
        eps: float,
        post_norm: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def gate(self, gate_up: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor: ...

    def rotate_append(
        self,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        qk_norm: Tensor | None,
        k_buffer: Tensor,
        v_buffer: Tensor,
        at: Tensor,
        *,
        eps: float,
    ) -> Tensor: ...

    def rotate_append_each(
        self,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        qk_norm: Tensor | None,
        rooms: Tensor,
        *,
        num_kv_heads: int,
        eps: float,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer, or a rank's rows of one (`shard.py`): H, G, F and E of a matrix's rows are then
    those that the rank holds. `qkv` stacks query, key and value rows, `gate_up` gate and up rows.

    `qk_norm` repeats the query norm for H rows and the key norm for G rows, so that queries and
    keys are normed together. Post norms are Gemma's.
    """

    attn_norm: Tensor  # [E] f32
    qkv: Tensor  # [(H + 2G) D, E]
    qkv_bias: Tensor | None  # [(H + 2G) D]
    qk_norm: Tensor | None  # [H + G, D] f32
    o: Tensor  # [E, H D]
    o_bias: Tensor | None  # [E]
    post_attn_norm: Tensor | None  # [E] f32
    mlp_norm: Tensor  # [E] f32
    gate_up: Tensor  # [2F, E], F = mlp_dim
    gate_up_bias: Tensor | None  # [2F]
    down: Tensor  # [E, F]
    down_bias: Tensor | None  # [E]
    post_mlp_norm: Tensor | None  # [E] f32


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """All weights of a model; `lm_head` is `embedding` itself where the two are tied."""

    embedding: Tensor  # [V, E]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [E] f32
    lm_head: Tensor  # [V, E]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm the last dimension in float32; `weight` is [..., D] and may differ by head."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * inverse).mul_(weight).to(x.dtype)


def gated(
    x: Tensor, layer: LayerWeights, activation: Activation, linear: Linear, *, exact: bool = False
) -> Tensor:
    """Return act(gate) * up, [T, E] to [T, F]; `linear` multiplies both at once.

    exact: with bits of each element that do not depend on its place. torch's fused activations
    compute the last few of a row in another way than the others.
    """
    gate, up = linear(x, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
    if exact:
        # silu(x) = x / (1 + exp(-x)); gelu by tanh(u) is x / (1 + exp(-2 u)).
        wide = gate.float()
        slope = wide if activation == "silu" else _GELU_SLOPE * (wide + 0.044715 * wide.pow(3))
        return (wide / torch.exp(-slope).add_(1.0)).to(x.dtype).mul_(up)
    act = (
        functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    )
    return act.mul_(up)


def residual(x: Tensor, branch: Tensor, post_norm: Tensor | None, eps: float) -> Tensor:
    """Add a branch's output to the stream, normed first where the model does so."""
    return x + (branch if post_norm is None else rms_norm(branch, post_norm, eps))


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    post_norm: Tensor | None,
    eps: float,
    fused: Fused | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream with a branch's output added, and its norm: [T, E] each."""
    if fused is not None:
        return fused.add_rms_norm(x, branch, weight, eps=eps, post_norm=post_norm)
    x = x if branch is None else residual(x, branch, post_norm, eps)
    return x, rms_norm(x, weight, eps)

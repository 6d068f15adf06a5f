"""What a model is, as plain numbers: the one description that decoder, loaders and planner share.

Owns the dataclasses and the checks that hold for every architecture. Refuses to know file formats
(`hf_config.py`, `gguf_config.py` build these objects) and tensors; it imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import ModelDamaged, ModelUnsupported

Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
)
"""Architectures the decoder computes; any other is refused by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of one kind of layer; fields that a `kind` does not use keep their default.

    `divisors`, where given, are [D/2] numbers that divide the default frequencies (GGUF stores
    llama3 scaling that way), and take the place of `kind`.
    """

    kind: RopeKind = "default"
    base: float
    factor: float = 1.0
    original_context_tokens: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer, architecture differences spelled out as numbers and flags.

    `windows[layer]` is the sliding window in tokens (a query sees itself and window - 1 before
    it), None for full attention. Sliding layers rotate by `rope_sliding`, the others by `rope`.
    `gemma_norms`: norm weights are stored minus one, and attention and MLP outputs are normed too.
    """

    name: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_dim: int
    mlp_dim: int
    vocab_size: int
    max_context_tokens: int
    norm_eps: float
    activation: Activation
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    gemma_norms: bool
    attention_scale: float
    embedding_scale: float
    logit_softcap: float | None
    windows: tuple[int | None, ...]
    rope: RopeConfig
    rope_sliding: RopeConfig

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the full-attention layers, in layer order."""
        return tuple(i for i, window in enumerate(self.windows) if window is None)

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        """Indices of the sliding-window layers, in layer order."""
        return tuple(i for i, window in enumerate(self.windows) if window is not None)


def check_config(cfg: ModelConfig) -> None:
    """Raise ModelUnsupported or ModelDamaged where no decoder could be built from `cfg`."""
    if cfg.architecture not in ARCHITECTURES:
        raise ModelUnsupported(
            f"architecture {cfg.architecture!r} of {cfg.name} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}; choose a model of one of these"
        )
    for what in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "model_dim", "mlp_dim"):
        if getattr(cfg, what) < 1:
            raise ModelDamaged(
                f"{what} of {cfg.name} is {getattr(cfg, what)}; the least is 1; "
                "fetch the model's configuration again"
            )
    if cfg.num_heads % cfg.num_kv_heads:
        raise ModelDamaged(
            f"{cfg.num_heads} query heads of {cfg.name} cannot share {cfg.num_kv_heads} KV heads; "
            "the first must be a multiple of the second; fetch the model's configuration again"
        )
    if cfg.head_dim % 2:
        raise ModelUnsupported(
            f"head_dim {cfg.head_dim} of {cfg.name} is odd; rotary embedding needs an even one; "
            "choose another model"
        )
    if len(cfg.windows) != cfg.num_layers or any(w is not None and w < 1 for w in cfg.windows):
        raise ModelDamaged(
            f"sliding windows of {cfg.name} are {cfg.windows}; expected one of at least 1 token, "
            f"or none, for each of {cfg.num_layers} layers; fetch the model's configuration again"
        )

"""`shape:NAME`: random weights with the dimensions of a known model, for timing only.

Owns the published dimensions and a seeded initialisation under which activations stay finite.
Refuses to pretend: whatever such a model answers is noise, and `LoadedModel.is_random` says so.
"""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.errors import ModelNotFound
from orchestrator.model.config import ModelConfig
from orchestrator.model.hf_config import config_from_hf
from orchestrator.model.layers import ModelWeights
from orchestrator.model.shard import ModelShard
from orchestrator.model.weights import Names, WeightSink

PREFIX = "shape:"

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": _LLAMA3_ROPE,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.3-70b": {
        **_LLAMA3,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen2.5-7b-1m": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1_010_000,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0},
    },
    "qwen3-32b": {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151_936,
        "hidden_size": 5120,
        "intermediate_size": 25_600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
}

# Parts have no file behind them here: their own names serve.
_PARTS = "attn_norm mlp_norm q k v o q_norm k_norm gate up down post_attn_norm post_mlp_norm"
_NAMES: Names = {
    **{part: part for part in ("embedding", "final_norm", "lm_head")},
    **{part: "{}." + part for part in _PARTS.split()},
}


def shape_config(name: str) -> ModelConfig:
    """Return the configuration of `shape:NAME` or `shape:NAME@LAYERS` (that many layers only).

    Raises ModelNotFound for an unknown name and for a number of layers the model does not have.
    """
    base, _, layers = name.removeprefix(PREFIX).partition("@")
    raw = SHAPES.get(base)
    if raw is None:
        raise ModelNotFound(
            f"model shape {base!r} is not known; shapes: {', '.join(SHAPES)}; use one of these"
        )
    limit = raw["num_hidden_layers"]
    num_layers = int(layers) if layers.isdecimal() else (0 if layers else limit)
    if not 1 <= num_layers <= limit:
        raise ModelNotFound(
            f"shape {base} cannot have {layers!r} layers; limit {limit}; use @1 to @{limit}"
        )
    return config_from_hf({**raw, "num_hidden_layers": num_layers}, name=name)


def random_weights(
    cfg: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    shard: ModelShard | None = None,
) -> ModelWeights:
    """Return seeded random weights, or a shard of them; the same on every run of one device type.

    A shard's numbers are those of the whole: each matrix is drawn whole, one at a time.

    Matrices have variance 1 / columns, so every product keeps its input's scale; those that end a
    residual branch are smaller by sqrt(2 L), so the stream keeps its scale too.
    """
    sink = WeightSink(cfg, _NAMES, dtype=dtype, device=device, source=cfg.name, shard=shard)
    generator = torch.Generator(device).manual_seed(seed)
    branch_scale = (2 * cfg.num_layers) ** -0.5
    for name in list(sink.waiting):
        slot = sink.take(name, sink.waiting[name].shape)
        if "norm" in slot.part:
            slot.target.fill_(1.0)
        elif name.endswith(".bias"):
            slot.target.zero_()
        else:
            std = 1.0 if slot.part == "embedding" else slot.target.shape[-1] ** -0.5
            std *= branch_scale if slot.part in ("o", "down") else 1.0
            whole = slot.target if slot.is_whole else slot.target.new_empty(slot.shape)
            whole.normal_(std=std, generator=generator)
            if whole is not slot.target:
                slot.target.copy_(whole[slot.rows])
    return sink.finish()

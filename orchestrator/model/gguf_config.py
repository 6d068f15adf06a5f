"""Builds a ModelConfig from the metadata of a GGUF file.

Owns the keys that llama.cpp writes for the architectures supported here, the constants that its
format implies without storing them, and the refusals. Refuses to know tensors beyond their names
and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ModelDamaged, ModelUnsupported
from orchestrator.model.config import ModelConfig, RopeConfig
from orchestrator.model.rope_config import yarn_attention_factor

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # Mistral is written as llama too: same mathematics
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_KNOWN = frozenset(
    {"block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"}
    | {"attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"}
    | {"attention.key_length", "attention.value_length", "rope.dimension_count"}
    | {"rope.freq_base", "rope.scaling.type", "rope.scaling.factor"}
    | {"rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"}
    | {"rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scale_linear"}
)
_KNOWN_GEMMA = frozenset(
    {"attention.sliding_window", "attention.sliding_window_pattern", "final_logit_softcapping"}
    | {"rope.freq_base_swa"}
)
_GEMMA_27B_LAYERS = 62


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keys:
    """Metadata below the architecture's prefix, with errors that name the key."""

    prefix: str
    name: str
    values: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"{self.prefix}.{key}", default)

    def number(self, key: str) -> Any:
        value = self.get(key)
        if isinstance(value, int | float) and value > 0:
            return value
        raise ModelDamaged(
            f"{self.prefix}.{key} of {self.name} is {value!r}; a positive number is needed; "
            "choose another file"
        )


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_shapes: Mapping[str, tuple[int, ...]],
    *,
    name: str,
    rope_divisors: tuple[float, ...] | None = None,
) -> ModelConfig:
    """Return the configuration that a GGUF file describes.

    rope_divisors: the values of tensor `rope_freqs.weight`, where the file has one.
    Raises ModelUnsupported for what is not implemented, ModelDamaged for what is missing.
    """
    keys = _open_keys(metadata, name)
    gemma = keys.prefix == "gemma3"
    num_layers, num_heads = (
        int(keys.number("block_count")),
        int(keys.number("attention.head_count")),
    )
    model_dim = int(keys.number("embedding_length"))
    head_dim = int(keys.get("attention.key_length") or model_dim // num_heads)
    _check_head_dims(keys, head_dim)
    rope = _rope(keys, divisors=rope_divisors, gemma=gemma)
    local = RopeConfig(base=float(keys.get("rope.freq_base_swa", 10_000.0))) if gemma else rope
    # llama.cpp: the 27B model alone scales by E/H, and its number of layers tells it apart.
    scaled_dim = model_dim / num_heads if gemma and num_layers == _GEMMA_27B_LAYERS else head_dim
    return ModelConfig(
        name=name,
        architecture=_ARCHITECTURES[keys.prefix],
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(keys.get("attention.head_count_kv") or num_heads),
        head_dim=head_dim,
        model_dim=model_dim,
        mlp_dim=int(keys.number("feed_forward_length")),
        vocab_size=tensor_shapes.get("token_embd.weight", (0,))[0],
        max_context_tokens=int(keys.number("context_length")),
        norm_eps=float(keys.number("attention.layer_norm_rms_epsilon")),
        activation="gelu_tanh" if gemma else "silu",
        tie_embeddings="output.weight" not in tensor_shapes,
        qkv_bias="blk.0.attn_q.bias" in tensor_shapes,
        o_bias="blk.0.attn_output.bias" in tensor_shapes,
        mlp_bias="blk.0.ffn_gate.bias" in tensor_shapes,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_shapes,
        gemma_norms=gemma,
        attention_scale=scaled_dim**-0.5,
        embedding_scale=model_dim**0.5 if gemma else 1.0,
        logit_softcap=keys.get("final_logit_softcapping"),
        windows=_windows(keys, num_layers, gemma=gemma),
        rope=rope,
        rope_sliding=local,
    )


def _open_keys(metadata: Mapping[str, Any], name: str) -> _Keys:
    """Check the architecture, and that no key under its prefix is one that is not known here."""
    prefix = metadata.get("general.architecture")
    if prefix not in _ARCHITECTURES:
        raise ModelUnsupported(
            f"architecture {prefix!r} of {name} is not supported; supported in GGUF: "
            f"{', '.join(_ARCHITECTURES)}; choose another model"
        )
    known = _KNOWN | (_KNOWN_GEMMA if prefix == "gemma3" else frozenset())
    for key, value in metadata.items():
        if not key.startswith(f"{prefix}.") or key.removeprefix(f"{prefix}.") in known:
            continue
        if value not in (0, False, [], ""):
            raise ModelUnsupported(
                f"key {key} = {str(value)[:60]} of {name} is not known here and may change the "
                "mathematics; only known keys are accepted; choose another file"
            )
    return _Keys(prefix=prefix, name=name, values=metadata)


def _check_head_dims(keys: _Keys, head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise ModelUnsupported(
                f"{keys.prefix}.{key} of {keys.name} is {keys.get(key)}; it must be the head "
                f"dimension, {head_dim}; choose another model"
            )


def _rope(keys: _Keys, *, divisors: tuple[float, ...] | None, gemma: bool) -> RopeConfig:
    base = float(keys.get("rope.freq_base", 1_000_000.0 if gemma else 10_000.0))
    # Before `rope.scaling.type` there was one key, `rope.scale_linear`.
    old_factor = keys.get("rope.scale_linear")
    kind = keys.get("rope.scaling.type", "linear" if old_factor else "none")
    if kind == "none" and divisors is not None:
        return RopeConfig(kind="llama3", base=base, divisors=divisors)
    if divisors is not None or kind not in ("none", "linear", "yarn"):
        raise ModelUnsupported(
            f"rope type {kind!r} of {keys.name}{' with rope_freqs' if divisors else ''} is not "
            "supported; supported: none, linear, yarn, or rope_freqs alone; choose another model"
        )
    if kind == "none":
        return RopeConfig(base=base)
    factor = float(old_factor or keys.number("rope.scaling.factor"))
    if kind == "linear":
        return RopeConfig(kind="linear", base=base, factor=factor)
    return RopeConfig(
        kind="yarn",
        base=base,
        factor=factor,
        original_context_tokens=int(keys.number("rope.scaling.original_context_length")),
        beta_fast=float(keys.get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=float(keys.get("rope.scaling.yarn_beta_slow", 1.0)),
        attention_factor=yarn_attention_factor(factor),
    )


def _windows(keys: _Keys, num_layers: int, *, gemma: bool) -> tuple[int | None, ...]:
    """Gemma 3: five sliding layers, then a full one; other GGUF architectures have none."""
    if not gemma:
        return (None,) * num_layers
    window = int(keys.number("attention.sliding_window"))
    pattern = keys.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        flags = [bool(flag) for flag in pattern]
    else:
        flags = [bool((i + 1) % int(pattern)) for i in range(num_layers)]
    return tuple(window if flag else None for flag in flags)

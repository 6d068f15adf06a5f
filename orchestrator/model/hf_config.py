"""Reads `config.json` of a Hugging Face directory, in the style of transformers 4 and of 5.

Owns the names those files use, the defaults that each architecture leaves out, and the refusals:
a key that is not known here might change the mathematics, so it is refused by name rather than
skipped. `auto_map` points at code and is never followed. Refuses to know tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.errors import ModelDamaged, ModelUnsupported
from orchestrator.model.config import ARCHITECTURES, Activation, ModelConfig
from orchestrator.model.rope_config import read_rope

Raw = Mapping[str, Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys that no decoder's mathematics depends on: bookkeeping, training, generation defaults.
_INERT = _words(
    "architectures model_type auto_map transformers_version torch_dtype dtype use_cache "
    "initializer_range attention_dropout pretraining_tp return_dict output_attentions "
    "output_hidden_states chunk_size_feed_forward is_encoder_decoder id2label label2id "
    "problem_type bos_token_id eos_token_id pad_token_id cache_implementation torchscript "
    "task_specific_params is_llama_config unsloth_version unsloth_fixed"
)
_USED = _words(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings "
    "rope_parameters rope_scaling rope_theta partial_rotary_factor attention_bias mlp_bias"
)
_WINDOWS = _words("sliding_window layer_types")
_QWEN = _WINDOWS | _words("use_sliding_window max_window_layers dual_chunk_attention_config")
_USED_BY = {
    "LlamaForCausalLM": frozenset[str](),
    "MistralForCausalLM": _WINDOWS,
    "Qwen2ForCausalLM": _QWEN,
    "Qwen3ForCausalLM": _QWEN,
    "Gemma3ForCausalLM": _WINDOWS
    | _words(
        "hidden_activation rope_local_base_freq sliding_window_pattern query_pre_attn_scalar "
        "final_logit_softcapping"
    ),
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def config_from_hf(raw: Raw, *, name: str) -> ModelConfig:
    """Return the configuration that `raw` (a parsed config.json) describes.

    Raises ModelUnsupported for what is not implemented, ModelDamaged for what is missing.
    """
    architecture = _architecture(raw, name)
    _refuse_unknown(raw, _INERT | _USED | _USED_BY[architecture], name)
    gemma = architecture == "Gemma3ForCausalLM"
    num_layers, num_heads = (
        _int(raw, "num_hidden_layers", name),
        _int(raw, "num_attention_heads", name),
    )
    model_dim = _int(raw, "hidden_size", name)
    head_dim = _head_dim(raw, architecture, model_dim // num_heads)
    rope, rope_sliding = read_rope(raw, gemma=gemma, name=name)
    attention_bias = bool(raw.get("attention_bias", False))
    scalar = raw.get("query_pre_attn_scalar", 256) if gemma else head_dim
    return ModelConfig(
        name=name,
        architecture=architecture,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        model_dim=model_dim,
        mlp_dim=_int(raw, "intermediate_size", name),
        vocab_size=_int(raw, "vocab_size", name),
        max_context_tokens=_max_context_tokens(raw, name),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        activation=_activation(raw, name),
        tie_embeddings=bool(raw.get("tie_word_embeddings", gemma)),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        o_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=gemma or architecture == "Qwen3ForCausalLM",
        gemma_norms=gemma,
        attention_scale=float(scalar) ** -0.5,
        embedding_scale=float(model_dim) ** 0.5 if gemma else 1.0,
        logit_softcap=raw.get("final_logit_softcapping"),
        windows=_windows(raw, architecture, num_layers, name),
        rope=rope,
        rope_sliding=rope_sliding,
    )


def _architecture(raw: Raw, name: str) -> str:
    listed = raw.get("architectures") or []
    if len(listed) == 1 and listed[0] in ARCHITECTURES:
        return str(listed[0])
    raise ModelUnsupported(
        f"architecture {', '.join(map(str, listed)) or 'not named'} of {name} is not supported; "
        f"supported: {', '.join(ARCHITECTURES)}; choose a model of one of these"
    )


def _refuse_unknown(raw: Raw, known: frozenset[str], name: str) -> None:
    """A key that is not known passes only where its value switches nothing on."""
    for key, value in raw.items():
        inert = key in known or key.startswith("_")
        if not inert and value not in (None, False, [], {}, ""):
            raise ModelUnsupported(
                f"key {key!r} = {str(value)[:60]} in config.json of {name} is not known here and "
                "may change the mathematics; only known keys are accepted; "
                "remove it if the model computes the same without it"
            )


def _int(raw: Raw, key: str, name: str) -> int:
    value = raw.get(key)
    if isinstance(value, int) and value > 0:
        return value
    raise ModelDamaged(
        f"{key} in config.json of {name} is {value!r}; a positive integer is needed; "
        "fetch the model again"
    )


def _head_dim(raw: Raw, architecture: str, derived: int) -> int:
    """Absent head_dim is E/H, except where the architecture's own default is a number."""
    default = {"Qwen3ForCausalLM": 128, "Gemma3ForCausalLM": 256}.get(architecture, derived)
    return int(raw.get("head_dim") or default)


def _activation(raw: Raw, name: str) -> Activation:
    stated = raw.get("hidden_activation") or raw.get("hidden_act")
    if stated in _ACTIVATIONS:
        return _ACTIVATIONS[stated]
    raise ModelUnsupported(
        f"activation {stated!r} of {name} is not supported; supported: "
        f"{', '.join(_ACTIVATIONS)}; choose another model"
    )


def _max_context_tokens(raw: Raw, name: str) -> int:
    """Context limit; with dual chunk attention, the length up to which it is plain attention."""
    limit = _int(raw, "max_position_embeddings", name)
    chunked = raw.get("dual_chunk_attention_config")
    if not chunked:
        return limit
    return min(limit, int(chunked["chunk_size"]) - int(chunked["local_size"]))


def _windows(raw: Raw, architecture: str, num_layers: int, name: str) -> tuple[int | None, ...]:
    """Sliding window of each layer, by `layer_types` where given, else by the older switches."""
    window = raw.get("sliding_window")
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM") and not raw.get(
        "use_sliding_window", False
    ):
        window = None
    sliding = _sliding_flags(raw, architecture, num_layers, window is not None, name)
    if any(sliding) and window is None:
        raise ModelUnsupported(
            f"{name} has sliding layers and sliding_window {raw.get('sliding_window')!r} with "
            f"use_sliding_window {raw.get('use_sliding_window')!r}; a window is needed; "
            "correct config.json"
        )
    return tuple(window if flag else None for flag in sliding)


def _sliding_flags(
    raw: Raw, architecture: str, num_layers: int, has_window: bool, name: str
) -> list[bool]:
    types = raw.get("layer_types")
    if types is not None:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != num_layers:
            raise ModelUnsupported(
                f"layer_types of {name} has {len(types)} entries of {sorted(set(types))}; needed: "
                f"{num_layers} of full_attention, sliding_attention; choose another model"
            )
    if architecture == "Gemma3ForCausalLM":
        # transformers writes the pattern with an underscore when it saves the configuration.
        pattern = int(raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6)
        default = [bool((i + 1) % pattern) for i in range(num_layers)]
    elif architecture in ("MistralForCausalLM", "LlamaForCausalLM"):
        default = [has_window] * num_layers
    else:
        first = int(raw.get("max_window_layers", 28))
        default = [has_window and i >= first for i in range(num_layers)]
    flags = default if types is None else [kind == "sliding_attention" for kind in types]
    if architecture in ("MistralForCausalLM", "LlamaForCausalLM") and flags != default:
        raise ModelUnsupported(
            f"layer_types of {name} mixes kinds of attention; {architecture} has one kind for all "
            "layers; name the architecture that mixes them"
        )
    return flags

"""Tiny random models of every architecture, as transformers builds and saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 300
NUM_LAYERS = 4

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA = {
    **_SIZES,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 6,
    "sliding_window": 9,
    "query_pre_attn_scalar": 8,
}


def _llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**{**_SIZES, **changes})


def _gemma(**changes: Any) -> PreTrainedConfig:
    return Gemma3TextConfig(**{**_GEMMA, **changes})


CASES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "llama-linear-biases-tied": lambda: _llama(
        rope_parameters=_LINEAR, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-llama3-one-kv-head": lambda: _llama(rope_parameters=_LLAMA3, num_key_value_heads=1),
    "llama-heads-of-64": lambda: _llama(head_dim=64),
    "llama-yarn-wide-heads": lambda: _llama(rope_parameters=_YARN, head_dim=16),
    "llama-yarn-mscale": lambda: _llama(
        rope_parameters={**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}
    ),
    "mistral-sliding": lambda: MistralConfig(**_SIZES, sliding_window=11),
    "mistral-full": lambda: MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_without(_SIZES, "head_dim")),
    "qwen2-mixed-yarn": lambda: Qwen2Config(
        **_without(_SIZES, "head_dim"),
        use_sliding_window=True,
        sliding_window=11,
        max_window_layers=2,
        tie_word_embeddings=True,
        rope_parameters={**_YARN, "attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2},
    ),
    "qwen3-five-a-group": lambda: Qwen3Config(
        **{**_SIZES, "num_attention_heads": 10, "head_dim": 12}
    ),
    "qwen3-biases-tied": lambda: Qwen3Config(
        **_SIZES, attention_bias=True, tie_word_embeddings=True
    ),
    "qwen3-wide-heads": lambda: Qwen3Config(**{**_SIZES, "head_dim": 16}),
    "gemma3": _gemma,
    "gemma3-wide-heads": lambda: _gemma(head_dim=16, query_pre_attn_scalar=16),
    "gemma3-linear-softcap-untied": lambda: _gemma(
        rope_parameters={
            "full_attention": {**_LINEAR, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        query_pre_attn_scalar=24,
        final_logit_softcapping=5.0,
        tie_word_embeddings=False,
    ),
}
_CLASSES: dict[type, type[PreTrainedModel]] = {
    LlamaConfig: LlamaForCausalLM,
    MistralConfig: MistralForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
    Gemma3TextConfig: Gemma3ForCausalLM,
}


def _without(sizes: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if name != key}


def make_model(case: str) -> PreTrainedModel:
    """A seeded float32 model of `case` whose norms and biases differ from their defaults."""
    torch.manual_seed(sum(case.encode()))
    config = CASES[case]()
    config._attn_implementation = "eager"
    model = _CLASSES[type(config)](config).train(mode=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save_model(case: str, directory: Path, **options: Any) -> PreTrainedModel:
    """Make `case` and save it as transformers does; returns the model."""
    model = make_model(case)
    model.save_pretrained(directory, **options)
    return model


def model_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """transformers' logits [T, V]."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def model_greedy(model: PreTrainedModel, ids: list[int], num_tokens: int) -> list[int]:
    """transformers' greedy continuation, whole prefix each step."""
    answer: list[int] = []
    for _ in range(num_tokens):
        answer.append(int(model_logits(model, ids + answer)[-1].argmax()))
    return answer


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (num_tokens,), generator=generator)
    return [int(i) for i in ids]

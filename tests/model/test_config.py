"""config.json in both styles of transformers, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ModelDamaged, ModelNotFound, ModelUnsupported
from orchestrator.model.config import ModelConfig
from orchestrator.model.hf_config import config_from_hf
from orchestrator.model.hf_weights import read_hf_config
from orchestrator.model.rope_config import yarn_attention_factor
from tests.model.tiny import CASES

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
}


def read(**changes: Any) -> ModelConfig:
    return config_from_hf({**BASE, **changes}, name="tiny")


def of(architecture: str, **changes: Any) -> ModelConfig:
    return read(architectures=[f"{architecture}ForCausalLM"], **changes)


def test_absent_keys_mean_the_architecture_s_defaults() -> None:
    cfg = read()
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.tie_embeddings) == (8, 2, False)
    assert (cfg.rope.kind, cfg.rope.base) == ("default", 10_000.0)
    assert cfg.full_layers == (0, 1, 2, 3)
    assert of("Qwen3").head_dim == 128
    assert of("Qwen2").qkv_bias
    assert not of("Qwen2").o_bias
    gemma = of("Gemma3", sliding_window=8)
    assert (gemma.head_dim, gemma.tie_embeddings, gemma.attention_scale) == (256, True, 1 / 16)


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("gemma")])
def test_both_styles_of_rope_mean_the_same(case: str) -> None:
    new = json.loads(CASES[case]().to_json_string(use_diff=False))
    new["architectures"] = [type(CASES[case]()).__name__.replace("Config", "ForCausalLM")]
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    params = dict(new["rope_parameters"])
    old["rope_theta"] = params.pop("rope_theta")
    params["type"] = params.pop("rope_type")
    old["rope_scaling"] = None if params["type"] == "default" else params
    assert config_from_hf(old, name="tiny") == config_from_hf(new, name="tiny")


def test_both_styles_of_gemma_rope_mean_the_same() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    common = {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 8}
    old = of(
        "Gemma3",
        **common,
        rope_theta=1e6,
        rope_local_base_freq=5000.0,
        rope_scaling=scaling,
        sliding_window_pattern=2,
    )
    nested = {
        "full_attention": {**scaling, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }
    types = ["sliding_attention", "full_attention"] * 2
    assert of("Gemma3", **common, rope_parameters=nested, layer_types=types) == old
    assert (old.rope.factor, old.rope_sliding.base) == (8.0, 5000.0)
    assert old.windows == (8, None, 8, None)
    assert (old.full_layers, old.sliding_layers) == ((1, 3), (0, 2))


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 8}, (None,) * 4),
        ({"sliding_window": 8, "use_sliding_window": True}, (None,) * 4),
        (
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 8),
        ),
        (
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] + ["full_attention"] * 3,
            },
            (8, None, None, None),
        ),
    ],
)
def test_qwen_windows(changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert of("Qwen2", **changes).windows == windows


def test_mistral_windows() -> None:
    assert of("Mistral", sliding_window=8).windows == (8,) * 4
    assert of("Mistral", sliding_window=None).windows == (None,) * 4


def test_dual_chunk_attention_is_plain_up_to_one_chunk() -> None:
    chunks = {"chunk_size": 200, "local_size": 40, "original_max_position_embeddings": 200}
    assert of("Qwen2", dual_chunk_attention_config=chunks).max_context_tokens == 160


def test_yarn_attention_factor() -> None:
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(4.0) == pytest.approx(1.138629)
    assert yarn_attention_factor(4.0, mscale=1.0, mscale_all_dim=1.0) == 1.0


SLIDING = ["full_attention", "sliding_attention"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architecture MixtralForCausalLM"),
        ({"architectures": None}, "architecture not named"),
        ({"architectures": ["LlamaForCausalLM", "Other"]}, "architecture LlamaForCausalLM, Other"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"hidden_act": None}, "activation None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "rope type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "shift": 1}}, "linear 'shift'"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2]}}, "mrope_section"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"num_local_experts": 8}, "'num_local_experts' = 8"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping'"),
        ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping'"),
        ({"sliding_window": 8}, "'sliding_window' = 8"),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": SLIDING, "sliding_window": 8},
            "layer_types of tiny mixes",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": SLIDING}, "window is needed"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["chunked_attention"] * 4},
            "chunked_attention",
        ),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "use_bid"),
        ({"head_dim": 7}, "head_dim 7 of tiny is odd"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelUnsupported, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": -3}, "vocab_size .* is -3"),
        ({"num_key_value_heads": 4}, "6 query heads of tiny cannot share 4"),
        ({"rope_scaling": {"type": "linear"}}, "linear of tiny has no factor"),
    ],
)
def test_damaged_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelDamaged, match=message):
        read(**changes)


def test_inert_keys_pass() -> None:
    harmless = {"torch_dtype": "bfloat16", "_flash": True, "foo": None, "bar": False}
    assert read(**harmless, auto_map={"AutoConfig": "evil.Config"}) == read()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json does not exist"):
        read_hf_config(tmp_path)
    path = tmp_path / "config.json"
    for text in ('{"a": ', "[]", '"x"'):
        path.write_text(text)
        with pytest.raises(ModelDamaged, match=r"config\.json"):
            read_hf_config(tmp_path)
    path.write_text(json.dumps({**BASE, "num_key_value_heads": "two"}))
    with pytest.raises(ModelDamaged, match="wrong kind"):
        read_hf_config(tmp_path)

"""Weights and configuration from a Hugging Face directory: config.json and safetensors.

Owns which files are read and the tensor names in them, and reads shard by shard. Refuses every
other weight format (pickles above all) and never runs code that the directory brings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from orchestrator.errors import ModelDamaged, ModelNotFound, ModelUnsupported
from orchestrator.model.config import ModelConfig
from orchestrator.model.hf_config import config_from_hf
from orchestrator.model.layers import ModelWeights
from orchestrator.model.shard import ModelShard, whole_model
from orchestrator.model.weights import Names, WeightSink

_LAYER = "model.layers.{}."
_NAMES: Names = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "attn_norm": _LAYER + "input_layernorm",
    "mlp_norm": _LAYER + "post_attention_layernorm",
    "q": _LAYER + "self_attn.q_proj",
    "k": _LAYER + "self_attn.k_proj",
    "v": _LAYER + "self_attn.v_proj",
    "o": _LAYER + "self_attn.o_proj",
    "q_norm": _LAYER + "self_attn.q_norm",
    "k_norm": _LAYER + "self_attn.k_norm",
    "gate": _LAYER + "mlp.gate_proj",
    "up": _LAYER + "mlp.up_proj",
    "down": _LAYER + "mlp.down_proj",
}
_GEMMA_NAMES: Names = {
    **_NAMES,
    "post_attn_norm": _LAYER + "post_attention_layernorm",
    "mlp_norm": _LAYER + "pre_feedforward_layernorm",
    "post_mlp_norm": _LAYER + "post_feedforward_layernorm",
}
# Frequencies that old checkpoints carry; they are computed from the configuration.
_IGNORED = "rotary_emb.inv_freq"


def read_hf_config(directory: Path) -> ModelConfig:
    """Return the configuration of the model in `directory`; raises a ModelError."""
    raw = read_json(directory / "config.json")
    try:
        return config_from_hf(raw, name=directory.name)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelDamaged(
            f"config.json of {directory.name} has a value of the wrong kind ({error}); "
            "fetch the model again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raises ModelNotFound or ModelDamaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path} does not exist; fetch the model again") from error
    except (OSError, ValueError) as error:
        raise ModelDamaged(f"{path} cannot be read ({error}); fetch the model again") from error
    if not isinstance(raw, dict):
        raise ModelDamaged(f"{path} holds a {type(raw).__name__}, not an object; fetch it again")
    return raw


def find_weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model: those that the index names, or the single one."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        files = [directory / Path(str(name)).name for name in names]
    else:
        files = [directory / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ModelNotFound(
            f"weights {missing[0] if missing else 'in ' + index.name} of {directory.name} are "
            "missing; weights are read from safetensors alone; fetch the model again"
        )
    return files


def load_hf_weights(
    directory: Path,
    cfg: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: ModelShard | None = None,
) -> ModelWeights:
    """Return the weights in `directory`, or a shard of them, converted to `dtype` on `device`."""
    names = _GEMMA_NAMES if cfg.gemma_norms else _NAMES
    source = directory.name
    sink = WeightSink(cfg, names, dtype=dtype, device=device, source=source, shard=shard)
    tied_copies: list[Path] = []
    for path in find_weight_files(directory):
        try:
            if _load_file(path, sink, cfg):
                tied_copies.append(path)
        except (SafetensorError, OSError) as error:
            raise ModelDamaged(
                f"{path.name} of {directory.name} is cut or damaged at "
                f"{path.stat().st_size} bytes ({error}); fetch the model again"
            ) from error
    weights = sink.finish()
    for path in tied_copies:
        _check_tied_copy(path, weights, shard or whole_model(cfg))
    return weights


def _load_file(path: Path, sink: WeightSink, cfg: ModelConfig) -> bool:
    """Copy what is held of every tensor of one file; return whether it holds a copy of tied
    embeddings.
    """
    has_copy = False
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            if name.endswith(_IGNORED):
                continue
            if name == "lm_head.weight" and cfg.tie_embeddings:
                has_copy = True
                continue
            stored = file.get_slice(name)
            slot = sink.take(name, tuple(stored.get_shape()))
            tensor = stored[slot.rows]
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise ModelUnsupported(
                    f"tensor {name} of {cfg.name} is {tensor.dtype}; supported: float32, float16, "
                    "bfloat16; use a checkpoint that is not quantised"
                )
            slot.target.copy_(tensor)
            if cfg.gemma_norms and slot.part.endswith("norm"):
                slot.target.add_(1.0)
    return has_copy


def _check_tied_copy(path: Path, weights: ModelWeights, shard: ModelShard) -> None:
    """A tied model may carry its embedding a second time; it must be the same matrix."""
    with safe_open(path, framework="pt") as file:
        head = file.get_slice("lm_head.weight")[shard.vocab.own].to(weights.embedding)
    if not torch.equal(head, weights.embedding):
        raise ModelUnsupported(
            f"lm_head.weight of {path.parent.name} differs from its embedding; with "
            "tie_word_embeddings both must be one matrix; set it to false in config.json"
        )

"""Random weights with the dimensions of known models."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from orchestrator.errors import ModelNotFound
from orchestrator.model.config import ModelConfig
from orchestrator.model.decoder import Decoder
from orchestrator.model.shapes import SHAPES, random_weights, shape_config
from tests.model.dense import dense_logits

CPU = torch.device("cpu")


def num_parameters(cfg: ModelConfig) -> int:
    per_layer = (cfg.num_heads * 2 + cfg.num_kv_heads * 2) * cfg.head_dim * cfg.model_dim
    per_layer += 3 * cfg.mlp_dim * cfg.model_dim
    heads = 1 if cfg.tie_embeddings else 2
    return cfg.num_layers * per_layer + heads * cfg.vocab_size * cfg.model_dim


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-8b", 8.03),
        ("llama-3.3-70b", 70.55),
        ("qwen2.5-7b-1m", 7.61),
        ("qwen3-32b", 32.76),
    ],
)
def test_dimensions_add_up_to_the_published_size(name: str, billions: float) -> None:
    assert num_parameters(shape_config(f"shape:{name}")) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("name", ["gpt-5", "llama-3.1-8b@0", "llama-3.1-8b@33", "qwen3-32b@x"])
def test_unknown_shapes_are_named(name: str) -> None:
    with pytest.raises(ModelNotFound, match="use"):
        shape_config(f"shape:{name}")


def shrink(name: str) -> ModelConfig:
    """A few layers of a shape, narrow enough for a test."""
    cfg = shape_config(f"shape:{name}@6")
    return dataclasses.replace(cfg, model_dim=64, mlp_dim=96, head_dim=8, vocab_size=256)


@pytest.mark.parametrize("name", SHAPES)
def test_activations_stay_finite_and_seeds_repeat(name: str) -> None:
    cfg = shrink(name)
    weights = random_weights(cfg, dtype=torch.bfloat16, device=CPU)
    logits = dense_logits(Decoder(cfg, weights), list(range(40)))
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    again = random_weights(cfg, dtype=torch.bfloat16, device=CPU)
    other = random_weights(cfg, dtype=torch.bfloat16, device=CPU, seed=1)
    assert torch.equal(weights.layers[3].down, again.layers[3].down)
    assert not torch.equal(weights.layers[3].down, other.layers[3].down)
    assert not torch.equal(weights.layers[2].down, weights.layers[3].down)

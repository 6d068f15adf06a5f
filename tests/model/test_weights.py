"""Safetensors directories: shards, ties, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.errors import ModelDamaged, ModelError, ModelNotFound, ModelUnsupported
from orchestrator.model.fingerprint import fingerprint_files
from orchestrator.model.hf_weights import find_weight_files, load_hf_weights, read_hf_config
from orchestrator.model.layers import ModelWeights
from tests.model.tiny import save_model

FILE = "model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def load(directory: Path) -> ModelWeights:
    cfg = read_hf_config(directory)
    return load_hf_weights(directory, cfg, dtype=torch.float32, device=torch.device("cpu"))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a saved model in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / FILE).items()}
    change(tensors)
    save_file(tensors, directory / FILE)


def test_parts_are_fused_in_their_order(tmp_path: Path) -> None:
    model = save_model("qwen3-biases-tied", tmp_path)
    state, weights = model.state_dict(), load(tmp_path)
    layer, prefix = weights.layers[1], "model.layers.1."
    for fused, names in (
        (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (layer.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
    ):
        parts = [state[f"{prefix}{name}.weight"] for name in names]
        torch.testing.assert_close(fused, torch.cat(parts), rtol=0, atol=0)
    assert layer.qk_norm is not None
    assert torch.equal(layer.qk_norm[:6], state[prefix + "self_attn.q_norm.weight"].expand(6, 8))
    assert weights.lm_head is weights.embedding


def test_shards_give_what_one_file_gives(tmp_path: Path) -> None:
    save_model("gemma3", tmp_path / "one")
    save_model("gemma3", tmp_path / "many", max_shard_size="40KB")
    assert len(find_weight_files(tmp_path / "many")) > 3
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert torch.equal(one.layers[5].down, many.layers[5].down)
    assert torch.equal(one.final_norm, many.final_norm)
    assert torch.equal(one.embedding, many.embedding)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_model("llama", tmp_path, max_shard_size="40KB")
    gone = find_weight_files(tmp_path)[1]
    gone.unlink()
    with pytest.raises(ModelNotFound, match=gone.name):
        load(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_files_is_named(index: object, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match="safetensors"):
        load(tmp_path)


def test_pickled_weights_are_not_looked_at(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    (tmp_path / FILE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match="safetensors alone"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(QUERY), ModelDamaged, f"{QUERY} of .* is missing, 1 in all"),
        (lambda t: t.update(extra=torch.ones(3)), ModelDamaged, "extra of .* is unexpected"),
        (
            lambda t: t.update({QUERY: torch.ones(48, 47)}),
            ModelDamaged,
            r"shape \[48, 47\].*\[48, 48\]",
        ),
        (
            lambda t: t.update({QUERY: torch.ones(48, 48, dtype=torch.int8)}),
            ModelUnsupported,
            "torch.int8",
        ),
    ],
)
def test_wrong_tensors_are_named(
    change: Callable[[dict[str, Tensor]], object],
    error: type[ModelError],
    message: str,
    tmp_path: Path,
) -> None:
    save_model("llama", tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(error, match=message):
        load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_cut_file_is_named(share: float, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    path = tmp_path / FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelDamaged, match=r"model\.safetensors .* cut or damaged at \d+ bytes"):
        load(tmp_path)


def test_old_frequency_tensors_are_left_out(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, lambda t: t.update({name: torch.ones(4)}))
    assert len(load(tmp_path).layers) == 4


def test_a_tied_model_may_carry_its_head_but_no_other(tmp_path: Path) -> None:
    save_model("llama-linear-biases-tied", tmp_path)
    rewrite(
        tmp_path,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    assert load(tmp_path).lm_head.shape == (300, 48)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ModelUnsupported, match="differs from its embedding"):
        load(tmp_path)


def test_fingerprint_follows_bytes_and_their_division(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"12")
    second.write_bytes(b"3")
    before = fingerprint_files([first, second])
    first.write_bytes(b"1")
    second.write_bytes(b"23")
    assert fingerprint_files([first, second]) != before
    copy = tmp_path / "elsewhere"
    copy.write_bytes(b"1")
    assert fingerprint_files([first]) == fingerprint_files([copy])

"""The decoder against transformers, for every architecture and both file formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.model.decoder import Decoder
from orchestrator.model.hf_weights import load_hf_weights, read_hf_config
from tests.model.dense import DenseCache, dense_greedy, dense_logits
from tests.model.tiny import CASES, model_greedy, model_logits, prompt, save_model

CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    cfg = read_hf_config(directory)
    return Decoder(cfg, load_hf_weights(directory, cfg, dtype=dtype, device=CPU))


@pytest.mark.parametrize("case", CASES)
def test_same_logits_and_tokens_as_transformers(case: str, tmp_path: Path) -> None:
    model = save_model(case, tmp_path)
    decoder = load(tmp_path)
    for num_tokens in (1, 17, 90):
        ids = prompt(num_tokens)
        diff = (dense_logits(decoder, ids) - model_logits(model, ids)).abs().max()
        assert diff <= 1e-4
    ids = prompt(17, seed=1)
    assert dense_greedy(decoder, ids, 64) == model_greedy(model, ids, 64)


@pytest.mark.parametrize("case", ["llama-llama3-one-kv-head", "gemma3", "qwen2-mixed-yarn"])
def test_chunks_do_not_change_the_logits(case: str, tmp_path: Path) -> None:
    save_model(case, tmp_path)
    decoder, ids = load(tmp_path), prompt(90)
    cache = DenseCache(decoder.cfg)
    parts = [cache.forward(decoder, ids[start : start + 32]) for start in range(0, 90, 32)]
    with torch.inference_mode():
        chunked = decoder.logits(torch.cat(parts))
    assert (chunked - dense_logits(decoder, ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("case", ["llama", "qwen3-biases-tied", "gemma3"])
def test_bfloat16_stays_near_float32(case: str, tmp_path: Path) -> None:
    save_model(case, tmp_path)
    ids = prompt(40)
    exact, rounded = load(tmp_path), load(tmp_path, torch.bfloat16)
    assert rounded.weights.layers[0].qkv.dtype == torch.bfloat16
    assert rounded.weights.layers[0].attn_norm.dtype == torch.float32
    logits = dense_logits(rounded, ids)
    assert logits.dtype == torch.float32
    exact_logits = dense_logits(exact, ids)
    assert (logits - exact_logits).norm() <= 0.05 * exact_logits.norm()


def test_positions_and_not_order_decide(tmp_path: Path) -> None:
    """Rows of one forward are independent but for `attend`: a permutation moves nothing else."""
    save_model("llama-yarn-wide-heads", tmp_path)
    decoder = load(tmp_path)
    ids, positions = torch.tensor(prompt(12)), torch.arange(100, 112)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    seen: list[list[torch.Tensor]] = []

    def attend(layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen[-1].append(torch.cat((q, k), 1))
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    with torch.inference_mode():
        seen.append([])
        straight = decoder.forward(ids, positions, attend)
        seen.append([])
        permuted = decoder.forward(ids[order], positions[order], attend)
    torch.testing.assert_close(permuted, straight[order], atol=1e-5, rtol=1e-5)
    for first, second in zip(*seen, strict=True):
        torch.testing.assert_close(second, first[order], atol=1e-5, rtol=1e-5)

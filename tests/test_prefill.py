"""Prefill into memory: chunks, segments, and that an ingest computes no more than it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kv_store import Layout
from orchestrator.model.load import LoadedModel, load_model
from orchestrator.prefill import Prefill
from sparse_attn.api import find_backend
from sparse_attn.select.centroid_build import CentroidParams
from tests.tiny_model import SEGMENT_TOKENS, save_tiny_model

NUM_TOKENS = 2 * SEGMENT_TOKENS + 40


def make_layout(
    model: LoadedModel, *, kv_dtype: str = "float32", dtype: str = "bfloat16"
) -> Layout:
    cfg = model.cfg
    return Layout(
        num_tokens=NUM_TOKENS,
        segment_tokens=SEGMENT_TOKENS,
        sinks=4,
        window=64,
        num_full_layers=len(cfg.full_layers),
        num_sliding_layers=len(cfg.sliding_layers),
        sliding_window=max((w for w in cfg.windows if w is not None), default=0),
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        kv_dtype=kv_dtype,
        dtype=dtype,
    )


def make_prefill(model: LoadedModel) -> Prefill:
    layout = make_layout(model)
    return Prefill(model.decoder, find_backend("torch"), layout, clusters=CentroidParams())


def run(
    model: LoadedModel, *, chunk_tokens: int, is_whole: bool
) -> list[dict[int, dict[str, Tensor]]]:
    """Every segment's tensors, from `forward` (whole) or `fill`."""
    prefill = make_prefill(model)
    ids = torch.randint(0, 250, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    segments = []
    for segment_idx in range(prefill.layout.num_segments):
        start, stop = prefill.layout.segment_span(segment_idx)
        for first in range(start, stop, chunk_tokens):
            chunk = ids[first : min(first + chunk_tokens, stop)]
            (prefill.forward if is_whole else prefill.fill)(chunk, first)
        segments.append(prefill.build(segment_idx))
        prefill.append(segment_idx, segments[-1])
    return segments


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_filling_keeps_the_very_keys_that_a_whole_forward_keeps(tmp_path: Path, case: str) -> None:
    model = load_model(str(save_tiny_model(tmp_path, case)))
    whole, filled = (run(model, chunk_tokens=100, is_whole=flag) for flag in (True, False))
    for a, b in zip(whole, filled, strict=True):
        for head_a, head_b in zip(a.values(), b.values(), strict=True):
            assert head_a.keys() == head_b.keys()
            assert all(torch.equal(head_a[name], head_b[name]) for name in head_a)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_chunks_change_keys_by_rounding_alone(tmp_path: Path, case: str) -> None:
    model = load_model(str(save_tiny_model(tmp_path, case)))
    large, small = (run(model, chunk_tokens=tokens, is_whole=False)[0] for tokens in (256, 37))
    for head_large, head_small in zip(large.values(), small.values(), strict=True):
        by_token = [
            head["k"].gather(
                1, head["positions"].long().argsort(1).unsqueeze(2).expand_as(head["k"])
            )
            for head in (head_large, head_small)
        ]
        torch.testing.assert_close(by_token[0], by_token[1], atol=1e-4, rtol=0)

"""Clustering over context ranks: whoever clusters a head of a layer, all get one rank's tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from collectives import Group, Mesh, run_threads
from kv_store import Layout
from orchestrator.model.load import LoadedModel, load_model
from orchestrator.place import Place, take_place
from orchestrator.prefill import Prefill
from orchestrator.sealing import cluster_segment
from sparse_attn.api import find_backend
from sparse_attn.select.centroid_build import CentroidParams
from tests.tiny_model import SEGMENT_TOKENS, save_tiny_model

PARAMS = CentroidParams()


def sealed(model: LoadedModel, place: Place, k: Tensor, v: Tensor) -> dict[int, dict[str, Tensor]]:
    """What a rank builds of segment 0 where the open segment holds these keys."""
    cfg = model.cfg
    layout = Layout(
        num_tokens=SEGMENT_TOKENS,
        segment_tokens=SEGMENT_TOKENS,
        sinks=4,
        window=64,
        num_full_layers=len(cfg.full_layers),
        num_sliding_layers=0,
        sliding_window=0,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        kv_dtype="float32",
    )
    prefill = Prefill(model.decoder, find_backend("torch"), layout, clusters=PARAMS, place=place)
    heads = slice(place.kv_heads.start, place.kv_heads.stop)
    prefill._attention.open_k.copy_(k[:, heads])
    prefill._attention.open_v.copy_(v[:, heads])
    return prefill.build(0)


@pytest.mark.parametrize("mesh", ["1x2", "2x1", "1x3", "2x2", "1x8"])
def test_the_owner_writes_one_ranks_tables(tmp_path: Path, mesh: str) -> None:
    model = load_model(str(save_tiny_model(tmp_path, "llama")))
    cfg = model.cfg
    generator = torch.Generator().manual_seed(0)
    shape = (cfg.num_layers, cfg.num_kv_heads, SEGMENT_TOKENS, cfg.head_dim)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    wanted = cluster_segment(k, v, (4, SEGMENT_TOKENS - 64), PARAMS)
    heads, context = map(int, mesh.split("x"))

    def work(group: Group) -> dict[int, dict[str, Tensor]]:
        place = take_place(
            Mesh(heads=heads, context=context),
            group,
            num_heads=cfg.num_heads,
            num_kv_heads=cfg.num_kv_heads,
        )
        return sealed(model, place, k, v)

    written = {
        head: tensors
        for built in run_threads(heads * context, work)
        for head, tensors in built.items()
        if tensors
    }
    assert sorted(written) == list(range(cfg.num_kv_heads))
    for head, tensors in written.items():
        order = wanted["order"][:, head]
        assert torch.equal(tensors["positions"], order.int())
        assert torch.equal(tensors["k"], k[:, head].gather(1, order[..., None].expand_as(k[:, 0])))
        for name in wanted.keys() - {"order"}:
            assert torch.equal(tensors[name], wanted[name][:, head]), name

"""Shards of a model: they add up to the whole, and compute as the whole does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectives import Group, Mesh, MeshInvalid, parse_mesh, run_threads
from orchestrator.model.gguf_file import open_gguf
from orchestrator.model.gguf_weights import load_gguf_weights, read_gguf_config
from orchestrator.model.hf_weights import load_hf_weights, read_hf_config
from orchestrator.model.load import LoadedModel, Loading, load_model
from orchestrator.model.shapes import random_weights
from orchestrator.model.shard import Columns, cut_model
from sparse_attn.api import find_backend
from tests.model.gguf_files import GGUF_CASES, write_gguf
from tests.model.test_shapes import shrink
from tests.model.tiny import save_model
from tests.tiny_model import save_tiny_model

CPU = torch.device("cpu")
MESHES = ("1x2", "1x3", "2x1", "2x2", "1x8")


@given(total=st.integers(1, 500), size=st.integers(1, 12))
def test_columns_cover_everything_once(total: int, size: int) -> None:
    ranks = [Columns(total=total, size=size, rank=rank) for rank in range(size)]
    covered = [i for c in ranks for i in range(c.own.start, c.own.stop)]
    assert covered == list(range(total))
    for columns in ranks:
        assert columns.pieces[0] == 0
        assert columns.pieces[-1] == columns.width == columns.widths[columns.rank]


@given(total=st.integers(1, 500))
def test_pieces_are_the_same_on_every_number_of_ranks_that_divides_8(total: int) -> None:
    def pieces(size: int) -> list[tuple[int, int]]:
        found = []
        for rank in range(size):
            columns = Columns(total=total, size=size, rank=rank)
            first = columns.own.start
            edges = [first + edge for edge in columns.pieces]
            found += list(pairwise(edges))
        return found

    assert pieces(1) == pieces(2) == pieces(4) == pieces(8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama-linear-biases-tied")


def load(path: Path, mesh: str, group: Group, **options: object) -> LoadedModel:
    loading = Loading(mesh=parse_mesh(mesh), group=group, **options)  # type: ignore[arg-type]
    return load_model(str(path), loading)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_row_is_loaded_by_its_ranks_alone(model: Path, mesh: str) -> None:
    whole = load_model(str(model)).decoder.weights
    num_ranks = parse_mesh(mesh).num_ranks
    shards = run_threads(num_ranks, lambda g: load(model, mesh, g).decoder.weights)
    for i, layer in enumerate(whole.layers):
        for name in ("o", "o_bias", "down", "down_bias"):
            rows = torch.cat([getattr(shard.layers[i], name) for shard in shards])
            assert torch.equal(rows, getattr(layer, name))
        for part, own in enumerate(layer.gate_up.chunk(2)):
            rows = torch.cat([shard.layers[i].gate_up.chunk(2)[part] for shard in shards])
            assert torch.equal(rows, own)
    assert torch.equal(torch.cat([shard.embedding for shard in shards]), whole.embedding)
    bytes_of_shards = sum(shard.layers[0].down.nbytes for shard in shards)
    assert bytes_of_shards == whole.layers[0].down.nbytes


@pytest.mark.parametrize("mesh", MESHES)
def test_head_groups_hold_their_heads(model: Path, mesh: str) -> None:
    cfg = load_model(str(model)).cfg
    grid = parse_mesh(mesh)
    whole = load_model(str(model)).decoder.weights.layers[0].qkv
    D, H, G = cfg.head_dim, cfg.num_heads, cfg.num_kv_heads
    shards = run_threads(grid.num_ranks, lambda g: load(model, mesh, g).decoder)
    for rank, decoder in enumerate(shards):
        shard = cut_model(cfg, grid, rank)
        q = whole[shard.heads.start * D : shard.heads.stop * D]
        keys, values = whole[H * D : (H + G) * D], whole[(H + G) * D :]
        own = slice(shard.kv_heads.start * D, shard.kv_heads.stop * D)
        k, v = keys[own], values[own]
        assert torch.equal(decoder.weights.layers[0].qkv, torch.cat([q, k, v]))


@pytest.mark.parametrize("mesh", ["1x2", "2x2"])
@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf_weights_are_cut_where_the_directorys_are(
    case: str, mesh: str, tmp_path: Path
) -> None:
    saved = save_model(case, tmp_path / "hf")
    cfg = read_hf_config(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", saved, cfg)
    if cfg.num_kv_heads % parse_mesh(mesh).heads:
        pytest.skip("the head axis does not divide the KV heads")
    for rank in range(parse_mesh(mesh).num_ranks):
        shard = cut_model(cfg, parse_mesh(mesh), rank)
        theirs = load_hf_weights(tmp_path / "hf", cfg, dtype=torch.float32, device=CPU, shard=shard)
        file = open_gguf(tmp_path / "model.gguf")
        ours = load_gguf_weights(
            file, read_gguf_config(file), dtype=torch.float32, device=CPU, shard=shard
        )
        assert torch.equal(ours.embedding, theirs.embedding)
        for one, other in zip(ours.layers, theirs.layers, strict=True):
            for name in ("qkv", "o", "gate_up", "down", "attn_norm"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("mesh", ["1x2", "2x2"])
def test_random_weights_of_a_shard_are_those_of_the_whole(mesh: str) -> None:
    cfg = shrink("llama-3.1-8b")
    whole = random_weights(cfg, dtype=torch.float32, device=CPU)
    grid = parse_mesh(mesh)
    shards = [cut_model(cfg, grid, rank) for rank in range(grid.num_ranks)]
    weights = [random_weights(cfg, dtype=torch.float32, device=CPU, shard=s) for s in shards]
    for name in ("o", "down"):
        rows = torch.cat([getattr(w.layers[0], name) for w in weights])
        assert torch.equal(rows, getattr(whole.layers[0], name))
    assert torch.equal(torch.cat([w.lm_head for w in weights]), whole.lm_head)
    D = cfg.head_dim
    for shard, own in zip(shards, weights, strict=True):
        queries = whole.layers[0].qkv[shard.heads.start * D : shard.heads.stop * D]
        assert torch.equal(own.layers[0].qkv[: len(shard.heads) * D], queries)


def dense_logits_of(path: Path, mesh: str, group: Group, *, is_split: bool) -> torch.Tensor:
    backend = find_backend("native")
    model = load(
        path,
        mesh,
        group,
        linear=backend.linear,
        linear_split=backend.linear_split if is_split else None,
    )
    cfg, generator = model.cfg, torch.Generator().manual_seed(0)
    fixed = torch.randn(11, cfg.num_heads, cfg.head_dim, generator=generator)

    def attend(layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fixed * (1 + layer_idx)

    ids = torch.arange(11) * 17 % 250
    with torch.inference_mode():
        hidden = model.decoder.forward(ids, torch.arange(11), attend)
        return model.decoder.logits(hidden)


@pytest.mark.parametrize("case", ["llama-linear-biases-tied", "gemma3", "qwen2"])
@pytest.mark.parametrize("mesh", MESHES)
def test_products_of_shards_are_products_of_the_whole(case: str, mesh: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, case)
    num_ranks = parse_mesh(mesh).num_ranks
    if parse_mesh(mesh).heads > load_model(str(path)).cfg.num_kv_heads:
        pytest.skip("more head groups than KV heads")
    (whole,) = run_threads(1, lambda g: dense_logits_of(path, "1x1", g, is_split=True))
    ours = run_threads(num_ranks, lambda g: dense_logits_of(path, mesh, g, is_split=True))
    assert all(torch.equal(rank, ours[0]) for rank in ours)
    torch.testing.assert_close(ours[0], whole, atol=1e-4, rtol=1e-5)
    if 8 % num_ranks == 0:
        assert torch.equal(ours[0], whole)


def test_a_mesh_that_does_not_fit_is_refused(model: Path) -> None:
    with pytest.raises(MeshInvalid, match="limit a divisor of the model's 2 KV heads"):
        cut_model(load_model(str(model)).cfg, Mesh(heads=3, context=1), 0)

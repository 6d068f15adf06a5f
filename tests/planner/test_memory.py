"""Bytes of shards against the tensors themselves, and against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from collectives.mesh import Mesh
from kv_store import Holding, ResidentDocument
from orchestrator.model.config import ModelConfig
from orchestrator.model.layers import ModelWeights
from orchestrator.model.shapes import SHAPES, random_weights, shape_config
from orchestrator.model.shard import cut_model
from orchestrator.planner.ingest_buffers import cluster_phases
from orchestrator.planner.memory import (
    HEAP_BLOCK_BYTES,
    ingest_memory,
    kv_bytes,
    peak_bytes,
    question_memory,
    staging_bytes,
    weight_bytes,
)
from orchestrator.planner.shards import matrix_share, slot_share
from orchestrator.planner.workload import ClusterRule
from sparse_attn.select.centroid_build import CentroidParams, build
from tests.planner.machines import CENTROID, EXACT, LLAMA, choice, cpu_machine, machine, workload

CPU = torch.device("cpu")
meshes = st.sampled_from(["1x1", "2x1", "1x2", "4x1", "2x2", "1x4", "1x3", "8x1", "2x4"])


def tiny(name: str) -> ModelConfig:
    cfg = shape_config(f"shape:{name}@2")
    return replace(cfg, model_dim=64, mlp_dim=100, head_dim=8, vocab_size=259)


@pytest.mark.parametrize("mesh", ["1x1", "2x1", "1x2", "2x2", "1x3"])
@pytest.mark.parametrize("name", SHAPES)
def test_weights_of_a_shard_are_as_many_bytes_as_its_tensors(name: str, mesh: str) -> None:
    cfg, grid = tiny(name), choice(mesh).mesh
    for rank in range(grid.num_ranks):
        shard = cut_model(cfg, grid, rank)
        weights = random_weights(cfg, dtype=torch.bfloat16, device=CPU, shard=shard)
        layers = [
            getattr(layer, name)
            for layer in weights.layers
            for name in layer.__slots__
            if getattr(layer, name) is not None
        ]
        tensors = {id(x): x for x in (*layers, *_ends(weights))}
        held = sum(x.nbytes for x in tensors.values())
        assert weight_bytes(workload(cfg=cfg), grid, rank, 2) == held


def _ends(weights: ModelWeights) -> tuple[Tensor, ...]:
    return weights.embedding, weights.lm_head, weights.final_norm


@given(meshes, st.integers(1, 9000))
@settings(deadline=None, max_examples=40)
def test_shards_add_up_to_the_whole_within_replication(mesh: str, num_tokens: int) -> None:
    work, grid, alone = workload(num_tokens), choice(mesh).mesh, Mesh(heads=1, context=1)
    ranks = range(grid.num_ranks)
    shares = [matrix_share(LLAMA, grid, rank) for rank in ranks]
    whole = matrix_share(LLAMA, alone, 0)
    assert sum(share.qkv for share in shares) == grid.context * whole.qkv
    assert [sum(getattr(s, name) for s in shares) for name in ("o", "gate_up", "down")] == [
        whole.o,
        whole.gate_up,
        whole.down,
    ]
    assert sum(share.embedding for share in shares) == whole.embedding
    slots = slot_share(work.layout("bfloat16"), grid, work.clusters)
    assert sum(slots.held) == num_tokens * LLAMA.num_kv_heads
    kv = [kv_bytes(work, grid, rank, "bfloat16", 2) for rank in ranks]
    assert sum(kv) == kv_bytes(work, alone, 0, "bfloat16", 2)
    assert sum(kv) == work.layout("bfloat16").kv_bytes


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("mesh", ["1x1", "1x2", "2x2"])
def test_kv_is_as_many_bytes_as_the_resident_document(mesh: str, kv_dtype: str) -> None:
    cfg, grid = tiny("llama-3.1-8b"), choice(mesh).mesh
    work = replace(workload(700, cfg=cfg, segment_tokens=256), kv_dtype=kv_dtype)
    layout = work.layout("bfloat16")
    for rank in range(grid.num_ranks):
        heads = grid.kv_heads_of(rank, num_kv_heads=layout.num_kv_heads)
        held = [
            tuple(s for s in range(layout.num_segments) if _owner(grid, s, head) == rank)
            for head in heads
        ]
        holding = Holding(layout=layout, first_kv_head=heads.start, segments=tuple(held))
        resident = ResidentDocument(holding, dtype=torch.bfloat16, device="cpu")
        assert kv_bytes(work, grid, rank, "bfloat16", 2) == resident.num_bytes


def _owner(grid: Mesh, segment_idx: int, head: int) -> int:
    return grid.owner_of(segment_idx=segment_idx, kv_head_idx=head, num_kv_heads=8)


@pytest.mark.parametrize("num_tokens", [1, 3, 63, 256, 300])
def test_columns_of_the_cluster_tables_are_those_that_are_built(num_tokens: int) -> None:
    rule, params = ClusterRule(), CentroidParams()
    for length in (None, 100, 8192, 131_072, 1_048_576):
        own, theirs = rule, params
        if length is not None:
            own, theirs = rule.for_document(length), params.for_document(length)
        assert {name: getattr(own, name) for name in own.__slots__} == theirs.to_dict()
    x = torch.randn(2, num_tokens, 8, generator=torch.Generator().manual_seed(0))
    built = build(x, x, num_sinks=0, num_window=0, params=params)
    assert built["centroids"].shape[1] == rule.columns_of(num_tokens)
    assert built["group_centroids"].shape[1] == rule.groups_of(num_tokens)


def test_a_heap_keeps_what_any_phase_had_and_large_blocks_go_back() -> None:
    small, large = HEAP_BLOCK_BYTES // 2, 2 * HEAP_BLOCK_BYTES
    phases = [(small, small, small), (small, large)]
    assert peak_bytes(phases, is_cpu=False) == small + large
    assert peak_bytes(phases, is_cpu=True) == 3 * small + large


@given(meshes, st.integers(1, 60_000), st.integers(1, 60_000))
@settings(deadline=None, max_examples=40)
def test_more_tokens_need_more_memory(mesh: str, first: int, second: int) -> None:
    short, long = sorted((first, second))
    for reading in (EXACT, CENTROID):
        way = choice(mesh, reading=reading)
        for memory in (ingest_memory, question_memory):
            small, large = (memory(workload(n), way, machine(8)).tensors for n in (short, long))
            assert small <= large


def test_a_process_is_more_than_its_tensors_and_reads_weights_from_a_file() -> None:
    work = replace(workload(256), weights_file_bytes=1 << 30)
    use = question_memory(work, choice(threads=2), cpu_machine())
    plain = question_memory(workload(256), choice(threads=2), cpu_machine())
    assert use.total > plain.total > plain.tensors
    # A document that is larger than what loading needs uses that memory again.
    long = replace(work, num_tokens=100_000)
    assert question_memory(long, choice(threads=2), cpu_machine()) == question_memory(
        replace(long, weights_file_bytes=0), choice(threads=2), cpu_machine()
    )
    assert set(use.to_json()) >= {"weights_bytes", "kv_bytes", "total_bytes"}


def test_ranks_on_a_cpu_keep_what_collectives_staged() -> None:
    work = workload(1000)
    assert staging_bytes(work, choice("1x2"), machine()) == 0
    assert staging_bytes(work, choice("1x1"), cpu_machine()) == 0
    chunk = 512 * (LLAMA.mlp_dim + LLAMA.num_heads * LLAMA.head_dim) * 4
    assert staging_bytes(work, choice("2x1"), cpu_machine()) == 2 * chunk
    # Each of two ranks brings the tables of half of all problems, and sees those of the other.
    problems, units = LLAMA.num_kv_heads * LLAMA.num_layers, work.clusters.columns_of(1000)
    tables = problems * units * LLAMA.head_dim * 2
    assert staging_bytes(work, choice("1x2"), cpu_machine()) == 2 * (chunk + tables)


def test_clustering_is_spread_over_context_ranks_and_holds_few_distances() -> None:
    work = workload(8192)
    alone, pair = (cluster_phases(work, choice(mesh), machine()) for mesh in ("1x1", "1x2"))
    assert sum(pair[0]) < sum(alone[0])
    distances = max(cluster_phases(work, choice(), cpu_machine())[0])
    assert distances >= 8192 * (8192 // 4) * 4
    assert distances < LLAMA.num_kv_heads * LLAMA.num_layers * 8192 * (8192 // 4) * 4 // 8


def test_fp8_halves_what_is_held_and_an_ingest_widens_one_head_at_a_time() -> None:
    whole = workload(500_000)
    narrow, topology = replace(whole, kv_dtype="float8_e4m3fn"), machine(1)
    positions = 4 * LLAMA.num_layers * LLAMA.num_kv_heads * whole.num_tokens
    held = [question_memory(work, choice(), topology).kv for work in (whole, narrow)]
    assert held[1] - positions == pytest.approx((held[0] - positions) / 2, rel=1e-4)
    ingests = [ingest_memory(work, choice(), topology) for work in (whole, narrow)]
    one_head = 2 * LLAMA.head_dim * whole.num_tokens * 2
    assert 0 < ingests[1].temporary - ingests[0].temporary <= one_head
    assert narrow.layout("bfloat16").kv_bytes < 0.52 * whole.layout("bfloat16").kv_bytes

"""Predicted seconds: what must rise, what must not, and what a rank alone never waits for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.model.shapes import shape_config
from orchestrator.planner import cost as cost_module
from orchestrator.planner.cost import Cost
from orchestrator.planner.phases import (
    Pace,
    first_token_s,
    ingest_time,
    open_s,
    overlap_s,
    token_s,
    wave_stretch,
)
from orchestrator.planner.topology import Topology
from orchestrator.planner.workload import Choice, Reading, Workload
from sparse_attn.select import centroid
from tests.planner.machines import CENTROID, EXACT, choice, cpu_machine, machine, workload

meshes = st.sampled_from(["1x1", "2x1", "1x2", "4x1", "2x2", "1x4"])
readings = st.sampled_from([EXACT, CENTROID])


def cost(work: Workload, way: Choice, topology: Topology | None = None) -> Cost:
    return Cost(workload=work, choice=way, topology=topology or machine())


def seconds(each: Cost) -> list[float]:
    return [ingest_time(each).total_s, open_s(each), first_token_s(each), token_s(each)]


@given(meshes, readings, st.integers(1, 40_000), st.integers(1, 40_000))
@settings(deadline=None, max_examples=60)
def test_more_tokens_take_longer(mesh: str, reading: Reading, first: int, second: int) -> None:
    short, long = sorted((first, second))
    way = choice(mesh, reading=reading)
    for less, more in zip(
        seconds(cost(workload(short), way)), seconds(cost(workload(long), way)), strict=True
    ):
        assert less <= more * (1 + 1e-9)


@given(st.integers(1, 200), st.integers(1, 200))
@settings(deadline=None, max_examples=30)
def test_longer_questions_take_longer(first: int, second: int) -> None:
    short, long = sorted((max(2, first), max(2, second)))
    work = workload()
    times = [first_token_s(cost(replace(work, question_tokens=n), choice())) for n in (short, long)]
    assert times[0] <= times[1] * (1 + 1e-9)


def test_a_rank_alone_waits_for_nobody() -> None:
    alone = cost(workload(), choice(), machine(links=()))
    assert alone.gathers_s(512) == alone.exchange_s(512) == 0.0
    assert alone.question_exchange_s(8) == alone.gathers_s(8, is_question=True) == 0.0
    assert alone.embedding_s(512) == alone.logits_s() == 0.0
    assert ingest_time(alone).total_s > 0


def test_ranks_share_the_work_and_wait_for_each_other() -> None:
    one, two = (cost(workload(), choice(mesh)) for mesh in ("1x1", "1x2"))
    assert two.products_s(two.matrices.o, 512) == one.products_s(one.matrices.o, 512) / 2
    # QKV is computed on every rank of a head group.
    assert two.matrices.qkv == one.matrices.qkv
    assert two.exact_attention_s(1) == pytest.approx(one.exact_attention_s(1) / 2, rel=0.1)
    assert two.gathers_s(512) > 0
    assert two.exchange_s(512) > 0
    selecting = cost(workload(), choice("1x2", reading=CENTROID))
    assert selecting.question_exchange_s(8) > two.question_exchange_s(8) > 0


def test_four_gathers_a_layer_move_heads_stream_inner_and_stream() -> None:
    each, cfg = cost(workload(), choice("4x1")), workload().cfg
    received = 3 / 4 * 512 * (4096 + 4096 + cfg.mlp_dim + 4096) * 2
    assert each.gathers_s(512) == pytest.approx(received / 1e10)


def test_contention_stretches_each_kind_of_work() -> None:
    alone, both = (
        cost(workload(), choice("1x1", threads=1), topology)
        for topology in (cpu_machine(), replace(cpu_machine(), contention=()))
    )
    assert alone.products_s(1e6, 1) == both.products_s(1e6, 1)
    two = cost(workload(), choice("1x2", threads=1), cpu_machine())
    assert two.products_s(1e6, 1) == 2.0 * alone.products_s(1e6, 1)
    assert two.products_s(1e6, 64) == 1.5 * alone.products_s(1e6, 64)


def test_halves_hide_what_the_other_half_computes() -> None:
    each = cost(workload(), choice("1x2", chunk_tokens=1024, split_tokens=512))
    halves = [Pace(compute_s=2.0, wait_s=1.0), Pace(compute_s=2.0, wait_s=1.0)]
    assert overlap_s(each, halves) == 6.0 - 0.5 * 2.0
    assert overlap_s(each, halves[:1]) == 3.0
    blind = cost(workload(), each.choice, machine(overlap_share=0.0))
    assert overlap_s(blind, halves) == 6.0


def test_halves_may_need_more_waves_of_tiles() -> None:
    each = cost(workload(), choice(), machine(num_sms=132))
    assert wave_stretch(each, 1024, [1024]) == 1.0
    assert wave_stretch(each, 256, [128, 128]) > 1.0
    assert wave_stretch(each, 16384, [8192, 8192]) == pytest.approx(1.0, abs=0.02)


def test_a_split_pays_only_where_there_is_something_to_hide() -> None:
    slow = machine(overlap_share=1.0)
    whole, halved = (
        ingest_time(
            cost(workload(), choice("1x2", chunk_tokens=1024, split_tokens=split), slow)
        ).prefill_s
        for split in (None, 512)
    )
    assert halved < whole
    alone = [
        ingest_time(cost(workload(), choice(chunk_tokens=1024, split_tokens=split))).prefill_s
        for split in (None, 512)
    ]
    assert alone[1] > alone[0]


def test_a_look_up_of_two_levels_scores_fewer_units() -> None:
    assert centroid._OPEN_FACTOR == cost_module._OPEN_FACTOR
    work = workload(200_000)
    flat, two = (
        cost(work, choice(reading=replace(CENTROID, levels=levels))).lookup_units()
        for levels in (1, 2)
    )
    assert two < flat / 4
    everything = replace(CENTROID, levels=2, keys=200_000)
    assert cost(work, choice(reading=everything)).lookup_units() > flat


def test_sliding_layers_cost_their_window() -> None:
    full = shape_config("shape:llama-3.1-8b@4")
    sliding = replace(full, windows=(512, 512, 512, None))
    for time in (lambda c: ingest_time(c).prefill_s, token_s):
        assert time(cost(workload(30_000, cfg=sliding), choice())) < time(
            cost(workload(30_000, cfg=full), choice())
        )

"""The machine's description: tables, checks, and a file that says again what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import TopologyInvalid, UsageError
from orchestrator.planner import (
    decode_topology,
    encode_topology,
    parse_machine,
    published_topology,
)
from orchestrator.planner.topology import Contention, Curve, Disk, Link
from tests.planner.machines import cpu_machine, machine, rates

positive = st.floats(min_value=1e-6, max_value=1e15, allow_nan=False)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    xs = sorted(draw(st.sets(st.integers(1, 10**6), min_size=1, max_size=6)))
    return Curve(points=tuple((float(x), draw(positive)) for x in xs))


@given(curves(), st.floats(min_value=1e-3, max_value=1e9))
def test_a_table_stays_between_its_points(curve: Curve, x: float) -> None:
    ys = [y for _, y in curve.points]
    assert min(ys) * (1 - 1e-9) <= curve.at(x) <= max(ys) * (1 + 1e-9)
    assert all(curve.at(known) == pytest.approx(y) for known, y in curve.points)


def test_a_table_is_a_power_between_points_and_flat_outside() -> None:
    curve = Curve(points=((10.0, 1.0), (1000.0, 100.0)))
    assert curve.at(100.0) == pytest.approx(10.0)
    assert curve.at(1.0) == 1.0
    assert curve.at(1e9) == 100.0


@pytest.mark.parametrize(
    "points", [(), ((1.0, 0.0),), ((2.0, 1.0), (1.0, 1.0)), ((1.0, float("nan")),), ((0.0, 1.0),)]
)
def test_a_table_that_means_nothing_is_refused(points: Any) -> None:
    with pytest.raises(TopologyInvalid, match="longspan calibrate"):
        Curve(points=points)


def test_a_call_takes_its_latency_or_its_bytes() -> None:
    link = Link(operation="all_gather", ranks=2, latency_s=1e-3, bytes_per_s=Curve.flat(1e6))
    assert link.seconds(10) == 1e-3
    assert link.seconds(1e6) == pytest.approx(1.0)


def test_threads_contention_and_links_are_those_of_the_number_of_ranks() -> None:
    cpu = cpu_machine()
    assert [cpu.threads_of(n) for n in (1, 2, 3)] == [2, 1, 1]
    assert [cpu.rates_of(threads).threads for threads in (1, 2, 8)] == [1, 2, 2]
    assert cpu.contention_of(1).stream == 1.0
    assert cpu.contention_of(2).stream == 2.0
    assert machine().threads_of(4) == 0
    assert machine().link_of("all_gather", 4).ranks == 2
    with pytest.raises(TopologyInvalid, match="limit 1 rank"):
        machine(links=()).link_of("all_gather", 2)


@given(curves(), positive, st.integers(1, 64), st.floats(0, 1))
def test_a_file_says_again_what_was_measured(
    curve: Curve, y: float, count: int, share: float
) -> None:
    topology = machine(
        count,
        overlap_share=share,
        rates=(replace(rates(), matrix_flops_per_s=curve, kv_bytes_per_s=y), rates(1)),
        contention=(Contention(ranks=count, compute=y, stream=1.5),),
    )
    assert decode_topology(encode_topology(topology), source="file") == topology


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("format"),
        lambda body: body.update(format=1),
        lambda body: body.pop("disk"),
        lambda body: body.update(surprise=1),
        lambda body: body["rates"][0].pop("threads"),
        lambda body: body["rates"][0].update(kv_bytes_per_s=-1.0),
        lambda body: body["rates"][0].update(kv_bytes_per_s="fast"),
        lambda body: body["rates"][0].update(matrix_flops_per_s=[[1.0]]),
        lambda body: body["links"].pop(),
        lambda body: body["links"][0].update(operation="shout"),
        lambda body: body.update(rates=[]),
        lambda body: body.update(dtype="int3"),
        lambda body: body.update(num_devices=0),
        lambda body: body.update(overlap_share=2.0),
    ],
)
def test_a_file_that_is_wrong_anywhere_is_refused(change: Any) -> None:
    body = json.loads(encode_topology(machine()))
    change(body)
    with pytest.raises(TopologyInvalid, match="longspan calibrate"):
        decode_topology(json.dumps(body), source="file")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "7"])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(TopologyInvalid, match="file cannot be used"):
        decode_topology(text, source="file")


def test_disks_must_move() -> None:
    with pytest.raises(TopologyInvalid):
        Disk(write_bytes_per_s=0.0, read_bytes_per_s=1.0)


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [("2xH100", "H100", 2), ("1xh200", "H200", 1), ("cpu:2", "cpu", 2), (" 4xH200 ", "H200", 4)],
)
def test_machines_have_names(text: str, kind: str, count: int) -> None:
    spec = parse_machine(text)
    assert (spec.kind, spec.num_devices) == (kind, count)
    assert parse_machine(str(spec)) == spec


@pytest.mark.parametrize("text", ["", "H100", "0xH100", "2x", "cpu", "cpu:0", "2 x H100"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="limit NxGPU or cpu:CORES"):
        parse_machine(text)


def test_published_nodes_differ_in_memory_and_its_rate() -> None:
    h100, h200 = (published_topology(parse_machine(f"4x{kind}")) for kind in ("H100", "H200"))
    assert h200.memory_bytes > h100.memory_bytes
    assert h200.rates[0].kv_bytes_per_s / h100.rates[0].kv_bytes_per_s == pytest.approx(4.8 / 3.35)
    assert decode_topology(encode_topology(h200), source="file") == h200
    for unknown in ("cpu:2", "2xA100"):
        with pytest.raises(UsageError, match=f"machine {unknown} .*H100, H200; run longspan calib"):
            published_topology(parse_machine(unknown))

"""Machines and models for planner tests: round numbers, and the shapes of every architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from collectives.mesh import Mesh
from orchestrator.model.config import ModelConfig
from orchestrator.model.shapes import shape_config
from orchestrator.planner import Choice, Reading, Topology, Workload
from orchestrator.planner.topology import (
    OPERATIONS,
    Contention,
    Curve,
    Disk,
    Link,
    Rates,
)

EXACT = Reading(mode="exact")
CENTROID = Reading(mode="centroid", keys=512)
LLAMA = shape_config("shape:llama-3.1-8b")
MIB = 1 << 20


def rates(threads: int = 0) -> Rates:
    """Every arithmetic at 1 Tflop/s from 64 rows on and every byte at 100 GB/s."""
    rising = Curve(points=((2.0, 1e11), (64.0, 1e12)))
    return Rates(
        threads=threads,
        matrix_flops_per_s=rising,
        question_flops_per_s=rising,
        attention_flops_per_s=rising,
        causal_flops_per_s=rising,
        cluster_flops_per_s=Curve.flat(1e12),
        lookup_flops_per_s=Curve.flat(1e12),
        list_units_per_s=Curve.flat(1e9),
        weight_bytes_per_s=1e11,
        kv_bytes_per_s=1e11,
        lookup_bytes_per_s=1e11,
        elementwise_bytes_per_s=1e11,
        fresh_bytes_per_s=1e10,
        exact_layer_s=1e-4,
        centroid_layer_s=2e-4,
        exact_tile_s=1.5e-4,
        centroid_tile_s=3e-4,
        run_s=1e-5,
    )


def machine(num_devices: int = 4, memory_bytes: int = 80 << 30, **changes: Any) -> Topology:
    """GPUs with links of 10 GB/s."""
    links = tuple(
        Link(operation=operation, ranks=2, latency_s=1e-5, bytes_per_s=Curve.flat(1e10))
        for operation in OPERATIONS
    )
    topology = Topology(
        kind="H100",
        num_devices=num_devices,
        memory_bytes=memory_bytes,
        process_bytes=64 * MIB,
        start_s=0.5,
        dtype="bfloat16",
        num_sms=0,
        overlap_share=0.5,
        rates=(rates(),),
        contention=(),
        links=links,
        disk=Disk(write_bytes_per_s=1e9, read_bytes_per_s=2e9),
        origin="test",
    )
    return replace(topology, **changes)


def cpu_machine() -> Topology:
    """Two cores that share 24 GiB."""
    return machine(
        2,
        24 << 30,
        kind="cpu",
        dtype="float32",
        overlap_share=0.0,
        rates=(rates(1), rates(2)),
        contention=(Contention(ranks=2, compute=1.5, stream=2.0),),
    )


def workload(
    num_tokens: int = 10_000, cfg: ModelConfig = LLAMA, segment_tokens: int = 1024
) -> Workload:
    """A document of the given length."""
    return Workload(cfg=cfg, num_tokens=num_tokens, segment_tokens=segment_tokens)


def choice(
    mesh: str = "1x1",
    *,
    chunk_tokens: int = 512,
    split_tokens: int | None = None,
    reading: Reading = EXACT,
    threads: int = 0,
) -> Choice:
    """One way of running it."""
    heads, context = map(int, mesh.split("x"))
    return Choice(
        mesh=Mesh(heads=heads, context=context),
        threads=threads,
        chunk_tokens=chunk_tokens,
        split_tokens=split_tokens,
        reading=reading,
    )

"""Machines that are planned for before anybody has measured them, and how a user names one.

Owns the published figures of H100 and H200 nodes, each with where it comes from, and the form of
`--gpus`. They say what the hardware gives to good kernels; `longspan calibrate` on the machine
itself replaces them by what Longspan gets there. Refuses to know files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.errors import UsageError
from orchestrator.planner.topology import (
    OPERATIONS,
    Contention,
    Curve,
    Disk,
    Link,
    Rates,
    Topology,
)

_FORM = re.compile(r"([1-9][0-9]{0,3})x([a-z][a-z0-9-]*)|cpu:([1-9][0-9]{0,3})", re.IGNORECASE)
_GIB = 1 << 30

# Bytes/s of memory: NVIDIA's data sheets (H100 SXM5 3.35 TB/s, H200 4.8 TB/s).
_MEMORY_BYTES_PER_S = {"H100": 3.35e12, "H200": 4.8e12}
# What one GPU offers to a program: 80 and 141 GB less what driver and context keep.
_MEMORY_BYTES = {"H100": 78 * _GIB, "H200": 139 * _GIB}
# vLLM's fit of Llama-3.1-8B on one H100 (6.44 ms + 43.7 us per 1,000 keys a token, blog
# 2026-04-22) reads weights at 72 % and KV at 90 % of the memory's rate.
_WEIGHT_SHARE, _KV_SHARE = 0.72, 0.90
# bf16 peak 989 TFLOP/s (data sheet); Meta's context-parallel prefill of 405B reached 63 % of it
# over a whole forward (arXiv 2411.01783).
_MATRIX_PEAK_FLOPS_PER_S, _MATRIX_SHARE = 989e12, 0.63
# FlashAttention forward, H100, 64 query heads of 128: 187.2 ms at 65,536 tokens, which is
# 376 TFLOP/s of the causal half (native-sparse-attention-triton, its benchmark table).
_ATTENTION_FLOPS_PER_S = 376e12
# NCCL all-reduce between eight H100: 33 us at 80 KB (kraken #8), 121 us at 16 MiB, of which each
# rank receives 28 MiB (vllm #42324); 370 GB/s is what is left of NVLink 4 for large ones (Meta).
_LINK_LATENCY_S = 33e-6
_LINK_BYTES_PER_S = Curve(points=((140e3, 4.2e9), (29.4e6, 243e9), (1e9, 370e9)))
# NCCL beside a matrix product slows the product by 30 to 40 % (pytorch #179937): two thirds of
# what is hidden is won.
_OVERLAP_SHARE = 0.65
# Not published for this engine; as good as a captured graph (4 us a kernel, some 15 a layer), and
# a layer's selection at twice that.
_EXACT_LAYER_S, _CENTROID_LAYER_S, _RUN_S = 60e-6, 120e-6, 4e-6
# Estimated from launches: some 30 of 10 us for lists of 6,000 units.
_LIST_UNITS_PER_S = 2e7
# One NVMe drive's order of magnitude.
_DISK = Disk(write_bytes_per_s=1.5e9, read_bytes_per_s=3.0e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """What `--gpus` names: num_devices of one kind."""

    kind: str
    num_devices: int

    def __str__(self) -> str:
        return (
            f"cpu:{self.num_devices}" if self.kind == "cpu" else f"{self.num_devices}x{self.kind}"
        )


def parse_machine(text: str) -> MachineSpec:
    """`2xH100`, `4xH200` or `cpu:2`; raises UsageError otherwise."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"machine {text!r} is not of a known form; limit NxGPU or cpu:CORES; give 4xH200 or "
            "cpu:2, for example"
        )
    count, gpu, cores = match.groups()
    if cores:
        return MachineSpec(kind="cpu", num_devices=int(cores))
    return MachineSpec(kind=gpu.upper(), num_devices=int(count))


def published_topology(spec: MachineSpec) -> Topology:
    """A node of H100 or H200 GPUs from published figures; raises UsageError for a CPU."""
    if spec.kind not in _MEMORY_BYTES_PER_S:
        raise UsageError(
            f"machine {spec} has no published figures; limit {', '.join(_MEMORY_BYTES_PER_S)}; "
            "run longspan calibrate on it, and plan there"
        )
    counts = sorted({2, spec.num_devices} - {1})
    links = tuple(
        Link(
            operation=operation,
            ranks=count,
            latency_s=_LINK_LATENCY_S,
            bytes_per_s=_LINK_BYTES_PER_S,
        )
        for count in counts
        for operation in OPERATIONS
    )
    return Topology(
        kind=spec.kind,
        num_devices=spec.num_devices,
        memory_bytes=_MEMORY_BYTES[spec.kind],
        process_bytes=_GIB,  # libraries' workspaces and the communicator's buffers
        start_s=0.5,
        dtype="bfloat16",
        num_sms=132,  # both kinds
        overlap_share=_OVERLAP_SHARE,
        rates=(_published_rates(spec.kind),),
        contention=(Contention(ranks=1, compute=1.0, stream=1.0),),
        links=links,
        disk=_DISK,
        origin="published figures, not measured on this machine",
    )


def _published_rates(kind: str) -> Rates:
    memory = _MEMORY_BYTES_PER_S[kind]
    kv, weights = memory * _KV_SHARE, memory * _WEIGHT_SHARE
    return Rates(
        threads=0,
        matrix_flops_per_s=_roofline(weights, _MATRIX_PEAK_FLOPS_PER_S * _MATRIX_SHARE),
        question_flops_per_s=_roofline(weights, _MATRIX_PEAK_FLOPS_PER_S * _MATRIX_SHARE),
        attention_flops_per_s=Curve.flat(_ATTENTION_FLOPS_PER_S),
        causal_flops_per_s=Curve.flat(_ATTENTION_FLOPS_PER_S),
        # Plain products of float32, whose distances are written and read again: 2 D flops for 8
        # bytes moved, at a head dim of 128.
        cluster_flops_per_s=Curve.flat(memory * 2 * 128 / 8),
        lookup_flops_per_s=Curve.flat(memory),
        list_units_per_s=Curve.flat(_LIST_UNITS_PER_S),
        weight_bytes_per_s=weights,
        kv_bytes_per_s=kv,
        lookup_bytes_per_s=kv,
        elementwise_bytes_per_s=memory / 2,
        fresh_bytes_per_s=memory / 2,
        exact_layer_s=_EXACT_LAYER_S,
        centroid_layer_s=_CENTROID_LAYER_S,
        exact_tile_s=_EXACT_LAYER_S,
        centroid_tile_s=_CENTROID_LAYER_S,
        run_s=_RUN_S,
    )


def _roofline(weight_bytes_per_s: float, peak_flops_per_s: float) -> Curve:
    """A bf16 weight of two bytes serves two flops a row: few rows are bound by reading weights."""
    rows = (2.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
    return Curve(points=tuple((r, min(r * weight_bytes_per_s, peak_flops_per_s)) for r in rows))

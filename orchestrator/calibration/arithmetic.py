"""Rates of plain arithmetic on one rank: products, attention, k-means, what moves bytes.

Owns the shapes that are timed: those of a small model on a CPU, of a large one on a GPU. Everything
goes through the backend that ingests and questions use. Refuses to know what the rates are for.
"""

from __future__ import annotations

import mmap
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from collectives import NUM_VIRTUAL_SHARDS, split_evenly
from orchestrator.calibration.timing import Stopwatch
from orchestrator.model.layers import rms_norm
from orchestrator.planner.topology import Curve
from orchestrator.planner.workload import ClusterRule
from sparse_attn.api import Backend
from sparse_attn.select.centroid_build import CentroidParams, build

_ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the timed shapes are.

    rows: of dense products; questions: tokens of a question's; weight_bytes: of weights that are
    read in turn, more than any cache holds; fresh_bytes: of one copy, more than an allocator keeps;
    width: of a layer's input, inner: of its MLP; heads, kv_heads, head_dim: of attention; keys:
    read by it; problems, segments: of k-means.
    """

    rows: tuple[int, ...]
    questions: tuple[int, ...]
    weight_bytes: int
    fresh_bytes: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    keys: int
    problems: int
    segments: tuple[int, ...]


ON_CPU = Sizes(
    rows=(256, 1024),
    questions=(2, 8, 16, 64),
    weight_bytes=256 << 20,
    fresh_bytes=48 << 20,
    width=576,
    inner=1536,
    heads=3,
    kv_heads=1,
    head_dim=64,
    keys=2048,
    problems=32,
    segments=(1024, 4096),
)
ON_GPU = Sizes(
    rows=(256, 1024, 4096, 8192),
    questions=(2, 8, 16, 64),
    weight_bytes=2 << 30,
    fresh_bytes=256 << 20,
    width=4096,
    inner=14_336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    keys=32_768,
    problems=32,
    segments=(1024, 8192),
)
TINY = Sizes(
    rows=(16, 32),
    questions=(2, 4),
    weight_bytes=1 << 16,
    fresh_bytes=1 << 16,
    width=32,
    inner=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    keys=64,
    problems=2,
    segments=(64, 128),
)
SIZES = {"cpu": ON_CPU, "cuda": ON_GPU, "tiny": TINY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Everything that a measurement of arithmetic needs."""

    backend: Backend
    stopwatch: Stopwatch
    sizes: Sizes
    dtype: torch.dtype

    def random(self, *shape: int) -> Tensor:
        """Noise in the dtype of weights and KV."""
        return torch.randn(shape, dtype=self.dtype, device=self.stopwatch.device)

    def best_s(self, work: Callable[[], object]) -> float:
        """Least seconds of `work` in inference mode."""
        with torch.inference_mode():
            return self.stopwatch.best_s(work)


def matrix_curve(probe: Probe) -> Curve:
    """Flops/s of a layer's products against rows, as an ingest multiplies."""
    weight = probe.random(probe.sizes.inner, probe.sizes.width)

    def flops_per_s(rows: int) -> float:
        x = probe.random(rows, probe.sizes.width)
        seconds = probe.best_s(lambda: probe.backend.linear(x, weight))
        return 2.0 * rows * weight.numel() / seconds

    return _curve(probe.sizes.rows, flops_per_s)


def question_curve(probe: Probe) -> Curve:
    """Flops/s of a layer's products against rows, as a question multiplies: piece by piece, so that
    bits do not depend on the mesh.
    """
    weights = _make_weights(probe)
    runs = split_evenly(probe.sizes.inner, NUM_VIRTUAL_SHARDS)
    bounds = (0, *(run.stop for run in runs))

    def flops_per_s(rows: int) -> float:
        x = probe.random(rows, probe.sizes.width)
        seconds = _product_s(
            probe, weights, lambda weight: probe.backend.linear_split(x, weight, None, bounds)
        )
        return 2.0 * rows * weights[0].numel() / seconds

    return _curve(probe.sizes.questions, flops_per_s)


def weight_bytes_per_s(probe: Probe) -> float:
    """Bytes/s at which one row meets weights."""
    weights = _make_weights(probe)
    x = probe.random(1, probe.sizes.width)
    seconds = _product_s(probe, weights, lambda weight: probe.backend.linear(x, weight))
    return weights[0].nbytes / seconds


def _make_weights(probe: Probe) -> list[Tensor]:
    """So many weights that none is in a cache when its turn comes again."""
    shape = (probe.sizes.inner, probe.sizes.width)
    one_bytes = shape[0] * shape[1] * probe.dtype.itemsize
    return [probe.random(*shape) for _ in range(max(1, probe.sizes.weight_bytes // one_bytes))]


def _product_s(probe: Probe, weights: list[Tensor], product: Callable[[Tensor], object]) -> float:
    """Seconds of one product: the median over the weights, of the fastest of several rounds."""
    once_s = probe.stopwatch.once_s
    with torch.inference_mode():
        rounds = [[once_s(partial(product, weight)) for weight in weights] for _ in range(_ROUNDS)]
    return min(statistics.median(seconds) for seconds in rounds)


def attention_curve(probe: Probe) -> Curve:
    """Flops/s of attention over earlier keys, against query tokens."""
    sizes = probe.sizes
    k, v = (probe.random(sizes.kv_heads, sizes.keys, sizes.head_dim) for _ in range(2))

    def flops_per_s(tokens: int) -> float:
        q = probe.random(tokens, sizes.heads, sizes.head_dim)
        seconds = probe.best_s(lambda: probe.backend.attend(q, k, v, scale=0.1))
        return 4.0 * tokens * sizes.keys * sizes.heads * sizes.head_dim / seconds

    return _curve((sizes.questions[-1], *sizes.rows), flops_per_s)


def causal_curve(probe: Probe) -> Curve:
    """Flops/s of a chunk's attention over itself, of the causal half, against its tokens."""
    sizes = probe.sizes

    def flops_per_s(tokens: int) -> float:
        q = probe.random(tokens, sizes.heads, sizes.head_dim)
        k, v = (probe.random(sizes.kv_heads, tokens, sizes.head_dim) for _ in range(2))
        seconds = probe.best_s(lambda: probe.backend.attend_causal(q, k, v, scale=0.1))
        return 2.0 * tokens * tokens * sizes.heads * sizes.head_dim / seconds

    return _curve(sizes.rows, flops_per_s)


def cluster_curve(probe: Probe) -> Curve:
    """Flops/s of the distances of a segment's k-means, everything around them included, against
    keys: `Cost.cluster_s` counts the same flops.
    """
    rule, params, D = ClusterRule(), CentroidParams(), probe.sizes.head_dim

    def flops_per_s(keys: int) -> float:
        problems = max(1, probe.sizes.problems * probe.sizes.segments[0] // keys)
        x = probe.random(problems, keys, D)
        seconds = probe.best_s(lambda: build(x, x, num_sinks=0, num_window=0, params=params))
        distances = keys * rule.clusters_of(keys) + rule.columns_of(keys) * rule.groups_of(keys)
        return problems * (rule.iterations + 1) * 2.0 * D * distances / seconds

    return _curve(probe.sizes.segments, flops_per_s)


def elementwise_bytes_per_s(probe: Probe) -> float:
    """Bytes/s that a norm and an activation take in."""
    rows, sizes = probe.sizes.rows[-1], probe.sizes
    x, gate, up = (probe.random(rows, n) for n in (sizes.width, sizes.inner, sizes.inner))
    weight = torch.ones(sizes.width, device=probe.stopwatch.device)

    def work() -> None:
        rms_norm(x, weight, 1e-5)
        functional.silu(gate).mul_(up)

    # The activation is read again and multiplied: three tensors in all.
    num_bytes = x.nbytes + 2 * gate.nbytes + up.nbytes
    return num_bytes / probe.best_s(work)


def fresh_bytes_per_s(probe: Probe) -> float:
    """Bytes/s of copying into memory that was not there before.

    On a CPU the kernel gives it, page by page: an allocator may have some left that it gave out
    before. On a GPU the allocator keeps what it once had.
    """
    source = probe.random(max(1, probe.sizes.fresh_bytes // probe.dtype.itemsize))
    if probe.stopwatch.device.type != "cpu":
        return source.nbytes / probe.best_s(source.clone)

    def work() -> None:
        pages = mmap.mmap(-1, source.nbytes)
        torch.frombuffer(pages, dtype=source.dtype).copy_(source)

    return source.nbytes / probe.best_s(work)


def _curve(xs: tuple[int, ...], y_of: Callable[[int], float]) -> Curve:
    return Curve(points=tuple((float(x), y_of(x)) for x in xs))

"""Attention of one layer for one query on a GPU: own kernels beside the best dense peers.

Owns what is timed and how: inside CUDA graphs, over several layers one after another so that none
lies in the cache, the peers in the same run. Peers are PyTorch's fused attention, flash and cuDNN.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from orchestrator.errors import UsageError
from orchestrator.evaluation.decode_bench import measure_read_bandwidth
from orchestrator.evaluation.synthetic import NOTICE
from orchestrator.evaluation.synthetic_layers import LayerShape, make_document
from sparse_attn.kernels.decode import DecodeDocument, DenseDecode, Heads
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import lookup_bytes

# Keys and values of all layers that are visited in turn: several times any cache.
_ROTATED_BYTES = 512 << 20
_MAX_LAYERS = 8
_CALLS = 16
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTiming:
    """One way to attend. limit_s: num_bytes at the read bandwidth of this run; lookup_bytes: of
    num_bytes, tables; num_read: keys of the body that each KV head read, on average.
    """

    notice: str
    name: str
    num_tokens: int
    num_bytes: int
    lookup_bytes: int
    num_read: float
    limit_s: float
    median_s: float
    min_s: float
    max_s: float
    ratio_to_dense: float
    largest_error: float

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """A document's layers, queries [1, T, H, D] and how many steady keys it sees."""

    shape: LayerShape
    document: DecodeDocument
    heads: Heads
    q: Tensor
    visible: Tensor
    scale: float


def measure_attention(
    lengths: tuple[int, ...], budgets: tuple[str, ...], *, levels: int, repeats: int = 20
) -> Iterator[AttentionTiming]:
    """Every peer, own dense attention, and `centroid` by each budget (keys, or a share such as
    "2%"), on documents of each length; raises UsageError without a GPU.
    """
    if not torch.cuda.is_available():
        raise UsageError("bench attention found no GPU; limit one that torch can use; run it there")
    bandwidth = measure_read_bandwidth(torch.device("cuda"), num_bytes=8 << 30)
    for num_tokens in lengths:
        problem = _make_problem(num_tokens)
        yield from _measure_length(problem, budgets, bandwidth, levels, repeats)


def parse_keys(budget: str, num_tokens: int) -> int:
    """Keys of "2048" or "2%"."""
    share = budget.removesuffix("%")
    return int(num_tokens * float(share) / 100) if share != budget else int(budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTiming:
    """Questions that come together on one document: seconds of a step for one of them, for all."""

    name: str
    num_tokens: int
    num_questions: int
    one_s: float
    all_s: float

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def measure_shared(
    num_tokens: int, num_questions: int, *, budget: str, levels: int, repeats: int = 20
) -> list[SharedTiming]:
    """Dense and `centroid` attention of one layer, for one question and for several at once."""
    found: dict[str, list[float]] = {"dense": [], "centroid": []}
    for num_queries in (1, num_questions):
        problem = _make_problem(num_tokens, num_queries=num_queries)
        dense = DenseDecode(problem.heads, [problem.document], problem.visible, scale=problem.scale)
        centroid = CentroidDecode(
            problem.heads,
            [problem.document],
            problem.visible,
            limit=Limit(keys=parse_keys(budget, num_tokens)),
            levels=levels,
            scale=problem.scale,
        )
        plans: dict[str, DenseDecode | CentroidDecode] = {"dense": dense, "centroid": centroid}
        for name, plan in plans.items():
            seconds = time_in_graph(
                partial(_run, plan, problem.q), len(problem.document.k), repeats
            )
            found[name].append(statistics.median(seconds))
    return [
        SharedTiming(
            name=name,
            num_tokens=num_tokens,
            num_questions=num_questions,
            one_s=one_s,
            all_s=all_s,
        )
        for name, (one_s, all_s) in found.items()
    ]


def _make_problem(num_tokens: int, *, num_queries: int = 1) -> _Problem:
    """The Llama-3.1-8B shape: 32 query heads, 8 KV heads, head dim 128, bfloat16."""
    shape = LayerShape(num_tokens=num_tokens)
    per_layer = 4 * num_tokens * shape.num_kv_heads * shape.head_dim
    num_layers = min(_MAX_LAYERS, max(2, -(-_ROTATED_BYTES // per_layer)))
    device = torch.device("cuda")
    document = make_document(shape, num_layers=num_layers, dtype=torch.bfloat16, device=device)
    heads = Heads(
        num_documents=1,
        num_queries=num_queries,
        num_kv_heads=shape.num_kv_heads,
        per_group=4,
        head_dim=shape.head_dim,
    )
    q = 2.0 * torch.randn(1, num_queries, 32, shape.head_dim, device=device)
    return _Problem(
        shape=shape,
        document=document,
        heads=heads,
        q=q.to(torch.bfloat16),
        visible=torch.tensor([shape.num_steady // 2], device=device),
        scale=shape.head_dim**-0.5,
    )


def _measure_length(
    problem: _Problem, budgets: tuple[str, ...], bandwidth: float, levels: int, repeats: int
) -> Iterator[AttentionTiming]:
    document, num_tokens = problem.document, problem.shape.num_tokens
    dense = DenseDecode(problem.heads, [document], problem.visible, scale=problem.scale)
    expected_out, expected_lse = _attend_in_float32(problem)
    whole_bytes = document.k[0].nbytes + document.v[0].nbytes
    calls: dict[str, Callable[[int], object]] = {
        name: _peer_of(problem, kind) for name, kind in PEERS.items()
    }
    calls["dense"] = partial(_run, dense, problem.q)
    attended = dense.run(0, problem.q)
    errors = {"dense": _error(attended.out, expected_out)}
    costs = {name: (whole_bytes, 0, float(num_tokens)) for name in calls}
    for budget in budgets:
        keys, name = parse_keys(budget, num_tokens), f"centroid {budget}"
        plan = CentroidDecode(
            problem.heads,
            [document],
            problem.visible,
            limit=Limit(keys=keys),
            levels=levels,
            scale=problem.scale,
        )
        attended = plan.run(0, problem.q)
        if bool((attended.lse_read > expected_lse + 1e-3).any()):
            raise AssertionError(f"{name} read more mass than there is, {num_tokens} tokens")
        errors[name] = _error(attended.out, expected_out)
        costs[name] = _cost(problem, plan, levels)
        calls[name] = partial(_run, plan, problem.q)
    seconds = {name: time_in_graph(call, len(document.k), repeats) for name, call in calls.items()}
    best = min(statistics.median(own) for name, own in seconds.items() if name in PEERS and own)
    for name, own in seconds.items():
        if not own:  # a peer that does not run here
            continue
        num_bytes, tables, num_read = costs[name]
        yield AttentionTiming(
            notice=NOTICE,
            name=name,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            lookup_bytes=tables,
            num_read=num_read,
            limit_s=num_bytes / bandwidth,
            median_s=statistics.median(own),
            min_s=min(own),
            max_s=max(own),
            ratio_to_dense=best / statistics.median(own),
            largest_error=errors.get(name, 0.0),
        )


def _run(plan: DenseDecode | CentroidDecode, q: Tensor, layer: int) -> object:
    return plan.run(layer, q)


def _cost(problem: _Problem, plan: CentroidDecode, levels: int) -> tuple[int, int, float]:
    """Bytes read, of them tables', and keys of a head, by the last run of layer 0."""
    index, num_heads = problem.document.indexes[0], problem.shape.num_kv_heads
    tables = lookup_bytes(index.groups if levels == 2 else index.clusters)
    opened = int(plan.packed_bounds[0, :, 8].sum()) if levels == 2 else 0
    tables += opened * 6 * problem.shape.head_dim
    num_read = int(plan.slot_bounds[0, :, 8].sum())
    return tables + num_read * 4 * problem.shape.head_dim, tables, num_read / num_heads


def _peer_of(problem: _Problem, kind: SDPBackend) -> Callable[[int], object]:
    shape = (1, problem.shape.num_kv_heads, problem.shape.num_tokens, problem.shape.head_dim)
    q = problem.q.transpose(1, 2)

    def attend(layer: int) -> object:
        k, v = (x[layer].view(shape) for x in (problem.document.k, problem.document.v))
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(q, k, v, scale=problem.scale, enable_gqa=True)

    return attend


def _attend_in_float32(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Output [1, 1, H, D] and log mass [1, 1, H] of layer 0, one KV head at a time."""
    document, num_seen = problem.document, int(problem.visible)
    outs, lses = [], []
    for g, rows in enumerate(problem.q[0, 0].view(problem.shape.num_kv_heads, 4, -1).float()):
        slots = slice(g * problem.shape.num_tokens, (g + 1) * problem.shape.num_tokens)
        k = torch.cat([document.steady_k[0][g, :num_seen], document.k[0][slots]]).float()
        v = torch.cat([document.steady_v[0][g, :num_seen], document.v[0][slots]]).float()
        scores = rows @ k.T * problem.scale
        outs.append(torch.softmax(scores, dim=-1) @ v)
        lses.append(torch.logsumexp(scores, dim=-1))
    return torch.cat(outs)[None, None], torch.cat(lses)[None, None]


def _error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).abs().max())


def time_in_graph(call: Callable[[int], object], num_layers: int, repeats: int) -> list[float]:
    """Seconds of one call, `repeats` times, layers in turn; empty where the call is refused."""
    cuda: Any = torch.cuda
    stream = cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for layer in range(num_layers):
                call(layer)
    except RuntimeError:
        return []
    torch.cuda.current_stream().wait_stream(stream)
    graph, num_calls = torch.cuda.CUDAGraph(), num_layers * -(-_CALLS // num_layers)
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            call(i % num_layers)
    seconds = []
    for _ in range(repeats + 3):
        start, stop = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) * 1e-3 / num_calls)
    return seconds[3:]

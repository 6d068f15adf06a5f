"""What a question costs beside plain products: the host's seconds a layer, reading KV, looking up.

Owns a decoder of a few layers on synthetic documents of two lengths: the difference is what reading
more keys takes, and what is left of the short one, less its products, is the host's. Layers are as
large as real ones, so that weights push everything else out of the caches, as they do there.
Everything runs through the code that answers questions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from collectives import Mesh
from orchestrator.calibration.arithmetic import Probe
from orchestrator.errors import CalibrationFailed
from orchestrator.evaluation.synthetic import synthetic_context
from orchestrator.model.attention import QuestionAttention
from orchestrator.model.config import ModelConfig
from orchestrator.model.context import DocumentContext
from orchestrator.model.decoder import Decoder
from orchestrator.model.recorder import Recorder
from orchestrator.model.shapes import random_weights, shape_config
from orchestrator.planner.shards import matrix_share
from orchestrator.planner.topology import Curve
from orchestrator.planner.workload import ClusterRule
from orchestrator.steps import AttentionPlan
from sparse_attn.api import Backend
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import Units
from sparse_attn.select.lists import cut_lists, list_candidates, list_width, take_first
from sparse_attn.step import Scores

_REPEATS, _ATTEMPTS = 8, 4
_LEAST_S = 1e-7
# One query in so many of a layer has its recall sampled, as in an answer.
_RECALL_PERIOD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSizes:
    """Documents and questions that are timed. short: one with next to nothing to read; long: one
    that no cache holds; segment_tokens: of both; tokens: of a question; keys: a query retrieves.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dims: tuple[int, ...]
    short: int
    long: int
    segment_tokens: int
    tokens: int
    keys: int


QUESTIONS_ON_CPU = QuestionSizes(
    layers=4,
    heads=9,
    kv_heads=3,
    head_dims=(64, 128),
    short=256,
    long=8192,
    segment_tokens=1024,
    tokens=32,
    keys=512,
)
QUESTIONS_ON_GPU = replace(
    QUESTIONS_ON_CPU, heads=32, kv_heads=8, head_dims=(128,), long=65_536, segment_tokens=8192
)
TINY_QUESTIONS = QuestionSizes(
    layers=2,
    heads=4,
    kv_heads=2,
    head_dims=(16,),
    short=256,
    long=1024,
    segment_tokens=256,
    tokens=4,
    keys=64,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionRates:
    """Of `planner.topology.Rates`, those that questions decide."""

    exact_layer_s: float
    centroid_layer_s: float
    exact_tile_s: float
    centroid_tile_s: float
    run_s: float
    kv_bytes_per_s: float
    lookup_bytes_per_s: float
    lookup_flops_per_s: Curve
    list_units_per_s: Curve


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A model of one head dim, and its short and long document."""

    cfg: ModelConfig
    decoder: Decoder
    short: DocumentContext
    long: DocumentContext

    @property
    def layer_elements(self) -> int:
        """Of one layer's matrices."""
        return matrix_share(self.cfg, Mesh(heads=1, context=1), 0).layer


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductRates:
    """What products were measured to take, which questions are to be cleared of."""

    weight_bytes_per_s: float
    question_flops_per_s: Curve

    def layer_s(self, documents: Documents, tokens: int) -> float:
        """One layer's products."""
        elements = documents.layer_elements
        if tokens == 1:
            return elements * documents.decoder.dtype.itemsize / self.weight_bytes_per_s
        return 2.0 * tokens * elements / self.question_flops_per_s.at(tokens)


def make_documents(probe: Probe, sizes: QuestionSizes, head_dim: int) -> Documents:
    """Draw and cluster both documents; what takes longest of a calibration."""
    base = shape_config(f"shape:llama-3.1-8b@{sizes.layers}")
    cfg = replace(
        base,
        model_dim=probe.sizes.width,
        mlp_dim=probe.sizes.inner,
        vocab_size=32,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=head_dim,
    )
    device = probe.stopwatch.device
    short, long = (
        synthetic_context(
            cfg,
            num_tokens=num_tokens,
            segment_tokens=sizes.segment_tokens,
            dtype=probe.dtype,
            device=device,
        )
        for num_tokens in (sizes.short, sizes.long)
    )
    weights = random_weights(cfg, dtype=probe.dtype, device=device)
    backend = probe.backend
    decoder = Decoder(cfg, weights, backend.linear, linear_split=backend.linear_split)
    return Documents(cfg=cfg, decoder=decoder, short=short, long=long)


def measure_questions(
    probe: Probe, sizes: QuestionSizes, documents: dict[int, Documents], products: ProductRates
) -> QuestionRates:
    """Rates from differences of forwards; documents: by head dim. Raises CalibrationFailed."""
    first, layers = documents[sizes.head_dims[0]], sizes.layers
    exact_s, read_s = _short_and_more(probe, sizes, first, mode="exact", tokens=1)
    centroid_s, found_s = _short_and_more(probe, sizes, first, mode="centroid", tokens=1)
    dense, looked_up = time_dense(probe, sizes, first), time_lookup(probe, sizes, first)
    others = sizes.head_dims[1:]
    lookup = [(float(first.cfg.head_dim), looked_up.flops_per_s)]
    lookup += [(float(n), time_lookup(probe, sizes, documents[n]).flops_per_s) for n in others]
    D, item = first.cfg.head_dim, probe.dtype.itemsize
    kv_bytes = 2 * D * item * sizes.kv_heads * (sizes.long - sizes.short)
    step_s, tile_s = (products.layer_s(first, tokens) for tokens in (1, sizes.tokens))
    return QuestionRates(
        exact_layer_s=max(exact_s / layers - step_s, _LEAST_S),
        centroid_layer_s=max(centroid_s / layers - step_s, _LEAST_S),
        exact_tile_s=max(dense.tile_s - tile_s, _LEAST_S),
        centroid_tile_s=max(looked_up.tile_s - tile_s, _LEAST_S),
        run_s=dense.run_s,
        kv_bytes_per_s=kv_bytes * layers / read_s,
        lookup_bytes_per_s=_lookup_bytes(sizes, D, item) * layers / found_s,
        lookup_flops_per_s=Curve(points=tuple(lookup)),
        list_units_per_s=list_curve(probe, sizes, first),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupTime:
    """Several question tokens that look up: flops/s, and a layer's seconds beside them, products
    included.
    """

    flops_per_s: float
    tile_s: float


def time_lookup(probe: Probe, sizes: QuestionSizes, documents: Documents) -> LookupTime:
    """6 D flops a unit and 4 D a key read, by query and head: `Cost.selected_attention_s`."""
    short_s, more_s = _short_and_more(probe, sizes, documents, mode="centroid", tokens=sizes.tokens)
    rows = sizes.tokens * sizes.heads * documents.cfg.head_dim

    def flops(num_keys: int) -> float:
        units = ClusterRule().columns_of(num_keys)
        return rows * (6.0 * units + 4.0 * min(sizes.keys, num_keys))

    rate = sizes.layers * (flops(sizes.long) - flops(sizes.short)) / more_s
    tile_s = short_s / sizes.layers - flops(sizes.short) / rate
    return LookupTime(flops_per_s=rate, tile_s=tile_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTime:
    """Several question tokens that read everything: what each further run (a segment of a KV head)
    adds, and a layer's seconds, products included, beside attention's arithmetic.
    """

    run_s: float
    tile_s: float


def time_dense(probe: Probe, sizes: QuestionSizes, documents: Documents) -> DenseTime:
    """Both documents, less what attention takes where it is one call."""
    short_s, more_s = _short_and_more(probe, sizes, documents, mode="exact", tokens=sizes.tokens)
    D = documents.cfg.head_dim
    q = probe.random(sizes.tokens, sizes.heads, D)
    k, v = (probe.random(sizes.kv_heads, sizes.long, D) for _ in range(2))
    arithmetic_s = probe.best_s(lambda: probe.backend.attend(q, k, v, scale=0.1))
    runs = (-(-sizes.long // sizes.segment_tokens) - 1) * sizes.kv_heads
    run_s = (more_s / sizes.layers - arithmetic_s) / max(1, runs)
    tile_s = short_s / sizes.layers - arithmetic_s * sizes.short / sizes.long
    return DenseTime(run_s=max(run_s, _LEAST_S), tile_s=tile_s)


def _short_and_more(
    probe: Probe, sizes: QuestionSizes, documents: Documents, *, mode: str, tokens: int
) -> tuple[float, float]:
    """Seconds of a forward over the short document, and how many more the long one takes.

    Measured again where the long one took no longer: another program was in the way.
    """
    for _ in range(_ATTEMPTS):
        short_s, long_s = (
            forward_s(probe, sizes, documents, context, mode=mode, tokens=tokens)
            for context in (documents.short, documents.long)
        )
        if long_s > short_s:
            return short_s, long_s - short_s
    raise CalibrationFailed(
        f"calibration: {sizes.long} keys took {long_s * 1e3:.2f} ms and {sizes.short} keys "
        f"{short_s * 1e3:.2f} ms in mode {mode}; limit more for more keys; run it again while "
        "nothing else computes"
    )


def forward_s(
    probe: Probe,
    sizes: QuestionSizes,
    documents: Documents,
    context: DocumentContext,
    *,
    mode: str,
    tokens: int,
) -> float:
    """Least seconds of a forward of some question tokens; every repeat is a question of its own."""
    decoder, cfg = documents.decoder, documents.cfg
    plan = AttentionPlan(
        mode=mode,
        keys=sizes.keys if mode == "centroid" else 0,
        recall_period=_RECALL_PERIOD,
    )
    recorder = Recorder(context.resident, context.place, recall_period=plan.recall_period)
    ids = torch.zeros(tokens, dtype=torch.int64, device=decoder.device)
    positions = torch.arange(context.num_tokens, context.num_tokens + tokens, device=ids.device)

    best = float("inf")
    with torch.inference_mode():
        for _ in range(_REPEATS):
            attention = QuestionAttention(
                context,
                plan,
                probe.backend,
                recorder,
                scale=cfg.attention_scale,
                windows=cfg.windows,
                capacity_tokens=tokens,
            )
            work = partial(decoder.forward, ids, positions, attention)
            best = min(best, probe.stopwatch.once_s(work))
    return best


def list_curve(probe: Probe, sizes: QuestionSizes, documents: Documents) -> Curve:
    """Units/s of what a choice over several ranks takes beside one rank's: ranking and listing the
    own units, and cutting the lists of two ranks.
    """
    limit, points = Limit(keys=sizes.keys), {}
    backend, cfg = probe.backend, documents.cfg
    cases = (documents.short, 1), (documents.long, 1), (documents.long, sizes.tokens)
    for context, tokens in cases:
        units = context.index(0).clusters
        q = probe.random(tokens, cfg.num_heads, cfg.head_dim)
        with torch.inference_mode():
            scores = backend.score_units(q, units, scale=cfg.attention_scale)
            width = list_width(units.sizes, limit)
        shared = partial(_share_choice, backend, scores, units, limit, width)
        alone = partial(
            backend.take_units,
            scores,
            units,
            total=scores.lse,
            lse_steady=scores.lse,
            limit=limit,
        )
        seconds = max(probe.best_s(shared) - probe.best_s(alone), _LEAST_S)
        num_units = float(tokens * units.sizes.numel())
        points[num_units] = num_units / seconds
    return Curve(points=tuple(sorted(points.items())))


def _share_choice(
    backend: Backend, scores: Scores, units: Units, limit: Limit, width: int
) -> Tensor:
    """A choice as one of two ranks makes it, whose lists are the same."""
    ranks = backend.rank_units(scores, units, total=scores.lse, lse_steady=None)
    own = list_candidates(ranks, units, width=width)
    lists = (torch.stack([x, x]) for x in (own.benefit, own.sizes, own.ids))
    return take_first(own, cut_lists(*lists, own=0, limit=limit), units.num_units)


def _lookup_bytes(sizes: QuestionSizes, head_dim: int, item_bytes: int) -> int:
    """Bytes that a look-up in the long document reads more than one in the short, by layer."""
    rule = ClusterRule()
    units = rule.columns_of(sizes.long) - rule.columns_of(sizes.short)
    keys = sizes.keys - min(sizes.keys, sizes.short)
    return sizes.kv_heads * head_dim * (3 * 2 * units + 2 * item_bytes * keys)

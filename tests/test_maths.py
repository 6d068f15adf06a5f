"""Claims of `docs/maths.md` that its own examples do not check; every random number is seeded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.recall import PairSample, predict_mean
from sparse_attn.estimate import bound_missed_share, sample_recall
from sparse_attn.reference import attend, attend_estimated
from sparse_attn.select.base import Tail
from sparse_attn.select.centroid import CentroidIndex, Units, select_nothing
from sparse_attn.state import Part, merge_parts

SCALE = 0.25


def make_units(k: Tensor, v: Tensor, *, size: int) -> Units:
    """Units of `size` consecutive keys of k, v [G, S, D]."""
    keys, values = (x.view(x.shape[0], -1, size, x.shape[2]) for x in (k, v))
    centroids = keys.mean(dim=2)
    centred = keys - centroids.unsqueeze(2)
    sizes = torch.full(centroids.shape[:2], size)
    return Units.from_tables(
        centroids=centroids,
        variances=centred.square().mean(dim=2),
        value_sums=values.sum(dim=2),
        radii=centred.norm(dim=-1).amax(dim=2),
        starts=torch.arange(centroids.shape[1]).expand_as(sizes) * size,
        sizes=sizes,
    )


def make_tail(q: Tensor, k: Tensor, v: Tensor, *, size: int) -> Tail:
    """The tail when nothing of k, v is read."""
    units, nothing = make_units(k, v, size=size), torch.zeros(k.shape[0], 1, dtype=torch.int64)
    index = CentroidIndex(clusters=units, groups=units, group_starts=nothing, group_counts=nothing)
    return select_nothing(index, q, scale=SCALE).tail


def log_mean_exp(num_keys: int, sigma: float) -> float:
    """What the selector adds to log n + s q.c for one unit of that spread."""
    spread = torch.full((1, 1, 1), sigma / SCALE).square()
    zero = torch.zeros(1, 1, 1)
    units = Units.from_tables(
        centroids=zero,
        variances=spread,
        value_sums=zero,
        radii=zero[..., 0],
        starts=torch.zeros(1, 1),
        sizes=torch.tensor([[num_keys]]),
    )
    none = torch.zeros(1, 1, dtype=torch.int64)
    index = CentroidIndex(clusters=units, groups=units, group_starts=none, group_counts=none)
    tail = select_nothing(index, torch.ones(1, 1, 1), scale=SCALE).tail
    return float(tail.log_mass) - math.log(num_keys)


@pytest.mark.parametrize("num_keys", [2, 16, 128])
def test_estimate_bends_at_the_critical_spread(num_keys: int) -> None:
    critical = math.sqrt(2 * math.log(num_keys))
    below, at, above = (log_mean_exp(num_keys, critical * share) for share in (0.5, 1.0, 3.0))
    assert below == pytest.approx((0.5 * critical) ** 2 / 2, rel=1e-5)
    assert at == pytest.approx(math.log(num_keys), rel=1e-5)
    # Above the knee the unit weighs as much as its largest key.
    assert above + math.log(num_keys) == pytest.approx(3.0 * critical**2, rel=1e-5)


def test_one_key_is_estimated_exactly() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 8), torch.randn(2, 32, 8), torch.randn(2, 32, 8)
    tail = make_tail(q, k, v, size=1)
    part, exact = (
        attend_estimated(tail.log_mass, tail.value_sums, tail.sizes),
        attend(q, k, v, scale=SCALE),
    )
    torch.testing.assert_close(part.lse, exact.lse, atol=1e-5, rtol=0)
    torch.testing.assert_close(part.out, exact.out, atol=1e-5, rtol=0)


def test_dropping_the_spread_underestimates_every_unit() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 8), torch.randn(1, 96, 8), torch.randn(1, 96, 8)
    tail = make_tail(q, k, v, size=16)
    for unit in range(6):
        keys = slice(16 * unit, 16 * unit + 16)
        true = attend(q, k[:, keys], v[:, keys], scale=SCALE).lse
        assert (tail.log_mass_linear[..., unit] <= true + 1e-5).all()


def test_estimated_tail_beats_a_dropped_one() -> None:
    torch.manual_seed(0)
    centres = torch.randn(1, 20, 1, 16)
    k, v = (
        (centres + 0.5 * torch.randn(1, 20, 16, 16)).view(1, 320, 16),
        (centres + 0.5 * torch.randn(1, 20, 16, 16)).view(1, 320, 16),
    )
    q, more = torch.randn(8, 2, 16), torch.randn(1, 16, 16)
    read = attend(q, more, more, scale=SCALE)
    exact = merge_parts([read, attend(q, k, v, scale=SCALE)]).out
    tail = make_tail(q, k, v, size=16)
    estimated = merge_parts(
        [read, attend_estimated(tail.log_mass, tail.value_sums, tail.sizes)]
    ).out
    assert (estimated - exact).norm() < 0.25 * (read.out - exact).norm()


def recall_case(spread: float) -> tuple[Tensor, Tensor, Tail, Part, Tensor]:
    """Query, unread keys, their tail, what was read, and the true recall."""
    torch.manual_seed(3)
    k = torch.randn(1, 50, 1, 16).add(spread * torch.randn(1, 50, 16, 16)).view(1, 800, 16)
    q, steady = torch.randn(1, 4, 16), torch.randn(1, 400, 16)
    tail = make_tail(q, k, k, size=16)
    read = attend(q, steady, steady, scale=SCALE)
    total = merge_parts([read, attend(q, k, k, scale=SCALE)])
    return q, k, tail, read, torch.exp(read.lse - total.lse)


@pytest.mark.parametrize("spread", [0.1, 0.7])
def test_sampled_recall_is_unbiased_though_the_estimate_is_wrong(spread: float) -> None:
    q, k, tail, read, true = recall_case(spread)
    # Log masses of another query: a bad guess of where the mass is.
    torch.manual_seed(4)
    misled = make_tail(torch.randn(1, 4, 16), k, k, size=16)
    generator = torch.Generator().manual_seed(0)
    for guess in (tail, misled):
        reports = torch.stack(
            [
                sample_recall(
                    q, k, guess, read.lse, scale=SCALE, num_strata=32, generator=generator
                )
                for _ in range(400)
            ]
        )
        error = reports.std(dim=0) / math.sqrt(400)
        assert ((reports.mean(dim=0) - true).abs() < 4 * error + 0.004).all()


def test_bound_holds_where_it_is_tight_and_where_it_is_vacuous() -> None:
    for spread in (0.02, 3.0):
        q, _, tail, read, true = recall_case(spread)
        bound = bound_missed_share(q, tail, read.lse, scale=SCALE)
        assert (1 - true <= bound + 1e-6).all()
        assert (bound.min() < 0.99) if spread < 0.1 else (bound > 0.99).all()


@pytest.mark.parametrize("num_queries", [1, 5, 26])
def test_every_query_is_sampled_by_as_many_layers_as_any_other(num_queries: int) -> None:
    sample = PairSample(num_layers=30, period=4, seed=7)
    counts = np.zeros(num_queries, dtype=int)
    for layer in range(30):
        # Tiles of 3 queries choose what the whole would.
        tiles = range(0, num_queries, 3)
        chosen = [
            first + t
            for first in tiles
            for t in sample.chosen(layer, first, min(3, num_queries - first))
        ]
        assert chosen == list(sample.chosen(layer, 0, num_queries))
        counts[chosen] += 1
    assert counts.min() >= 7
    assert counts.max() <= 8


def test_prediction_is_exact_where_the_additive_model_is() -> None:
    rng = np.random.default_rng(0)
    table = 0.5 + 0.2 * rng.random((8, 1)) + 0.2 * rng.random((1, 16))
    sample = PairSample(num_layers=8, period=4, seed=1)
    pairs = [(layer, t) for layer in range(8) for t in sample.chosen(layer, 0, 16)]
    layers, queries = zip(*pairs, strict=True)
    values = [float(table[pair]) for pair in pairs]
    found = predict_mean(values, layers, queries, num_layers=8, num_queries=16)
    assert found.mean == pytest.approx(table.mean(), abs=1e-9)
    assert found.standard_error < 1e-9
    assert abs(float(np.mean(values[:10])) - table.mean()) > 1e-3

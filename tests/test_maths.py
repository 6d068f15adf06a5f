"""Claims of `docs/maths.md` that its own examples do not check; every random number is seeded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.recall import QuerySample, estimate_mean
from sparse_attn.api import find_backend
from sparse_attn.estimate import bound_of, log_most, recall_of, sample_missed
from sparse_attn.reference import attend, attend_estimated
from sparse_attn.select.base import Tail
from sparse_attn.select.centroid import Units
from sparse_attn.state import Part, merge_parts

SCALE = 0.25
TORCH = find_backend("torch")


def make_units(k: Tensor, v: Tensor, *, size: int) -> Units:
    """Units of `size` consecutive keys of k, v [G, S, D], laid flat; one fold holds them."""
    keys, values = (x.view(x.shape[0], -1, size, x.shape[2]) for x in (k, v))
    centroids = keys.mean(dim=2)
    centred = keys - centroids.unsqueeze(2)
    sizes = torch.full(centroids.shape[:2], size)
    first = torch.arange(k.shape[0]).unsqueeze(1) * k.shape[1]
    columns = torch.arange(centroids.shape[1]).expand_as(sizes)
    return Units.from_tables(
        centroids=centroids,
        variances=centred.square().mean(dim=2),
        value_sums=values.sum(dim=2),
        radii=centred.norm(dim=-1).amax(dim=2),
        starts=first + columns * size,
        sizes=sizes,
        bounds=torch.tensor([[0] + [centroids.shape[1]] * 8] * k.shape[0]),
        ids=columns,
    )


def make_tail(q: Tensor, k: Tensor, v: Tensor, *, size: int) -> Tail:
    """The tail when nothing of k, v is read."""
    units = make_units(k, v, size=size)
    scores = TORCH.score_units(q, units, scale=SCALE)
    return units.tail(scores.log_mass, scores.log_mass_linear)


def attend_tail(q: Tensor, k: Tensor, v: Tensor, *, size: int) -> Part:
    """The estimated part when nothing of k, v is read."""
    units, log_mass = make_units(k, v, size=size), make_tail(q, k, v, size=size).log_mass
    per_group = q.shape[1] // k.shape[0]
    heads = [
        attend_estimated(
            log_mass[:, g * per_group : (g + 1) * per_group], units.value_sums[g], units.sizes[g]
        )
        for g in range(k.shape[0])
    ]
    return Part(*(torch.cat(x, dim=1) for x in zip(*heads, strict=True)))


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
        bounds=torch.tensor([[0] + [1] * 8]),
        ids=torch.zeros(1, 1),
    )
    scores = TORCH.score_units(torch.ones(1, 1, 1), units, scale=SCALE)
    return float(scores.log_mass) - math.log(num_keys)


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
    part, exact = attend_tail(q, k, v, size=1), attend(q, k, v, scale=SCALE)
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
    estimated = merge_parts([read, attend_tail(q, k, v, size=16)]).out
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
                recall_of(missed.mean, missed.variance)
                for missed in (
                    sample_missed(
                        q, k[0], guess, read.lse, scale=SCALE, num_strata=32, generator=generator
                    )
                    for _ in range(400)
                )
            ]
        )
        error = reports.std(dim=0) / math.sqrt(400)
        assert ((reports.mean(dim=0) - true).abs() < 4 * error + 0.004).all()


def test_bound_holds_where_it_is_tight_and_where_it_is_vacuous() -> None:
    for spread in (0.02, 3.0):
        q, _, tail, read, true = recall_case(spread)
        bound = bound_of(log_most(q, tail, scale=SCALE), read.lse)
        assert (1 - true <= bound + 1e-6).all()
        assert (bound.min() < 0.99) if spread < 0.1 else (bound > 0.99).all()


@pytest.mark.parametrize("num_queries", [8, 13, 26])
def test_two_queries_of_each_full_run_are_sampled_whatever_the_tiles(num_queries: int) -> None:
    sample = QuerySample(period=4, seed=7)
    counts = np.zeros(num_queries, dtype=int)
    for layer in range(200):
        # Tiles of 3 queries choose what the whole would.
        chosen = [
            first + t
            for first in range(0, num_queries, 3)
            for t in sample.chosen(layer, first, min(3, num_queries - first))
        ]
        assert chosen == sample.chosen(layer, 0, num_queries)
        for first in range(0, num_queries - 7, 8):
            assert sum(first <= query < first + 8 for query in chosen) == 2
        counts[chosen] += 1
    assert counts.min() >= 25
    assert counts.max() <= 80  # 50 each are expected
    for query in range(num_queries):  # the same, asked the other way round
        layers = [layer for layer in range(200) if sample.chosen(layer, query, 1)]
        assert sample.layers_of(query, 200) == layers


def sampled(table: NDArray[np.float64], *, period: int, seed: int) -> tuple[float, float]:
    """Mean of a [layers, queries] table from its sample, and its standard error."""
    pairs = [
        (layer, t)
        for layer in range(table.shape[0])
        for t in QuerySample(period=period, seed=seed).chosen(layer, 0, table.shape[1])
    ]
    layers, queries = zip(*pairs, strict=True)
    values = [float(table[pair]) for pair in pairs]
    return estimate_mean(values, layers, queries, num_queries=table.shape[1], period=period)


def test_differences_between_layers_and_runs_cost_nothing() -> None:
    rng = np.random.default_rng(0)
    table = np.repeat(rng.random((8, 5)), 8, axis=1)
    mean, error = sampled(table, period=4, seed=1)
    assert mean == pytest.approx(table.mean(), abs=1e-12)
    assert error == 0.0


@pytest.mark.parametrize("num_queries", [17, 20, 23])
def test_a_run_that_is_cut_short_keeps_the_mean_unbiased(num_queries: int) -> None:
    rng = np.random.default_rng(1)
    table = 0.5 + 0.1 * rng.random((20, num_queries))
    found = [sampled(table, period=8, seed=seed) for seed in range(300)]
    errors = np.array([mean - table.mean() for mean, _ in found])
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(300)
    inside = np.mean([abs(mean - table.mean()) <= 1.96 * error for mean, error in found])
    assert inside >= 0.9


def test_one_sample_alone_has_the_widest_spread_that_a_share_can_have() -> None:
    estimate = estimate_mean([0.7], [0], [0], num_queries=1, period=1)
    assert estimate.mean == 0.7
    assert estimate.standard_error == 0.5

"""Sampled recall against the truth, and the bound that must always hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attn.api import find_backend
from sparse_attn.estimate import (
    Missed,
    add_missed,
    bound_of,
    log_most,
    recall_of,
    sample_missed,
)
from sparse_attn.select.base import Limit, Tail
from tests.sparse_attn.inputs import SCALE, Layer, clustered_layer, hold, make_layer, random_qkv
from tests.sparse_attn.reading import Read

NUM_KEYS = 400
TORCH = find_backend("torch")


def setup(
    seed: int, keys: int, spread: float, levels: int = 1
) -> tuple[Tensor, Tensor, Tail, Tensor, Tensor]:
    """q, k, tail, lse of what was read, and true recall [T, H], on a clustered layer."""
    layer = clustered_layer(NUM_KEYS, seed=seed)
    q, _, _ = random_qkv(2, 1, seed=seed + 1, spread=spread)
    read = Read(TORCH, [layer], q, Limit(keys=keys), levels=levels)
    tail = read.reads[0].tail
    lse_read, recall = true_recall(layer, q, [tail], read)
    return q, layer.k, tail, lse_read, recall


def true_recall(layer: Layer, q: Tensor, tails: list[Tail], read: Read) -> tuple[Tensor, Tensor]:
    """What was read, and its share of all attention; layer, tails: of one caller."""
    dense, _ = TORCH.attend_runs(q, layer.k, layer.v, layer.runs, scale=SCALE, keeps=False)
    everything = torch.logaddexp(dense.lse, read.lse_steady)
    missed = torch.zeros(2, 6)
    for token in range(2):
        for head in range(6):
            for tail in tails:
                g = head // 3
                unread = tail.log_mass[token, head] > -torch.inf
                runs = zip(tail.starts[g][unread], tail.sizes[g][unread], strict=True)
                slots = [s for start, size in runs for s in range(int(start), int(start + size))]
                scores = layer.k[slots] @ q[token, head] * SCALE
                missed[token, head] += torch.exp(
                    torch.logsumexp(scores, 0) - everything[token, head]
                )
    recall = (1.0 - missed).clamp(min=1e-30, max=1.0)
    return everything + torch.log(recall), recall


def sample(
    q: Tensor, k: Tensor, tail: Tail, lse_read: Tensor, generator: torch.Generator, strata: int = 32
) -> Missed:
    return sample_missed(q, k, tail, lse_read, scale=SCALE, num_strata=strata, generator=generator)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("keys", [0, 100])
def test_sampled_recall_is_unbiased(levels: int, keys: int) -> None:
    q, k, tail, lse_read, truth = setup(1, keys, 2.0, levels)
    generator = torch.Generator().manual_seed(0)
    samples = torch.stack(
        [
            recall_of(missed.mean, missed.variance)
            for missed in (sample(q, k, tail, lse_read, generator) for _ in range(200))
        ]
    )
    error = samples.mean(dim=0) - truth
    noise = samples.std(dim=0) / 200**0.5
    # One query's recall is a ratio with a heavy tail; what is reported is a mean of hundreds.
    assert float(error.mean().abs()) < 0.004
    assert bool((error.abs() < 5 * noise + 0.015).all())


def test_recall_of_a_query_that_read_everything_is_one() -> None:
    q, k, tail, lse_read, _ = setup(2, NUM_KEYS, 1.0)
    generator = torch.Generator().manual_seed(0)
    missed = sample(q, k, tail, lse_read, generator, strata=4)
    assert torch.equal(recall_of(missed.mean, missed.variance), torch.ones(2, 6))


@pytest.mark.parametrize("levels", [1, 2])
def test_what_several_callers_missed_adds_up(levels: int) -> None:
    segments = make_layer([90, 130, 70, 110], seed=4)
    q, _, _ = random_qkv(2, 1, seed=5, spread=2.0)
    whole = hold(segments)
    alone = Read(TORCH, [whole], q, Limit(keys=60), levels=levels)
    lse_read, truth = true_recall(whole, q, [alone.reads[0].tail], alone)
    layers = [hold(segments, caller, 4) for caller in range(4)]
    read = Read(TORCH, layers, q, Limit(keys=60), levels=levels)
    generator = torch.Generator().manual_seed(0)
    reports = []
    for _ in range(200):
        missed = add_missed(
            [
                sample(q, layer.k, own.tail, lse_read, generator, strata=8)
                for layer, own in zip(layers, read.reads, strict=True)
            ]
        )
        reports.append(missed)
    recalls = torch.stack([recall_of(x.mean, x.variance) for x in reports])
    noise = recalls.std(dim=0) / 200**0.5
    assert bool(((recalls.mean(dim=0) - truth).abs() < 5 * noise + 0.02).all())
    means = torch.stack([x.mean for x in reports])
    spread = torch.stack([x.variance for x in reports]).mean(dim=0) / means.var(dim=0)
    assert 0.5 < float(spread.median()) < 2.0
    most = log_most(q, alone.reads[0].tail, scale=SCALE)
    torch.testing.assert_close(reports[0].log_most, most, atol=1e-4, rtol=0)


def test_the_same_seed_draws_the_same_sample() -> None:
    q, k, tail, lse_read, _ = setup(3, 50, 2.0)

    def run(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(q, k, tail, lse_read, generator, strata=8).mean

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    keys=st.sampled_from([0, 30, 200]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    levels=st.sampled_from([1, 2]),
)
def test_the_bound_is_never_violated(seed: int, keys: int, spread: float, levels: int) -> None:
    q, _, tail, lse_read, truth = setup(seed, keys, spread, levels)
    bound = bound_of(log_most(q, tail, scale=SCALE), lse_read)
    assert bool((1.0 - truth <= bound + 1e-5).all())

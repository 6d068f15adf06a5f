"""Sampled recall against the truth, and the bound that must always hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attn.estimate import bound_missed_share, sample_recall
from sparse_attn.select.base import Limit, Tail
from sparse_attn.select.centroid import select
from sparse_attn.torch_backend import attend
from tests.sparse_attn.inputs import SCALE, clustered_layer, random_qkv

NUM_KEYS = 400


def setup(
    seed: int, keys: int, spread: float, levels: int = 1
) -> tuple[Tensor, Tensor, Tail, Tensor, Tensor]:
    """q, k, tail, lse of what was read, and true recall [T, H], on a clustered layer."""
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=seed)
    q, _, _ = random_qkv(2, 1, seed=seed + 1, spread=spread)
    lse_steady = torch.full((2, 6), 1.0)
    selection = select(
        index, q, scale=SCALE, lse_steady=lse_steady, limit=Limit(keys=keys), levels=levels
    )
    body = slice(4, NUM_KEYS - 8)
    dense = attend(q, k[:, body], v[:, body], scale=SCALE).lse
    everything = torch.logaddexp(dense, lse_steady)
    missed = torch.zeros(2, 6)
    for token in range(2):
        for head in range(6):
            tail, g = selection.tail, head // 3
            unread = tail.log_mass[token, head] > -torch.inf
            runs = zip(tail.starts[g][unread], tail.sizes[g][unread], strict=True)
            slots = [s for start, size in runs for s in range(int(start), int(start + size))]
            scores = k[g, slots] @ q[token, head] * SCALE
            missed[token, head] = torch.exp(torch.logsumexp(scores, 0) - everything[token, head])
    recall = (1.0 - missed).clamp(min=1e-30, max=1.0)
    lse_read = everything + torch.log(recall)
    return q, k, selection.tail, lse_read, recall


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("keys", [0, 100])
def test_sampled_recall_is_unbiased(levels: int, keys: int) -> None:
    q, k, tail, lse_read, truth = setup(1, keys, 2.0, levels)
    generator = torch.Generator().manual_seed(0)
    samples = torch.stack(
        [
            sample_recall(q, k, tail, lse_read, scale=SCALE, num_strata=32, generator=generator)
            for _ in range(200)
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
    recall = sample_recall(q, k, tail, lse_read, scale=SCALE, num_strata=4, generator=generator)
    assert torch.equal(recall, torch.ones(2, 6))


def test_the_same_seed_draws_the_same_sample() -> None:
    q, k, tail, lse_read, _ = setup(3, 50, 2.0)

    def run(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample_recall(q, k, tail, lse_read, scale=SCALE, num_strata=8, generator=generator)

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
    bound = bound_missed_share(q, tail, lse_read, scale=SCALE)
    assert bool((1.0 - truth <= bound + 1e-5).all())

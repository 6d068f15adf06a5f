"""The next token: greedy, temperature, top-p, seeds."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from orchestrator.errors import NotFinite, UsageError
from orchestrator.model.sampler import find_greatest, make_generator, sample
from orchestrator.types import Sampling

LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))


def draw(sampling: Sampling, num_draws: int) -> list[int]:
    generator = make_generator(sampling)
    return [sample(LOGITS, sampling, generator) for _ in range(num_draws)]


def test_greedy_takes_the_first_of_the_best() -> None:
    assert draw(Sampling(), 3) == [1, 1, 1]
    tied = torch.tensor([0.0, 2.0, 2.0])
    assert sample(tied, Sampling(), make_generator(Sampling())) == 1


@pytest.mark.parametrize("vocab", [1, 7, 96, 1024, 2051])
def test_the_greatest_is_the_first_of_equals(vocab: int) -> None:
    """Within a part that is searched by itself, and in several."""
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)).round()
    logits[2] = -math.inf
    values, ids = find_greatest(logits)
    assert torch.equal(values, logits.amax(dim=1))
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_chooses_nothing(temperature: float, wrong: float) -> None:
    logits = torch.tensor([0.0, 2.0, wrong, 1.0])
    sampling = Sampling(temperature=temperature)
    with pytest.raises(NotFinite, match=r"greatest logit (nan|inf).*--dtype float32"):
        sample(logits, sampling, make_generator(sampling))


def test_frequencies_follow_the_probabilities() -> None:
    counts = Counter(draw(Sampling(temperature=1.0), 2000))
    for token, probability in enumerate((0.1, 0.5, 0.15, 0.25)):
        assert counts[token] / 2000 == pytest.approx(probability, abs=0.04)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, {1}), (0.5, {1}), (0.6, {1, 3}), (0.85, {1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(draw(Sampling(temperature=1.0, top_p=top_p), 300)) == kept


def test_a_seed_repeats_and_another_differs() -> None:
    first = draw(Sampling(temperature=1.5, seed=7), 40)
    assert draw(Sampling(temperature=1.5, seed=7), 40) == first
    assert draw(Sampling(temperature=1.5, seed=8), 40) != first


def test_a_tiny_temperature_is_greedy() -> None:
    assert draw(Sampling(temperature=1e-40), 20) == [1] * 20


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [(-0.1, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, math.nan)],
)
def test_values_out_of_range_are_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(UsageError, match=r"^(temperature|top-p) .*; give [01] "):
        Sampling(temperature=temperature, top_p=top_p)

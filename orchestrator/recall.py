"""From the recall of some (query, layer) pairs to the mean over all of them, with an interval.

Owns which pairs are sampled and the statistics of their mean; pure numpy, knows no attention.
Of each round of a few queries every layer samples one, at random but spread evenly, so that each
query and each layer contributes alike. The mean over all pairs is
predicted by an additive model, layer effect + query effect (model-based prediction, Royall 1970;
Valliant, Dorfman and Royall 2000, chapter 2): layers differ far more than anything else, and the
interval must not charge for that. `docs/maths.md`, section 4.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Z95 = 1.959964


class Estimate(NamedTuple):
    """A mean and the standard error of its estimate."""

    mean: float
    standard_error: float

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95 % interval, cut at 0 and 1."""
        half = _Z95 * self.standard_error
        return max(0.0, self.mean - half), min(1.0, self.mean + half)


class PairSample:
    """Chooses pairs: of each round of `period` queries, every layer samples one.

    Which one is drawn anew for each round, evenly over the layers: a query is sampled in as many
    layers as any other, and queries and layers meet in ever new combinations.
    """

    def __init__(self, *, num_layers: int, period: int, seed: int) -> None:
        self._num_layers, self._period, self._seed = num_layers, period, seed
        self._rounds: dict[int, list[int]] = {}

    def chosen(self, layer: int, first_query: int, num_queries: int) -> list[int]:
        """Which of num_queries queries, counted from first_query, are sampled in a layer."""
        stop = first_query + num_queries
        rounds = range(first_query // self._period, -(-stop // self._period))
        sampled = (number * self._period + self._offsets(number)[layer] for number in rounds)
        return [query - first_query for query in sampled if first_query <= query < stop]

    def _offsets(self, number: int) -> list[int]:
        if number not in self._rounds:
            offsets = [layer % self._period for layer in range(self._num_layers)]
            random.Random(f"{self._seed}/{number}").shuffle(offsets)
            self._rounds[number] = offsets
        return self._rounds[number]


def predict_mean(
    values: Sequence[float],
    layers: Sequence[int],
    queries: Sequence[int],
    *,
    num_layers: int,
    num_queries: int,
) -> Estimate:
    """Mean over all num_layers * num_queries pairs, from the values of the sampled ones.

    values, layers, queries: one entry a sampled pair, at least one. With too few pairs to fit both
    effects the sample mean stands, with the spread of the sample as its error.
    """
    y = np.asarray(values, dtype=np.float64)
    sampled = _design(layers, queries, num_layers, num_queries)
    num_pairs = num_layers * num_queries
    coefficients, _, rank, _ = np.linalg.lstsq(sampled, y, rcond=None)
    freedom = len(y) - int(rank)
    if freedom < 2 or len(set(layers)) < num_layers:
        return Estimate(float(y.mean()), float(y.std()) / math.sqrt(len(y)))
    residual_variance = float(np.square(y - sampled @ coefficients).sum()) / freedom
    totals = np.concatenate([np.full(num_layers, num_queries), np.full(num_queries, num_layers)])
    unsampled = totals - sampled.sum(axis=0)
    mean = (float(y.sum()) + float(unsampled @ coefficients)) / num_pairs
    gram = sampled.T @ sampled  # one dimension short: layer and query effects share a constant
    spread = float(unsampled @ np.linalg.pinv(gram, rcond=1e-9, hermitian=True) @ unsampled)
    variance = residual_variance * (spread + num_pairs - len(y)) / num_pairs**2
    return Estimate(min(max(mean, 0.0), 1.0), math.sqrt(variance))


def _design(
    layers: Sequence[int], queries: Sequence[int], num_layers: int, num_queries: int
) -> NDArray[np.float64]:
    """[pairs, layers + queries]: 1 in the column of the pair's layer and of its query."""
    design = np.zeros((len(layers), num_layers + num_queries))
    rows = np.arange(len(layers))
    design[rows, np.asarray(layers)] = 1.0
    design[rows, num_layers + np.asarray(queries)] = 1.0
    return design

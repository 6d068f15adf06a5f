"""From the recall of some queries of each layer to the mean over all, with an interval.

Owns which queries are sampled and the statistics of their mean; pure numpy, knows no attention.
The sample is stratified (Cochran 1977, chapter 5): layers differ far more than anything else, and
the recall of a layer drifts from query to query, so each run of a few queries of each layer is a
stratum of its own, from which two are drawn. `docs/maths.md`, section 4.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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


class QuerySample:
    """Chooses queries: two of each 2 * period consecutive ones, anew for each layer and run."""

    def __init__(self, *, period: int, seed: int) -> None:
        self._period, self._seed = period, seed
        self._draws: dict[tuple[int, int], list[int]] = {}

    def chosen(self, layer: int, first_query: int, num_queries: int) -> list[int]:
        """Which of num_queries queries, counted from first_query, are sampled in a layer."""
        width, stop = 2 * self._period, first_query + num_queries
        sampled: list[int] = []
        for run in range(first_query // width, -(-stop // width)):
            sampled += self._draw(layer, run)
        return [query - first_query for query in sampled if first_query <= query < stop]

    def layers_of(self, query: int, num_layers: int) -> list[int]:
        """The layers in which a query is sampled."""
        run = query // (2 * self._period)
        return [layer for layer in range(num_layers) if query in self._draw(layer, run)]

    def _draw(self, layer: int, run: int) -> list[int]:
        if (layer, run) not in self._draws:
            width = 2 * self._period
            draw = random.Random(f"{self._seed}/{layer}/{run}").sample(range(width), 2)
            self._draws[layer, run] = sorted(run * width + offset for offset in draw)
        return self._draws[layer, run]


def estimate_mean(
    values: Sequence[float],
    layers: Sequence[int],
    queries: Sequence[int],
    *,
    num_queries: int,
    period: int,
) -> Estimate:
    """Mean over all queries of the layers, from the values of the sampled ones.

    values, layers, queries: one entry a sample, at least one of each layer. A layer's last run may
    be cut short: with one sample its spread is taken to be that of the others, with none it counts
    with the run before it. No finite-population correction is made: a value is itself an estimate,
    and its own error does not shrink with the share of queries that were sampled.
    """
    samples: dict[int, dict[int, list[float]]] = {}
    for value, layer, query in zip(values, layers, queries, strict=True):
        samples.setdefault(layer, {}).setdefault(query // (2 * period), []).append(value)
    pairs = [each for runs in samples.values() for each in runs.values() if len(each) > 1]
    # Without any pair: the greatest variance that numbers from 0 to 1 can have.
    usual = float(np.mean([np.var(each, ddof=1) for each in pairs])) if pairs else 0.25
    total = variance = 0.0
    for runs in samples.values():
        for run, each in runs.items():
            size = _run_size(run, runs, num_queries, 2 * period)
            spread = float(np.var(each, ddof=1)) if len(each) > 1 else usual
            total += size * float(np.mean(each))
            variance += size**2 * spread / len(each)
    num_pairs = num_queries * len(samples)
    return Estimate(min(max(total / num_pairs, 0.0), 1.0), math.sqrt(variance) / num_pairs)


def _run_size(run: int, sampled: dict[int, list[float]], num_queries: int, width: int) -> int:
    """Queries that a sampled run stands for: its own, and those of the runs without a sample that
    follow it (the first sampled run stands for those before it too).
    """
    first = run * width if run != min(sampled) else 0
    later = [other for other in sampled if other > run]
    stop = min(later) * width if later else num_queries
    return stop - first

"""Row A2, the monoid: parts over any disjoint partition merge to dense attention, in float32.

Owns a seeded run of many random partitions and selections, with the largest error seen; the
properties themselves are tests (tests/sparse_attn/test_state.py, test_centroid.py).
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from benchmarks.harness import print_row
from sparse_attn import reference
from sparse_attn.api import Backend, find_backend
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import Units, opening_limit
from sparse_attn.state import Part, empty_part, merge_parts
from sparse_attn.step import Scores, UnitsRead
from sparse_attn.torch_backend import attend
from tests.sparse_attn.inputs import SCALE, Layer, clustered_layer, random_qkv

NUM_PARTITIONS = 300
NUM_LAYERS = 60
NUM_KEYS, NUM_SINKS, NUM_WINDOW = 300, 4, 8
LIMIT = 1e-5
# Scores up to about 0.3, 3 and 20. At EXTREME they pass 100, where one unit in the last place of a
# float32 log-sum-exp is 1e-5 itself: reported, and no limit of the merge.
SPREADS = (0.1, 1.0, 5.0)
EXTREME = 20.0
BAR = (
    "any disjoint partition, any order, empty parts; exact through clusters and slots equals dense "
    "attention; sizes of read and estimated parts add up to all keys; 1e-5 in float32"
)


def main() -> int:
    """Measure and print."""
    partition_error = max(_partition_error(seed, SPREADS) for seed in range(NUM_PARTITIONS))
    extreme_error = max(_partition_error(seed, (EXTREME,)) for seed in range(NUM_PARTITIONS))
    results = [_selection_error(seed, levels) for seed in range(NUM_LAYERS) for levels in (1, 2)]
    selection_error = max(error for error, _ in results)
    wrong_sizes = sum(wrong for _, wrong in results)
    measured = {
        "partition_error_max": partition_error,
        "scores_beyond_100_error_max": extreme_error,
        "num_partitions": NUM_PARTITIONS,
        "all_clusters_error_max": selection_error,
        "selections_whose_sizes_do_not_add_up": wrong_sizes,
        "num_selections": len(results) * 4,
    }
    holds = partition_error <= LIMIT and selection_error <= LIMIT and wrong_sizes == 0
    return print_row(row="A2", measured=measured, bar=BAR, holds=holds)


def _partition_error(seed: int, spreads: tuple[float, ...]) -> float:
    """Largest difference from dense attention of one random partition, merged in random order."""
    rng = random.Random(seed)
    num_keys, num_parts = rng.randint(1, 200), rng.randint(1, 9)
    q, k, v = random_qkv(rng.randint(1, 3), num_keys, seed=seed, spread=rng.choice(spreads))
    owner = torch.tensor([rng.randrange(num_parts) for _ in range(num_keys)])
    parts = [attend(q, k[:, owner == p], v[:, owner == p], scale=SCALE) for p in range(num_parts)]
    parts.append(empty_part(q.shape[0], q.shape[1], q.shape[2]))
    rng.shuffle(parts)
    return _error(merge_parts(parts), reference.attend(q, k, v, scale=SCALE))


def _selection_error(seed: int, levels: int) -> tuple[float, int]:
    """Error when every cluster is read, and how many of four limits lose or repeat a key."""
    layer, backend = clustered_layer(NUM_KEYS, seed=seed), find_backend("torch")
    q, _, _ = random_qkv(2, 1, seed=seed + 1, spread=2.0)
    steady = attend(q, layer.steady_k, layer.steady_v, scale=SCALE)
    wrong = 0
    for limit in (Limit(keys=0), Limit(keys=50), Limit(mass=0.7), Limit(keys=NUM_KEYS)):
        read = _read(backend, layer, q, steady.lse, limit, levels)
        wrong += not _adds_up(read)
    k, v = (x.view(layer.steady_k.shape[0], NUM_KEYS, -1) for x in (layer.k, layer.v))
    dense = reference.attend(q, k, v, scale=SCALE)
    return _error(merge_parts([steady, read.part]), dense), wrong


def _read(
    backend: Backend, layer: Layer, q: Tensor, lse_steady: Tensor, limit: Limit, levels: int
) -> UnitsRead:
    """Select, read and estimate, as a question does."""

    def choose(units: Units, lse_other: Tensor, within: Limit) -> tuple[Scores, Tensor]:
        scores = backend.score_units(q, units, scale=SCALE)
        total = backend.merge_tree_lse(torch.stack([lse_other, scores.lse]))
        return scores, backend.take_units(
            scores, units, total=total, lse_steady=lse_steady, limit=within
        )

    units, closed, lse_other = layer.index.clusters, None, lse_steady
    if levels == 2:
        groups = layer.index.groups
        scores, opened = choose(groups, lse_steady, opening_limit(limit))
        left = backend.close_units(scores, groups, opened.any(dim=1))
        units, closed = layer.index.members(opened.any(dim=1)), (groups, left)
        lse_other = backend.merge_tree_lse(torch.stack([lse_steady, left.lse]))
    scores, taken = choose(units, lse_other, limit)
    return backend.attend_units(
        q,
        layer.k,
        layer.v,
        units,
        scores,
        taken,
        scale=SCALE,
        is_estimating=True,
        keeps=False,
        closed=closed,
    )


def _adds_up(read: UnitsRead) -> bool:
    """Whether read and estimated keys of every query are the whole body, each once."""
    num_body = NUM_KEYS - NUM_SINKS - NUM_WINDOW
    num_queries, num_heads, num_units = read.tail.log_mass.shape
    num_kv_heads = read.num_attended.shape[0]
    unread = (read.tail.log_mass > -math.inf).view(
        num_queries, num_kv_heads, num_heads // num_kv_heads, num_units
    )
    estimated = (unread * read.tail.sizes.unsqueeze(1)).sum(dim=-1)  # [T, G, H / G]
    total = estimated + read.num_attended.t().unsqueeze(-1)
    return bool((total == num_body).all())


def _error(a: Part, b: Part) -> float:
    """Largest difference of outputs, and of log-sum-exps relative to their size where above 1."""
    lse_error = (a.lse - b.lse).abs() / b.lse.abs().clamp(min=1.0)
    return max(float((a.out - b.out).abs().max()), float(lse_error.max()))

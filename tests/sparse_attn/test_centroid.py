"""The centroid look-up: what it reads, what stands for the rest, and that both add up."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attn import reference
from sparse_attn.api import find_backend
from sparse_attn.errors import InvalidBudget
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import expand_runs
from sparse_attn.select.take import descending
from tests.sparse_attn.inputs import SCALE, Layer, clustered_layer, hold, make_layer, random_qkv
from tests.sparse_attn.reading import Read

NUM_KEYS = 150
TORCH = find_backend("torch")


def run(layer: Layer, q: Tensor, limit: Limit, levels: int) -> Read:
    return Read(TORCH, [layer], q, limit, levels=levels)


def read_slots(read: Read, token: int, head: int) -> list[int]:
    """Slots that one query attends to."""
    units, taken = read.units[0], read.taken[0]
    return _slots_of(units.starts[head], units.sizes[head], taken[head, token])


def unread_slots(read: Read, token: int, head: int) -> list[int]:
    """Slots that the tail stands for, for one query and the first query head of a KV head."""
    tail = read.reads[0].tail
    is_unread = tail.log_mass[token, head * 3] > -math.inf
    return _slots_of(tail.starts[head], tail.sizes[head], is_unread)


def _slots_of(starts: Tensor, sizes: Tensor, chosen: Tensor) -> list[int]:
    runs = zip(starts[chosen].tolist(), sizes[chosen].tolist(), strict=True)
    return [slot for start, size in runs for slot in range(start, start + size)]


LIMITS = (Limit(keys=0), Limit(keys=24), Limit(keys=10_000), Limit(mass=0.5), Limit(mass=1.0))


@settings(deadline=None, max_examples=40)
@given(
    limit=st.sampled_from(LIMITS),
    levels=st.sampled_from([1, 2]),
    num_tokens=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.3, 3.0]),
)
def test_read_and_estimated_parts_add_up_to_every_key(
    limit: Limit, levels: int, num_tokens: int, seed: int, spread: float
) -> None:
    layer = hold(make_layer([NUM_KEYS, 40], seed=seed))
    q, _, _ = random_qkv(num_tokens, 1, seed=seed + 1, spread=spread)
    found = run(layer, q, limit, levels)
    for token in range(num_tokens):
        for head in range(2):
            read = read_slots(found, token, head)
            assert len(read) == int(found.num_attended[head, token])
            assert sorted(read + unread_slots(found, token, head)) == layer.body[head]
            if limit.keys is not None:
                assert len(read) <= limit.keys


def test_a_tile_selects_for_each_query_what_the_query_alone_selects() -> None:
    layer = clustered_layer(NUM_KEYS, seed=2)
    q, _, _ = random_qkv(5, 1, seed=3, spread=3.0)
    together = run(layer, q, Limit(keys=40), 1)
    for token in range(5):
        alone = run(layer, q[token : token + 1], Limit(keys=40), 1)
        for head in range(2):
            assert read_slots(together, token, head) == read_slots(alone, 0, head)


def test_the_clusters_read_are_those_of_greatest_share_over_the_root_of_their_size() -> None:
    layer = clustered_layer(NUM_KEYS, seed=4)
    q, _, _ = random_qkv(1, 1, seed=5, spread=3.0)
    read, clusters = run(layer, q, Limit(keys=40), 1), layer.index.clusters
    total = torch.logaddexp(torch.logsumexp(read.scores[0].log_mass, dim=-1), read.lse_steady)
    torch.testing.assert_close(read.total, total)
    share = torch.exp(read.scores[0].log_mass - total.unsqueeze(-1))[0].view(2, 3, -1).sum(dim=1)
    benefit = share / clusters.sizes.clamp(min=1).sqrt()
    for head in range(2):
        is_read = read.taken[0][head, 0]
        assert int(is_read.sum()) > 2
        assert bool((benefit[head][is_read] >= benefit[head][~is_read].max()).all())


def test_mass_reads_enough_for_every_head_of_the_group() -> None:
    layer = clustered_layer(NUM_KEYS, seed=6)
    q, _, _ = random_qkv(2, 1, seed=7, spread=2.0)
    read = run(layer, q, Limit(mass=0.8), 1)
    unread = torch.logsumexp(read.reads[0].tail.log_mass, dim=-1)
    missed = torch.exp(unread - read.total)
    assert bool((missed <= 0.2 + 1e-5).all())
    # The last one taken was needed: without it some head of the group would be short.
    units, ranks = layer.index.clusters, TORCH.rank_units
    benefit = ranks(read.scores[0], units, total=read.total).benefit
    shares = torch.exp(read.scores[0].log_mass - read.total.unsqueeze(-1)).view(2, 2, 3, -1)
    for token in range(2):
        for head in range(2):
            taken = read.taken[0][head, token]
            last = int(benefit[head, token].masked_fill(~taken, math.inf).argmin())
            short = missed.view(2, 2, 3)[token, head] + shares[token, head, :, last]
            assert float(short.max()) > 0.2 - 1e-5


@pytest.mark.parametrize("name", ["torch", "native"])
def test_equal_scores_take_the_lowest_slots(name: str) -> None:
    layer = clustered_layer(64, num_sinks=0, num_window=0)
    same, backend = layer.index.clusters, find_backend(name)
    flat = replace(
        same,
        centroids=torch.zeros_like(same.centroids),
        variances=torch.zeros_like(same.variances),
        log_sizes=torch.where(same.sizes > 0, 0.0, -math.inf),
        critical=torch.zeros_like(same.critical),
        rank_weights=torch.ones_like(same.rank_weights),
    )
    scores = backend.score_units(torch.ones(1, 6, 16), flat, scale=SCALE)
    limit = Limit(keys=int(same.sizes[:, :2].sum(dim=1).max()))
    taken = backend.take_units(
        scores, flat, total=scores.lse, lse_steady=torch.zeros(1, 6), limit=limit
    )
    for head in range(2):
        columns = taken[head, 0].nonzero().squeeze(1).tolist()
        assert len(columns) >= 1
        assert columns == list(range(len(columns)))


def test_order_is_that_of_a_stable_descending_sort() -> None:
    benefit = torch.rand(3, 5, 200, generator=torch.Generator().manual_seed(0))
    benefit[:, :, ::7] = 0.25
    benefit[:, :, 1::9] = 0.0
    expected = benefit.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(descending(benefit), expected)


def test_expand_runs_pads_heads_of_different_length() -> None:
    starts = torch.tensor([[0, 3, 5], [0, 4, 4]])
    sizes = torch.tensor([[3, 2, 4], [4, 0, 1]])
    taken = torch.tensor([[True, False, True], [False, True, True]])
    members, run = expand_runs(starts, sizes, taken)
    assert members.tolist() == [[0, 1, 2, 5, 6, 7, 8], [4, -1, -1, -1, -1, -1, -1]]
    assert run[0].tolist() == [0, 0, 0, 2, 2, 2, 2]


def test_expand_runs_of_nothing_is_empty() -> None:
    starts = torch.zeros(2, 3, dtype=torch.int64)
    members, _ = expand_runs(starts, starts + 1, torch.zeros(2, 3, dtype=torch.bool))
    assert members.shape == (2, 0)


def test_massive_keys_leave_every_number_finite() -> None:
    layer = clustered_layer(NUM_KEYS, seed=8)
    q, _, _ = random_qkv(1, 1, seed=9, spread=1e3)
    for levels in (1, 2):
        read = run(layer, q, Limit(keys=24), levels)
        assert not bool(torch.isnan(read.reads[0].tail.log_mass).any())
        assert bool(torch.isfinite(read.part.out).all())


def test_members_are_the_clusters_of_the_groups_that_are_opened() -> None:
    index = hold(make_layer([NUM_KEYS, 40, 90], seed=10)).index
    opened = torch.rand(index.groups.sizes.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    opened &= index.groups.sizes > 0
    members = index.members(opened)
    for g in range(2):
        columns = [
            column
            for first, count, is_open in zip(
                index.group_starts[g].tolist(),
                index.group_counts[g].tolist(),
                opened[g].tolist(),
                strict=True,
            )
            if is_open
            for column in range(first, first + count)
        ]
        own = members.sizes[g] > 0
        assert members.ids[g][own].tolist() == index.clusters.ids[g, columns].tolist()
        assert members.starts[g][own].tolist() == index.clusters.starts[g, columns].tolist()
        rows = members.rows(members.centroids, g, slice(0, len(columns)))
        assert torch.equal(rows, index.clusters.centroids[g, columns])
        bounds, fold = index.clusters.bounds[g], torch.tensor(columns)
        expected = [int((fold < bound).sum()) for bound in bounds.tolist()]
        assert members.bounds[g].tolist() == expected


@pytest.mark.parametrize(
    ("keys", "mass"),
    [(None, None), (3, 0.5), (-1, None), (None, 0.0), (None, 1.5), (None, math.nan)],
)
def test_limits_that_mean_nothing_are_refused(keys: int | None, mass: float | None) -> None:
    with pytest.raises(InvalidBudget):
        Limit(keys=keys, mass=mass)


def test_estimated_mass_of_one_key_clusters_is_exact() -> None:
    """A cluster of one key has no spread: its estimate is its score."""
    q, k, _ = random_qkv(1, 1, seed=10, num_heads=3, num_kv_heads=1)
    one = (k[0], torch.zeros_like(k[0]), torch.zeros(1), torch.zeros(1))
    log_mass, _ = reference.score_units(q, *one, scale=SCALE)
    torch.testing.assert_close(log_mass[0, :, 0], (q[0] @ k[0, 0]) * SCALE)

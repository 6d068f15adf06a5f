"""The centroid look-up: what it reads, what stands for the rest, and that both add up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attn import reference
from sparse_attn.errors import InvalidBudget
from sparse_attn.select.base import Limit, Selection
from sparse_attn.select.centroid import (
    CentroidIndex,
    _descending,
    expand_runs,
    select,
    select_nothing,
)
from sparse_attn.state import Part, merge_parts
from sparse_attn.torch_backend import attend, attend_estimated, attend_slots
from tests.sparse_attn.inputs import SCALE, clustered_layer, random_qkv

NUM_KEYS, NUM_SINKS, NUM_WINDOW = 150, 4, 8


def steady_part(q: Tensor, k: Tensor, v: Tensor) -> Part:
    keys, values = (
        torch.cat([x[:, :NUM_SINKS], x[:, NUM_KEYS - NUM_WINDOW :]], dim=1) for x in (k, v)
    )
    return attend(q, keys, values, scale=SCALE)


def run_select(
    index: CentroidIndex, q: Tensor, k: Tensor, v: Tensor, limit: Limit, levels: int
) -> Selection:
    return select(
        index, q, scale=SCALE, lse_steady=steady_part(q, k, v).lse, limit=limit, levels=levels
    )


def read_slots(selection: Selection, token: int, head: int) -> list[int]:
    """Slots that one query attends to, through `visible`."""
    slots = selection.slots[head]
    seen = slots >= 0
    if selection.visible is not None:
        seen = seen & selection.visible[head, token]
    return slots[seen].tolist()


def unread_slots(selection: Selection, token: int, head: int, per_group: int = 3) -> list[int]:
    """Slots that the tail stands for, for one query and the first query head of a KV head."""
    tail = selection.tail
    is_unread = tail.log_mass[token, head * per_group] > -math.inf
    runs = zip(tail.starts[head][is_unread], tail.sizes[head][is_unread], strict=True)
    return [slot for start, size in runs for slot in range(int(start), int(start + size))]


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
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=seed)
    q, _, _ = random_qkv(num_tokens, 1, seed=seed + 1, spread=spread)
    selection = run_select(index, q, k, v, limit, levels)
    body = list(range(NUM_SINKS, NUM_KEYS - NUM_WINDOW))
    for token in range(num_tokens):
        for head in range(2):
            read = read_slots(selection, token, head)
            assert sorted(read + unread_slots(selection, token, head)) == body
            if limit.keys is not None:
                assert len(read) <= limit.keys


@settings(deadline=None, max_examples=20)
@given(levels=st.sampled_from([1, 2]), num_tokens=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_reading_everything_through_clusters_is_dense_attention(
    levels: int, num_tokens: int, seed: int
) -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=seed)
    q, _, _ = random_qkv(num_tokens, 1, seed=seed + 1, spread=2.0)
    selection = run_select(index, q, k, v, Limit(keys=NUM_KEYS), levels)
    part, _ = attend_slots(q, k, v, selection.slots, visible=selection.visible, scale=SCALE)
    tail = attend_estimated(selection.tail.log_mass, selection.value_sums, selection.tail.sizes)
    ours = merge_parts([steady_part(q, k, v), part, tail])
    dense = reference.attend(q, k, v, scale=SCALE)
    torch.testing.assert_close(ours.out, dense.out, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.lse, dense.lse, atol=1e-5, rtol=0)


def test_a_tile_selects_for_each_query_what_the_query_alone_selects() -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=2)
    q, _, _ = random_qkv(5, 1, seed=3, spread=3.0)
    together = run_select(index, q, k, v, Limit(keys=40), 1)
    for token in range(5):
        alone = run_select(index, q[token : token + 1], k, v, Limit(keys=40), 1)
        for head in range(2):
            assert read_slots(together, token, head) == read_slots(alone, 0, head)


def test_the_clusters_read_are_those_of_greatest_share_over_the_root_of_their_size() -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=4)
    q, _, _ = random_qkv(1, 1, seed=5, spread=3.0)
    lse = steady_part(q, k, v).lse
    everything = select_nothing(index, q, scale=SCALE).tail.log_mass
    total = torch.logaddexp(torch.logsumexp(everything, dim=-1), lse)
    share = torch.exp(everything - total.unsqueeze(-1))[0].view(2, 3, -1).sum(dim=1)
    benefit = share / index.clusters.sizes.clamp(min=1).sqrt()
    selection = run_select(index, q, k, v, Limit(keys=40), 1)
    for head in range(2):
        is_read = selection.tail.log_mass[0, head * 3] == -math.inf
        is_read &= index.clusters.sizes[head] > 0
        assert bool((benefit[head][is_read] >= benefit[head][~is_read].max()).all())


def test_mass_reads_enough_for_every_head_of_the_group() -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=6)
    q, _, _ = random_qkv(2, 1, seed=7, spread=2.0)
    steady = steady_part(q, k, v)
    selection = run_select(index, q, k, v, Limit(mass=0.8), 1)
    everything = torch.logsumexp(select_nothing(index, q, scale=SCALE).tail.log_mass, dim=-1)
    unread = torch.logsumexp(selection.tail.log_mass, dim=-1)
    missed = torch.exp(unread - torch.logaddexp(everything, steady.lse))
    assert bool((missed <= 0.2 + 1e-5).all())


def test_equal_scores_take_the_lowest_slots() -> None:
    _, _, index, _ = clustered_layer(64, num_sinks=0, num_window=0)
    same = index.clusters
    flat = CentroidIndex(
        clusters=type(same)(
            centroids=torch.zeros_like(same.centroids),
            variances=torch.zeros_like(same.variances),
            value_sums=same.value_sums,
            log_sizes=torch.where(same.sizes > 0, 0.0, -math.inf),
            critical=torch.zeros_like(same.critical),
            rank_weights=torch.ones_like(same.rank_weights),
            radii=same.radii,
            starts=same.starts,
            sizes=same.sizes,
        ),
        groups=index.groups,
        group_starts=index.group_starts,
        group_counts=index.group_counts,
    )
    q = torch.ones(1, 6, 16)
    limit = Limit(keys=int(same.sizes[:, :2].sum(dim=1).max()))
    selection = select(flat, q, scale=SCALE, lse_steady=torch.zeros(1, 6), limit=limit, levels=1)
    for head in range(2):
        read = selection.slots[head][selection.slots[head] >= 0].tolist()
        assert read == list(range(len(read)))


def test_order_is_that_of_a_stable_descending_sort() -> None:
    benefit = torch.rand(3, 5, 200, generator=torch.Generator().manual_seed(0))
    benefit[:, :, ::7] = 0.25
    benefit[:, :, 1::9] = 0.0
    expected = benefit.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(_descending(benefit), expected)


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
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=8)
    q, _, _ = random_qkv(1, 1, seed=9, spread=1e3)
    for levels in (1, 2):
        selection = run_select(index, q, k, v, Limit(keys=24), levels)
        assert not bool(torch.isnan(selection.tail.log_mass).any())


@pytest.mark.parametrize(
    ("keys", "mass"),
    [(None, None), (3, 0.5), (-1, None), (None, 0.0), (None, 1.5), (None, math.nan)],
)
def test_limits_that_mean_nothing_are_refused(keys: int | None, mass: float | None) -> None:
    with pytest.raises(InvalidBudget):
        Limit(keys=keys, mass=mass)


def test_estimated_mass_of_one_key_clusters_is_exact() -> None:
    """A cluster of one key has no spread: its estimate is its score."""
    q, k, _ = random_qkv(1, 1, seed=10)
    index = _single_key_index(k)
    log_mass = select_nothing(index, q, scale=SCALE).tail.log_mass
    expected = torch.einsum("hd,hd->h", q[0], k[:, 0].repeat_interleave(3, dim=0)) * SCALE
    torch.testing.assert_close(log_mass[0, :, 0], expected)


def _single_key_index(k: Tensor) -> CentroidIndex:
    from tests.sparse_attn.inputs import make_index

    one = torch.ones(2, 1, dtype=torch.int32)
    zero = torch.zeros(2, 1, dtype=torch.int32)
    flat = {"centroids": k, "value_sums": k, "variances": torch.zeros_like(k)}
    return make_index(
        {
            **flat,
            **{f"group_{name}": x for name, x in flat.items()},
            "radii": torch.zeros(2, 1),
            "group_radii": torch.zeros(2, 1),
            "cluster_starts": zero,
            "cluster_sizes": one,
            "group_starts": zero,
            "group_counts": one,
            "group_sizes": one,
        }
    )

"""The choice over lists of several callers is the choice of one who holds every unit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attn.folds import NUM_FOLDS
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import Units
from sparse_attn.select.lists import cut_lists, list_candidates, list_width, take_first
from sparse_attn.select.take import fits, quantised, take
from sparse_attn.step import Ranks

HEADS, GROUP, TOKENS = 2, 3, 2


def make_units(sizes: Tensor, ids: Tensor) -> Units:
    """Units of these sizes [G, U] of which nothing else is asked."""
    table = torch.zeros(*sizes.shape, 1)
    return Units.from_tables(
        centroids=table,
        variances=table,
        value_sums=table,
        radii=table[..., 0],
        starts=torch.zeros_like(sizes),
        sizes=sizes,
        bounds=torch.zeros(sizes.shape[0], NUM_FOLDS + 1),
        ids=ids,
    )


def random_ranks(num_units: int, sizes: Tensor, generator: torch.Generator) -> Ranks:
    """Benefits and shares with many ties, and steady shares."""
    shares = torch.rand(HEADS, GROUP, TOKENS, num_units, generator=generator).mul(8).floor() / 64
    shares.masked_fill_((sizes == 0).view(HEADS, 1, 1, -1), 0.0)
    steady = torch.rand(HEADS, GROUP, TOKENS, generator=generator) / 4
    return Ranks(shares.sum(dim=1) * 0.5, shares, steady)


def part_of(ranks: Ranks, columns: list[int]) -> Ranks:
    assert ranks.shares is not None
    return Ranks(ranks.benefit[..., columns], ranks.shares[..., columns], ranks.steady)


@settings(deadline=None, max_examples=150)
@given(
    folds=st.lists(st.integers(0, 7), min_size=1, max_size=40),
    limit=st.one_of(
        st.integers(0, 60).map(lambda keys: Limit(keys=keys)),
        st.floats(0.01, 1.0).map(lambda mass: Limit(mass=mass)),
    ),
    num_callers=st.sampled_from([2, 4, 8]),
    extra=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_the_union_of_cut_lists_is_the_choice_of_one_caller(
    folds: list[int], limit: Limit, num_callers: int, extra: int, seed: int
) -> None:
    assert_same_choice(folds, limit, num_callers, extra, seed)


@pytest.mark.parametrize("seed", range(60))
def test_ties_across_callers_go_to_the_lowest_id(seed: int) -> None:
    """Many units and a limit in the midst of them, which a search for simple cases seldom tries."""
    generator = torch.Generator().manual_seed(seed)
    folds = torch.randint(0, NUM_FOLDS, (30,), generator=generator).tolist()
    limit = Limit(keys=15 + seed % 30) if seed % 3 else Limit(mass=0.3 + seed / 150)
    assert_same_choice(folds, limit, (2, 4, 8)[seed % 3], seed % 2, seed)


def assert_same_choice(
    folds: list[int], limit: Limit, num_callers: int, extra: int, seed: int
) -> None:
    folds = sorted(folds)
    num_units, generator = len(folds), torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 6, (HEADS, num_units), generator=generator)
    ids = 3 * torch.arange(num_units).expand(HEADS, -1)
    ranks = random_ranks(num_units, sizes, generator)
    whole = take(ranks, sizes, limit)
    owned = [
        [u for u in range(num_units) if folds[u] % num_callers == c] for c in range(num_callers)
    ]
    units = [make_units(sizes[:, own], ids[:, own]) for own in owned]
    parts = [part_of(ranks, own) for own in owned]
    width = max(list_width(x.sizes, limit) for x in units) + extra
    lists = [list_candidates(own, x, width=width) for own, x in zip(parts, units, strict=True)]
    shares = torch.stack([x.shares for x in lists if x.shares is not None])
    found = torch.zeros_like(whole)
    for caller, own in enumerate(owned):
        assert lists[caller].benefit.shape[2] == width
        num_taken = cut_lists(
            torch.stack([x.benefit for x in lists]),
            torch.stack([x.sizes for x in lists]),
            torch.stack([x.ids for x in lists]),
            own=caller,
            limit=limit,
            shares=shares,
            steady=ranks.steady,
        )
        found[..., own] = take_first(lists[caller], num_taken, len(own))
    assert torch.equal(found, whole)


def test_a_limit_takes_in_order_until_it_is_reached() -> None:
    """The rule itself, on numbers that fit on a hand."""
    sizes = torch.tensor([[3, 2, 2, 1]])
    shares = torch.tensor([0.1, 0.4, 0.4, 0.05]).expand(1, 1, 1, -1)
    benefit = torch.tensor([[[0.1, 0.4, 0.4, 0.05]]])
    ranks = Ranks(benefit, shares, torch.tensor([[[0.05]]]))
    taken = {keys: take(ranks, sizes, Limit(keys=keys))[0, 0].tolist() for keys in range(9)}
    assert taken[1] == [False, False, False, False]
    assert taken[2] == taken[3] == [False, True, False, False]
    assert taken[4] == taken[6] == [False, True, True, False]  # the fourth fits, but is after
    assert taken[7] == [True, True, True, False]
    assert taken[8] == [True, True, True, True]
    by_mass = {
        mass: take(ranks, sizes, Limit(mass=mass))[0, 0].tolist() for mass in (0.04, 0.4, 0.5, 0.9)
    }
    assert by_mass[0.04] == [False, False, False, False]
    assert by_mass[0.4] == [False, True, False, False]
    assert by_mass[0.5] == [False, True, True, False]
    assert by_mass[0.9] == [True, True, True, False]


def test_mass_goes_on_until_every_head_has_enough() -> None:
    sizes = torch.ones(1, 1, 3, dtype=torch.int64)
    shares = torch.tensor([[[[0.9, 0.05, 0.05]], [[0.1, 0.1, 0.8]]]])
    steady = torch.zeros(1, 2, 1)
    assert fits(sizes, shares, steady, Limit(mass=0.85))[0, 0].tolist() == [True, True, True]
    assert fits(sizes, shares[:, :1], steady[:, :1], Limit(mass=0.85))[0, 0].tolist() == [
        True,
        False,
        False,
    ]


def test_sums_of_shares_do_not_depend_on_their_order() -> None:
    shares = torch.rand(500, generator=torch.Generator().manual_seed(0)) / 500
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert quantised(shares).sum() == quantised(shares[order]).sum()
    total = float(quantised(shares).sum()) / 2**40
    assert abs(total - float(shares.double().sum())) < 1e-9
    assert quantised(torch.tensor([float("nan"), 1.0])).tolist() == [0, 2**40]


def test_the_width_of_a_list_is_what_can_fit_and_one_more() -> None:
    sizes = torch.tensor([[5, 1, 2, 0], [4, 4, 4, 4]])
    assert list_width(sizes, Limit(keys=0)) == 1
    assert list_width(sizes, Limit(keys=3)) == 3
    assert list_width(sizes, Limit(keys=12)) == 4
    assert list_width(sizes, Limit(keys=1000)) == 4
    assert list_width(sizes, Limit(mass=0.5)) == 4
    assert list_width(sizes[:, :0], Limit(keys=3)) == 0

"""Parts form a monoid: any disjoint partition, any order, empty parts (row A2)."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.reference import attend
from sparse_attn.state import Part, empty_part, merge_parts
from tests.sparse_attn.inputs import SCALE, random_qkv

TOLERANCE = 1e-5


def assert_same(a: Part, b: Part) -> None:
    torch.testing.assert_close(a.out, b.out, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(a.lse, b.lse, atol=TOLERANCE, rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    num_tokens=st.integers(1, 3),
    owners=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    order=st.permutations(range(5)),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 2**16),
)
def test_any_partition_in_any_order_is_dense_attention(
    num_tokens: int, owners: list[int], order: list[int], spread: float, seed: int
) -> None:
    q, k, v = random_qkv(num_tokens, len(owners), seed=seed, spread=spread)
    owner = torch.tensor(owners)
    parts = [attend(q, k[:, owner == p], v[:, owner == p], scale=SCALE) for p in order]
    assert_same(merge_parts(parts), attend(q, k, v, scale=SCALE))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), sizes=st.tuples(*[st.integers(0, 7)] * 3))
def test_merging_is_associative(seed: int, sizes: tuple[int, int, int]) -> None:
    q, k, v = random_qkv(2, sum(sizes), seed=seed)
    keys, values = torch.split(k, list(sizes), dim=1), torch.split(v, list(sizes), dim=1)
    a, b, c = (attend(q, keys[i], values[i], scale=SCALE) for i in range(3))
    assert_same(merge_parts([merge_parts([a, b]), c]), merge_parts([a, merge_parts([b, c])]))


def test_the_empty_part_is_neutral() -> None:
    q, k, v = random_qkv(3, 11)
    part = attend(q, k, v, scale=SCALE)
    nothing = empty_part(3, 6, 16)
    assert_same(merge_parts([nothing, part, nothing]), part)


def test_two_empty_parts_stay_empty_without_nan() -> None:
    nothing = merge_parts([empty_part(2, 6, 16)] * 2)
    assert torch.equal(nothing.out, torch.zeros(2, 6, 16))
    assert bool((nothing.lse == -math.inf).all())


def test_scores_far_apart_do_not_overflow() -> None:
    q, k, v = random_qkv(1, 8, spread=1e4)
    parts = [attend(q, k[:, i : i + 1], v[:, i : i + 1], scale=SCALE) for i in range(8)]
    dense = attend(q, k, v, scale=SCALE)
    torch.testing.assert_close(merge_parts(parts).out, dense.out, atol=1e-2, rtol=0)
    torch.testing.assert_close(merge_parts(parts).lse, dense.lse, atol=0, rtol=1e-6)

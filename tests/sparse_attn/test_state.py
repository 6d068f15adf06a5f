"""Parts form a monoid: any disjoint partition, any order, empty parts (row A2)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.api import Backend, find_backend
from sparse_attn.reference import attend
from sparse_attn.state import Part, empty_part, log_add, merge_parts, merge_tree
from tests.sparse_attn.inputs import SCALE, random_qkv

TOLERANCE = 1e-5
BACKENDS = pytest.mark.parametrize(
    "backend", [find_backend("native"), find_backend("torch")], ids=["native", "torch"]
)


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


def stacked(num_parts: int, seed: int = 0) -> Part:
    """Parts [n, 3, 6, 16] whose values include signed zeros; some rows are empty."""
    generator = torch.Generator().manual_seed(seed)
    lse = 3 * torch.randn(num_parts, 3, 6, generator=generator)
    lse[torch.rand(lse.shape, generator=generator) < 0.3] = -math.inf
    out = torch.randn(num_parts, 3, 6, 16, generator=generator)
    out[..., 0] = -0.0
    out.masked_fill_((lse == -math.inf).unsqueeze(-1), 0.0)
    return Part(out, lse)


def assert_bits(a: Part, b: Part) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))


@BACKENDS
def test_an_empty_part_changes_no_bit(backend: Backend) -> None:
    parts = stacked(2)
    part, nothing = Part(parts.out[0], parts.lse[0]), empty_part(3, 6, 16)
    for merged in (
        backend.merge_parts([part, nothing]),
        backend.merge_parts([nothing, part]),
        backend.merge_tree(
            torch.stack([nothing.out, part.out, nothing.out]),
            torch.stack([nothing.lse, part.lse, nothing.lse]),
        ),
    ):
        assert_bits(merged, part)


@BACKENDS
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 5, 7, 8])
def test_the_tree_merges_as_one_after_another_does(backend: Backend, num_parts: int) -> None:
    parts = stacked(num_parts)
    whole = backend.merge_tree(*parts)
    assert_same(whole, merge_parts([Part(*x) for x in zip(*parts, strict=True)]))
    assert torch.equal(backend.merge_tree_lse(parts.lse), whole.lse)


@BACKENDS
def test_the_tree_of_residues_is_the_tree_of_everything(backend: Backend) -> None:
    parts = stacked(8)
    whole = backend.merge_tree(*parts)
    for num_callers in (2, 4, 8):
        own = []
        for caller in range(num_callers):
            nothing = torch.arange(8) % num_callers != caller
            out, lse = parts.out.clone(), parts.lse.clone()
            out[nothing], lse[nothing] = 0.0, -math.inf
            own.append(backend.merge_tree(out, lse))
        outs, lses = (torch.stack(x) for x in zip(*own, strict=True))
        assert_bits(backend.merge_tree(outs, lses), whole)
        assert torch.equal(backend.merge_tree_lse(lses), whole.lse)


@BACKENDS
def test_bits_of_a_row_do_not_depend_on_its_place(backend: Backend) -> None:
    parts = stacked(8, seed=1)
    whole = backend.merge_tree(*parts)
    pairs = backend.merge_parts([Part(*x) for x in zip(*parts, strict=True)])
    for heads in (slice(1, 3), slice(5, 6), slice(0, 5)):
        out, lse = parts.out[:, 1:, heads], parts.lse[:, 1:, heads]
        own = [Part(*x) for x in zip(out, lse, strict=True)]
        assert_bits(backend.merge_tree(out, lse), Part(*(x[1:, heads] for x in whole)))
        assert_bits(backend.merge_parts(own), Part(*(x[1:, heads] for x in pairs)))


@BACKENDS
def test_merging_leaves_its_arguments_as_they_were(backend: Backend) -> None:
    parts = stacked(4)
    before = Part(*(x.clone() for x in parts))
    backend.merge_tree(*parts)
    backend.merge_tree_lse(parts.lse)
    backend.merge_parts([Part(*x) for x in zip(*parts, strict=True)])
    assert_bits(parts, before)


def test_log_add_of_a_number_does_not_depend_on_its_place() -> None:
    a, b = 3 * torch.randn(2, 3000, generator=torch.Generator().manual_seed(2))
    whole = log_add(a, b)
    for first in range(0, 3000, 7):
        own = slice(first, first + 7)
        assert torch.equal(log_add(a[own].clone(), b[own].clone()), whole[own])


def test_log_add_is_logaddexp_and_hides_no_fault() -> None:
    a, b = 30 * torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_add(a, b), torch.logaddexp(a, b))
    assert log_add(torch.tensor(-math.inf), torch.tensor(-math.inf)) == -math.inf
    for pair in ((math.nan, 1.0), (1.0, math.nan), (math.nan, -math.inf)):
        assert log_add(*(torch.tensor(x) for x in pair)).isnan()
    nan = Part(torch.full((1, 1, 2), math.nan), torch.full((1, 1), math.nan))
    tree = merge_tree(torch.stack([nan.out, nan.out * 0]), torch.stack([nan.lse, nan.lse * 0]))
    assert bool(tree.out.isnan().all())


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

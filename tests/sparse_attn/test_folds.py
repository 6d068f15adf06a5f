"""Bits that do not depend on how many callers share the folds, on neighbours, or on threads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from sparse_attn import reference
from sparse_attn.api import Backend, find_backend
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid_build import CentroidParams
from sparse_attn.state import Part
from tests.sparse_attn.inputs import PARAMS, SCALE, Layer, hold, make_layer, random_qkv
from tests.sparse_attn.reading import Read, spread, together

NATIVE, TORCH, REFERENCE = (find_backend(name) for name in ("native", "torch", "reference"))
FAST = pytest.mark.parametrize("backend", [NATIVE, TORCH], ids=["native", "torch"])
# Segments of odd lengths; folds with none, one and two of them; a run longer than an item.
DOCUMENTS = {
    "odd": (70, 33, 64, 5, 90, 1, 64, 65, 77, 20, 130),
    "short": (70, 1),
    "long": (600, 520, 37),
    "steady": (12,),  # nothing outside the steady zone
}
DOCUMENT = pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS.keys())
CALLERS = (1, 2, 4, 8)


def assert_bits(a: Tensor, b: Tensor) -> None:
    """Equal to the last bit, signs of zeros included."""
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def assert_same_part(a: Part, b: Part) -> None:
    assert_bits(a.out, b.out)
    assert_bits(a.lse, b.lse)


@lru_cache(maxsize=64)
def split(
    lengths: tuple[int, ...],
    num_callers: int,
    dtype: torch.dtype = torch.float32,
    params: CentroidParams = PARAMS,
) -> list[Layer]:
    """What each of the callers holds of a document; changed by no test."""
    segments = make_layer(lengths, dtype=dtype, params=params)
    return [hold(segments, caller, num_callers) for caller in range(num_callers)]


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attend_runs(backend: Backend, layers: list[Layer], q: Tensor) -> tuple[Part, Tensor]:
    found = [backend.attend_runs(q, x.k, x.v, x.runs, scale=SCALE, keeps=True) for x in layers]
    part = together(backend, [part for part, _ in found])
    return part, spread(backend, layers, [kept for _, kept in found], part.lse)


def assert_same_runs(
    backend: Backend, lengths: tuple[int, ...], q: Tensor, *, threads: int
) -> None:
    """Every number of callers gives the bits of one, who has that many threads."""
    torch.set_num_threads(threads)
    whole, evidence = attend_runs(backend, split(lengths, 1, q.dtype), q)
    torch.set_num_threads(1)
    for num_callers in CALLERS:
        part, own_evidence = attend_runs(backend, split(lengths, num_callers, q.dtype), q)
        assert_same_part(part, whole)
        assert_bits(own_evidence, evidence)


@FAST
@DOCUMENT
@pytest.mark.parametrize("num_tokens", [1, 3, 5, 40])
@pytest.mark.usefixtures("threads")
def test_runs_of_any_number_of_callers(
    backend: Backend, lengths: tuple[int, ...], num_tokens: int
) -> None:
    q, _, _ = random_qkv(num_tokens, 1, spread=2.0)
    # A product of torch may depend on its threads; where the native backend multiplies, none does.
    is_own = backend is NATIVE and num_tokens < 4
    assert_same_runs(backend, lengths, q, threads=2 if is_own else 1)


@FAST
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.usefixtures("threads")
def test_runs_of_half_numbers(backend: Backend, num_tokens: int) -> None:
    q = random_qkv(num_tokens, 1, spread=2.0)[0].bfloat16()
    assert_same_runs(backend, DOCUMENTS["long"], q, threads=1)


@pytest.mark.parametrize(
    "backend", [NATIVE, TORCH, REFERENCE], ids=["native", "torch", "reference"]
)
@DOCUMENT
@pytest.mark.parametrize("num_tokens", [1, 3, 5])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_runs_are_dense_attention(
    backend: Backend, lengths: tuple[int, ...], num_tokens: int, head_dim: int
) -> None:
    layer = hold(make_layer(lengths, head_dim=head_dim))
    q, _, _ = random_qkv(num_tokens, 1, head_dim=head_dim, spread=2.0)
    part, evidence = attend_runs(backend, [layer], q)
    expected = torch.zeros(len(layer.k))
    for h in range(6):
        slots = layer.body[h // 3]
        k, v = layer.k[slots].unsqueeze(0), layer.v[slots].unsqueeze(0)
        dense = reference.attend(q[:, h : h + 1], k, v, scale=SCALE)
        torch.testing.assert_close(part.out[:, h], dense.out[:, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(part.lse[:, h], dense.lse[:, 0], atol=1e-5, rtol=1e-5)
        scores = layer.k[slots] @ q[-1, h] * SCALE
        expected[slots] += torch.exp(scores - dense.lse[-1, 0])
    torch.testing.assert_close(evidence, expected, atol=1e-5, rtol=1e-4)


LIMITS = (Limit(keys=0), Limit(keys=90), Limit(keys=10_000), Limit(mass=0.6), Limit(mass=1.0))
LIMIT = pytest.mark.parametrize("limit", LIMITS, ids=str)


def assert_same_read(a: Read, b: Read) -> None:
    assert_bits(a.total, b.total)
    assert_same_part(a.part, b.part)
    assert_bits(a.lse_read, b.lse_read)
    assert_bits(a.evidence, b.evidence)
    assert a.num_attended.tolist() == b.num_attended.tolist()
    assert a.num_read.tolist() == b.num_read.tolist()


@FAST
@DOCUMENT
@LIMIT
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.usefixtures("threads")
def test_units_of_any_number_of_callers(
    backend: Backend,
    lengths: tuple[int, ...],
    limit: Limit,
    levels: int,
    num_tokens: int,
) -> None:
    dtype = torch.bfloat16 if num_tokens == 5 else torch.float32
    q = random_qkv(num_tokens, 1, seed=1, spread=2.0)[0].to(dtype)
    torch.set_num_threads(2 if backend is NATIVE else 1)
    whole = Read(backend, split(lengths, 1, dtype), q, limit, levels=levels)
    torch.set_num_threads(1)
    for num_callers in CALLERS:
        layers = split(lengths, num_callers, dtype)
        assert_same_read(Read(backend, layers, q, limit, levels=levels), whole)


@FAST
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("num_callers", CALLERS[1:])
def test_folds_of_more_units_than_an_item_has(
    backend: Backend, levels: int, num_callers: int
) -> None:
    """Items are counted from the beginning of a fold, whichever column that is."""
    params = CentroidParams(keys_per_cluster=1, clusters_per_group=2)
    lengths = (310, 590, 33)
    q, _, _ = random_qkv(2, 1, seed=3, spread=2.0)
    whole, own = (
        Read(backend, split(lengths, n, torch.float32, params), q, Limit(keys=300), levels=levels)
        for n in (1, num_callers)
    )
    assert int(split(lengths, 1, torch.float32, params)[0].index.clusters.bounds.diff().max()) > 512
    assert_same_read(own, whole)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.usefixtures("threads")
def test_a_token_of_a_tile_has_the_bits_that_it_has_alone_and_with_any_threads(
    num_tokens: int,
) -> None:
    (layer,) = split(DOCUMENTS["long"], 1)
    q, _, _ = random_qkv(11, 1, seed=2, spread=2.0)
    few, _ = attend_runs(NATIVE, [layer], q[:num_tokens])
    tile = Read(NATIVE, [layer], q, Limit(keys=200))
    for token in range(11):
        torch.set_num_threads(1 + token % 3)
        own = q[token : token + 1]
        alone = Read(NATIVE, [layer], own, Limit(keys=200))
        assert_bits(alone.part.out[0], tile.part.out[token])
        assert_bits(alone.lse_read[0], tile.lse_read[token])
        if token < num_tokens:
            assert_bits(attend_runs(NATIVE, [layer], own)[0].out[0], few.out[token])

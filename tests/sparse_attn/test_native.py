"""The native kernels against the composed operations, which have their own tests against loops."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_attn import reference
from sparse_attn.api import Backend, find_backend
from sparse_attn.errors import BackendUnknown, ShapeMismatch
from sparse_attn.folds import Kept
from sparse_attn.native import library
from sparse_attn.native.structs import KeysOf, RunsOf, UnitsOf
from sparse_attn.select.base import Limit, Tail
from sparse_attn.select.centroid import Units
from sparse_attn.state import Part
from tests.sparse_attn.inputs import SCALE, Layer, clustered_layer, hold, make_layer, random_qkv
from tests.sparse_attn.reading import Read

NATIVE, TORCH, REFERENCE = (find_backend(name) for name in ("native", "torch", "reference"))
GROUPS = ((1, 1), (4, 4), (6, 2), (7, 1), (16, 1))
NUM_KEYS = 700
LIMITS = (Limit(keys=0), Limit(keys=90), Limit(keys=10_000), Limit(mass=0.6), Limit(mass=1.0))


def assert_same(a: Part, b: Part, *, atol: float = 5e-6) -> None:
    torch.testing.assert_close(a.out, b.out, atol=atol, rtol=1e-5)
    torch.testing.assert_close(a.lse, b.lse, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("num_past", [0, 1, 63, 65])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPS)
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_attend_prefix(num_past: int, num_heads: int, num_kv_heads: int, num_tokens: int) -> None:
    num_slots = num_past + num_tokens
    q, k, v = random_qkv(num_tokens, num_slots, num_heads=num_heads, num_kv_heads=num_kv_heads)
    # The tail of an answer in progress is a view of a longer buffer.
    k, v = (torch.cat([x, x], dim=1)[:, :num_slots] for x in (k, v))
    ours = NATIVE.attend_prefix(q, k, v, past=num_past, scale=SCALE)
    assert_same(ours, REFERENCE.attend_prefix(q, k, v, past=num_past, scale=SCALE))


@pytest.mark.parametrize("lengths", [(13,), (75, 76, 1), (511 + 12,), (513 + 12,), (1312, 5)])
@pytest.mark.parametrize("num_tokens", [1, 3, 6])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_attend_runs(lengths: tuple[int, ...], num_tokens: int, head_dim: int) -> None:
    layer = hold(make_layer(lengths, head_dim=head_dim))
    q, _, _ = random_qkv(num_tokens, 1, head_dim=head_dim)
    found = []
    for backend in (NATIVE, TORCH):
        part, kept = backend.attend_runs(q, layer.k, layer.v, layer.runs, scale=SCALE, keeps=True)
        alone, nothing = backend.attend_runs(
            q, layer.k, layer.v, layer.runs, scale=SCALE, keeps=False
        )
        assert torch.equal(alone.out, part.out)
        assert nothing is None
        found.append((part, evidence_of(backend, layer, kept, part.lse)))
    assert_same(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


def evidence_of(backend: Backend, layer: Layer, kept: Kept | None, lse: Tensor) -> Tensor:
    evidence = torch.zeros(len(layer.k))
    assert kept is not None
    backend.spread_evidence(evidence, kept, lse[-1])
    return evidence


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("is_estimating", [True, False])
def test_units(limit: Limit, levels: int, num_tokens: int, is_estimating: bool) -> None:
    layer = clustered_layer(NUM_KEYS, seed=3)
    q, _, _ = random_qkv(num_tokens, 1, seed=4, spread=2.0)
    ours, theirs = (
        Read(backend, [layer], q, limit, levels=levels, is_estimating=is_estimating)
        for backend in (NATIVE, TORCH)
    )
    assert_same(ours.part, theirs.part, atol=1e-5)
    torch.testing.assert_close(ours.lse_read, theirs.lse_read, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.evidence, theirs.evidence, atol=1e-5, rtol=1e-4)
    assert ours.num_attended.tolist() == theirs.num_attended.tolist()
    assert ours.num_read.tolist() == theirs.num_read.tolist()
    assert_same_tails(ours.reads[0].tail, theirs.reads[0].tail)


def assert_same_tails(ours: Tail, theirs: Tail) -> None:
    """The same unread units with the same masses; padding may differ."""
    torch.testing.assert_close(
        torch.logsumexp(ours.log_mass, dim=-1), torch.logsumexp(theirs.log_mass, dim=-1)
    )
    num_tokens, num_heads, _ = ours.log_mass.shape
    for token in range(num_tokens):
        for head in range(num_heads):
            assert unread_runs(ours, token, head) == unread_runs(theirs, token, head)


def unread_runs(tail: Tail, token: int, head: int) -> list[tuple[int, int]]:
    """First slot and size of every unit that stands for its keys."""
    is_unread = tail.log_mass[token, head] > -math.inf
    starts, sizes = tail.starts[head // 3][is_unread], tail.sizes[head // 3][is_unread]
    return sorted(zip(starts.tolist(), sizes.tolist(), strict=True))


@pytest.mark.parametrize(
    "backend", [NATIVE, TORCH, REFERENCE], ids=["native", "torch", "reference"]
)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reading_everything_is_dense_attention(
    backend: Backend, levels: int, dtype: torch.dtype
) -> None:
    layer = hold(make_layer([90, 61], seed=5, dtype=dtype))
    q, _, _ = random_qkv(2, 1, seed=6, spread=2.0)
    read = Read(backend, [layer], q, Limit(keys=NUM_KEYS), levels=levels)
    for head in range(6):
        slots = layer.body[head // 3]
        k, v = (x[slots].unsqueeze(0).float() for x in (layer.k, layer.v))
        dense = reference.attend(q[:, head : head + 1], k, v, scale=SCALE)
        torch.testing.assert_close(read.part.out[:, head], dense.out[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(read.lse_read[:, head], dense.lse[:, 0], atol=1e-5, rtol=0)
    for g in range(2):
        total = read.evidence[layer.body[g]].sum()
        torch.testing.assert_close(total, torch.tensor(3.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("levels", [1, 2])
def test_what_is_not_read_is_estimated_as_it_is_defined(num_tokens: int, levels: int) -> None:
    """All of a caller's folds against one sum over what was read and what stands for the rest."""
    layer = hold(make_layer([90, 61, 40], seed=7))
    q, _, _ = random_qkv(num_tokens, 1, seed=8, spread=2.0)
    read = Read(NATIVE, [layer], q, Limit(keys=40), levels=levels)
    tail, index = read.reads[0].tail, layer.index
    sums = [table_rows(read.units[0])] + ([index.groups.value_sums] if levels == 2 else [])
    value_sums = torch.cat(sums, dim=1).float()
    for t in range(num_tokens):
        for head in range(6):
            g = head // 3
            unread = {
                slot
                for start, size in unread_runs(tail, t, head)
                for slot in range(start, start + size)
            }
            slots = [slot for slot in layer.body[g] if slot not in unread]
            row = q[t : t + 1, head : head + 1]
            part = reference.attend(
                row, layer.k[slots].unsqueeze(0), layer.v[slots].unsqueeze(0), scale=SCALE
            )
            rest = reference.attend_estimated(
                tail.log_mass[t, head].view(1, 1, -1), value_sums[g], tail.sizes[g]
            )
            whole = TORCH.merge_parts([part, rest])
            torch.testing.assert_close(read.part.out[t, head], whole.out[0, 0], atol=1e-5, rtol=0)
            torch.testing.assert_close(read.part.lse[t, head], whole.lse[0, 0], atol=1e-5, rtol=0)
            torch.testing.assert_close(read.lse_read[t, head], part.lse[0, 0], atol=1e-5, rtol=0)


def table_rows(units: Units) -> Tensor:
    """The value sums [G, U, D] of units that may be columns of a larger table."""
    if units.columns is None:
        return units.value_sums
    columns = units.columns.clamp(min=0).unsqueeze(-1).expand(-1, -1, units.value_sums.shape[2])
    return units.value_sums.gather(1, columns)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_head_dims(head_dim: int) -> None:
    layer = clustered_layer(NUM_KEYS, seed=7, head_dim=head_dim)
    q, _, _ = random_qkv(1, 1, seed=8, head_dim=head_dim)
    ours, theirs = (Read(backend, [layer], q, Limit(keys=90)) for backend in (NATIVE, TORCH))
    torch.testing.assert_close(ours.part.out, theirs.part.out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("with_mass", [False, True])
def test_ranks(with_mass: bool) -> None:
    layer = hold(make_layer([300, 61], seed=9))
    q, _, _ = random_qkv(3, 1, seed=10, spread=2.0)
    units = layer.index.clusters
    found = []
    for backend in (NATIVE, TORCH):
        scores = backend.score_units(q, units, scale=SCALE)
        total = scores.lse + 0.5
        found.append(
            backend.rank_units(
                scores, units, total=total, lse_steady=scores.lse if with_mass else None
            )
        )
    assert (found[0].shares is not None) == (found[0].steady is not None) == with_mass
    for ours, theirs in zip(*found, strict=True):
        if ours is not None:
            assert theirs is not None
            torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


def test_scores_beyond_what_exp_can_hold_stay_finite() -> None:
    layer = clustered_layer(NUM_KEYS, seed=13)
    q, _, _ = random_qkv(1, 1, seed=14, spread=1e3)
    for levels in (1, 2):
        read = Read(NATIVE, [layer], q, Limit(keys=90), levels=levels)
        assert bool(torch.isfinite(read.part.out).all())
        assert bool(torch.isfinite(read.evidence).all())


def test_a_library_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = library.load.__wrapped__
    monkeypatch.setattr(library, "find_spec", lambda _: None)
    with pytest.raises(BackendUnknown, match="was not compiled here; it needs gcc 12"):
        load()
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"not a library")
    spec = spec_from_file_location("_kernels", broken)
    monkeypatch.setattr(library, "find_spec", lambda _: spec)
    with pytest.raises(BackendUnknown, match=r"cannot be loaded .*use --backend torch"):
        load()


def test_a_matrix_times_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(19)
    for num_rows, width in ((1, 1), (3, 16), (37, 50), (300, 576)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(1, width, generator=generator).to(dtype)
            weight = torch.randn(num_rows, width, generator=generator).to(dtype)
            bias = torch.randn(num_rows, generator=generator).to(dtype)
            ours = NATIVE.linear(x, weight, bias)
            exact = x.double() @ weight.double().T + bias.double()
            assert ours.dtype == dtype
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)
    # Several rows are a matrix product, which is torch's.
    monkeypatch.setattr(library, "products", None)
    several = torch.randn(2, 8, generator=generator)
    weight = torch.randn(4, 8, generator=generator)
    assert torch.equal(NATIVE.linear(several, weight), several @ weight.T)


def test_a_fault_in_numbers_is_not_hidden() -> None:
    layer = hold(make_layer([90, 61, 40], seed=20))
    q, _, _ = random_qkv(1, 1, seed=21)
    q[0, 0, 0] = math.nan
    body, _ = NATIVE.attend_runs(q, layer.k, layer.v, layer.runs, scale=SCALE, keeps=False)
    read = Read(NATIVE, [layer], q, Limit(keys=40))
    for out in (body.out, read.part.out):
        assert bool(out[0, 0].isnan().all())
        assert bool(out[0, 3:].isfinite().all())
    prefix = NATIVE.attend_prefix(q, layer.steady_k, layer.steady_v, past=11, scale=SCALE)
    assert bool(prefix.out[0, 0].isnan().all())


def test_what_the_kernels_cannot_read_is_refused_by_name() -> None:
    q, k, v = random_qkv(1, 8)
    with pytest.raises(ShapeMismatch, match=r"rows of one type on the CPU; use --backend torch"):
        NATIVE.attend_prefix(q, k, v.double(), past=7, scale=SCALE)
    with pytest.raises(ShapeMismatch, match=r"1 tokens after 8 over 8 slots"):
        NATIVE.attend_prefix(q, k, v, past=8, scale=SCALE)
    with pytest.raises(ShapeMismatch, match=r"weights \[4, 8\] torch.float32 times \[7\]"):
        NATIVE.linear(torch.ones(1, 7), torch.ones(4, 8))
    layer = clustered_layer(40)
    keys = KeysOf(layer.k, layer.v, 6, num_kv_heads=2)
    with pytest.raises(ShapeMismatch, match=r"contiguous ones of torch.float32 on the CPU"):
        library.attend_runs(keys, RunsOf(layer.runs), q.double(), keeps=False)
    with pytest.raises(ShapeMismatch, match=r"5 query heads over 2 KV heads"):
        NATIVE.attend_prefix(q[:, :5], k, v, past=7, scale=SCALE)
    with pytest.raises(ShapeMismatch, match=r"one float type and shape; ingest the document again"):
        UnitsOf(replace(layer.index.clusters, centroids=layer.index.clusters.radii), 3)

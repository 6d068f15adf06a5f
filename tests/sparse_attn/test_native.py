"""The native kernels against the composed operations, which have their own tests against loops."""

from __future__ import annotations

import math
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_attn import reference
from sparse_attn.api import Backend, find_backend
from sparse_attn.errors import BackendUnknown, ShapeMismatch
from sparse_attn.native import library
from sparse_attn.native.structs import KeysOf
from sparse_attn.select.base import Limit, Tail
from sparse_attn.select.centroid import CentroidIndex
from sparse_attn.state import Part, empty_part, merge_parts
from sparse_attn.step import Step
from tests.sparse_attn.inputs import SCALE, clustered_layer, random_qkv

NATIVE, TORCH, REFERENCE = (find_backend(name) for name in ("native", "torch", "reference"))
GROUPS = ((1, 1), (4, 4), (6, 2), (7, 1), (16, 1))
NUM_KEYS, NUM_SINKS, NUM_WINDOW = 700, 4, 8
LIMITS = (Limit(keys=0), Limit(keys=90), Limit(keys=10_000), Limit(mass=0.6), Limit(mass=1.0))


def assert_same(a: Part, b: Part, *, atol: float = 5e-6) -> None:
    torch.testing.assert_close(a.out, b.out, atol=atol, rtol=1e-5)
    torch.testing.assert_close(a.lse, b.lse, atol=atol, rtol=1e-5)


def steady_part(q: Tensor, k: Tensor, v: Tensor) -> Part:
    keys, values = (
        torch.cat([x[:, :NUM_SINKS], x[:, NUM_KEYS - NUM_WINDOW :]], dim=1) for x in (k, v)
    )
    return TORCH.attend(q, keys, values, scale=SCALE)


def run(
    backend: Backend,
    layer: tuple[Tensor, Tensor, CentroidIndex],
    q: Tensor,
    limit: Limit,
    levels: int,
    *,
    is_estimating: bool = True,
) -> tuple[Step, Tensor]:
    """A step, and the evidence that it left."""
    k, v, index = layer
    evidence = torch.zeros(k.shape[:2])
    step = backend.attend_selected(
        q,
        k,
        v,
        index,
        steady_part(q, k, v),
        scale=SCALE,
        limit=limit,
        levels=levels,
        is_estimating=is_estimating,
        evidence=evidence,
    )
    return step, evidence


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


@pytest.mark.parametrize("num_slots", [1, 63, 65, 511, 513, 1300])
@pytest.mark.parametrize("num_tokens", [1, 3, 6])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_attend_body(num_slots: int, num_tokens: int, head_dim: int) -> None:
    q, k, v = random_qkv(num_tokens, num_slots, head_dim=head_dim)
    steady = TORCH.attend(q, k[:, :5] + 1, v[:, :5], scale=SCALE)
    found = [torch.zeros(k.shape[:2]) for _ in range(2)]
    ours, theirs = (
        backend.attend_body(q, k, v, steady, scale=SCALE, evidence=evidence)
        for backend, evidence in zip((NATIVE, REFERENCE), found, strict=True)
    )
    assert_same(ours, theirs)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_attend_body_into_an_empty_part() -> None:
    q, k, v = random_qkv(1, 40)
    ours = NATIVE.attend_body(
        q, k, v, empty_part(1, 6, 16), scale=SCALE, evidence=torch.zeros(2, 40)
    )
    assert_same(ours, reference.attend(q, k, v, scale=SCALE))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("is_estimating", [True, False])
def test_attend_selected(limit: Limit, levels: int, num_tokens: int, is_estimating: bool) -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=3)
    q, _, _ = random_qkv(num_tokens, 1, seed=4, spread=2.0)
    (ours, our_evidence), (theirs, their_evidence) = (
        run(backend, (k, v, index), q, limit, levels, is_estimating=is_estimating)
        for backend in (NATIVE, TORCH)
    )
    torch.testing.assert_close(ours.out, theirs.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.lse_read, theirs.lse_read, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_evidence, their_evidence, atol=1e-5, rtol=1e-4)
    assert ours.num_attended.tolist() == theirs.num_attended.tolist()
    assert ours.num_read.tolist() == theirs.num_read.tolist()
    assert_same_tails(ours, theirs)
    if levels == 1:
        assert ours.lookup_bytes == theirs.lookup_bytes


def assert_same_tails(ours: Step, theirs: Step) -> None:
    """The same unread units with the same masses; padding may differ."""
    torch.testing.assert_close(
        torch.logsumexp(ours.tail.log_mass, dim=-1), torch.logsumexp(theirs.tail.log_mass, dim=-1)
    )
    num_tokens, num_heads, _ = ours.tail.log_mass.shape
    for token in range(num_tokens):
        for head in range(num_heads):
            assert unread_runs(ours, token, head) == unread_runs(theirs, token, head)


def unread_runs(step: Step, token: int, head: int) -> list[tuple[int, int]]:
    """First slot and size of every unit that stands for its keys."""
    tail = step.tail
    is_unread = tail.log_mass[token, head] > -math.inf
    starts, sizes = tail.starts[head // 3][is_unread], tail.sizes[head // 3][is_unread]
    return sorted(zip(starts.tolist(), sizes.tolist(), strict=True))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reading_everything_is_dense_attention(levels: int, dtype: torch.dtype) -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=5)
    q, _, _ = random_qkv(2, 1, seed=6, spread=2.0)
    k, v = k.to(dtype), v.to(dtype)
    step, evidence = run(NATIVE, (k, v, index), q, Limit(keys=NUM_KEYS), levels)
    dense = reference.attend(q, k, v, scale=SCALE)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # the steady part is rounded by torch
    torch.testing.assert_close(step.out, dense.out, atol=tolerance, rtol=0)
    torch.testing.assert_close(step.lse_read, dense.lse, atol=tolerance, rtol=0)
    steady = torch.exp(steady_part(q, k, v).lse[-1] - dense.lse[-1]).view(2, 3).sum(dim=1)
    torch.testing.assert_close(
        evidence.sum(dim=1) + steady, torch.full((2,), 3.0), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_head_dims(head_dim: int) -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=7, head_dim=head_dim)
    q, _, _ = random_qkv(1, 1, seed=8, head_dim=head_dim)
    (ours, _), (theirs, _) = (
        run(backend, (k, v, index), q, Limit(keys=90), 1) for backend in (NATIVE, TORCH)
    )
    torch.testing.assert_close(ours.out, theirs.out, atol=1e-5, rtol=1e-4)


def test_a_token_of_a_tile_has_the_bits_that_it_has_alone_and_with_any_threads() -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=9)
    q, _, _ = random_qkv(5, 1, seed=10, spread=2.0)
    steady = [Part(torch.randn(1, 6, 16), torch.randn(1, 6)) for _ in range(5)]
    together = _selected(q, k, v, index, Part(*map(torch.cat, zip(*steady, strict=True))))
    threads = torch.get_num_threads()
    for token in range(5):
        torch.set_num_threads(1 + token % 3)
        alone = _selected(q[token : token + 1], k, v, index, steady[token])
        assert torch.equal(alone.out[0], together.out[token])
        assert torch.equal(alone.lse_read[0], together.lse_read[token])
    torch.set_num_threads(threads)


def _selected(q: Tensor, k: Tensor, v: Tensor, index: CentroidIndex, steady: Part) -> Step:
    return NATIVE.attend_selected(
        q,
        k,
        v,
        index,
        steady,
        scale=SCALE,
        limit=Limit(keys=90),
        levels=1,
        is_estimating=True,
        evidence=None,
    )


def test_steady_parts_are_left_as_they_were() -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=11)
    q, _, _ = random_qkv(1, 1, seed=12)
    steady = steady_part(q, k, v)
    out, lse = steady.out.clone(), steady.lse.clone()
    _selected(q, k, v, index, steady)
    NATIVE.attend_body(q, k, v, steady, scale=SCALE, evidence=torch.zeros(k.shape[:2]))
    assert torch.equal(steady.out, out)
    assert torch.equal(steady.lse, lse)


def test_scores_beyond_what_exp_can_hold_stay_finite() -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=13)
    q, _, _ = random_qkv(1, 1, seed=14, spread=1e3)
    for levels in (1, 2):
        step, evidence = run(NATIVE, (k, v, index), q, Limit(keys=90), levels)
        assert bool(torch.isfinite(step.out).all())
        assert bool(torch.isfinite(evidence).all())


@pytest.mark.parametrize("levels", [1, 2])
def test_sampled_recall_and_bound(levels: int) -> None:
    """Many samples agree with the audited recall, as those of the composed backend do."""
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=15)
    q, _, _ = random_qkv(2, 1, seed=16, spread=2.0)
    step, _ = run(NATIVE, (k, v, index), q, Limit(keys=90), levels)
    body = slice(NUM_SINKS, NUM_KEYS - NUM_WINDOW)
    rest = TORCH.attend(q, k[:, body], v[:, body], scale=SCALE)
    true = torch.exp(step.lse_read - merge_parts([steady_part(q, k, v), rest]).lse)
    generator = torch.Generator().manual_seed(0)
    reports = []
    for backend in (NATIVE, TORCH):
        samples = [
            backend.sample_recall(
                q, k, step.tail, step.lse_read, scale=SCALE, num_strata=256, generator=generator
            )
            for _ in range(100)
        ]
        reports.append(torch.stack([recall for recall, _ in samples]))
        bound = samples[0][1]
        assert bool((1.0 - true <= bound + 1e-5).all())
    for recalls in reports:
        error = recalls.std(dim=0) / math.sqrt(100)
        assert bool(((recalls.mean(dim=0) - true).abs() < 4 * error + 0.004).all())
    torch.testing.assert_close(reports[0].std(dim=0), reports[1].std(dim=0), rtol=0.5, atol=1e-4)


def test_recall_of_a_query_that_read_everything_is_one() -> None:
    k, v, index, _ = clustered_layer(NUM_KEYS, seed=17)
    q, _, _ = random_qkv(1, 1, seed=18)
    step, _ = run(NATIVE, (k, v, index), q, Limit(keys=NUM_KEYS), 1)
    recall, bound = NATIVE.sample_recall(
        q,
        k,
        step.tail,
        step.lse_read,
        scale=SCALE,
        num_strata=4,
        generator=torch.Generator().manual_seed(0),
    )
    assert recall.tolist() == [[1.0] * 6]
    assert bound.tolist() == [[0.0] * 6]


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


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-24])
@pytest.mark.parametrize("backend", [NATIVE, TORCH])
def test_the_ends_of_the_sample_are_units_that_can_be_drawn(
    backend: Backend, draw: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding may carry a draw to the very end, where units are read or padding."""
    _, k, _ = random_qkv(1, 40)
    q, _, _ = random_qkv(1, 1)
    log_mass = torch.full((1, 6, 5), -math.inf)
    log_mass[:, :, 1:3] = 0.0
    tail = Tail(
        log_mass=log_mass,
        log_mass_linear=torch.zeros(1, 6, 5),
        radii=torch.ones(2, 5),
        starts=torch.tensor([[0, 10, 20, 30, 0]]).repeat(2, 1),
        sizes=torch.tensor([[10, 10, 10, 10, 0]]).repeat(2, 1),
    )
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.full(shape, draw))
    lse = torch.zeros(1, 6)
    recall, _ = backend.sample_recall(
        q, k, tail, lse, scale=SCALE, num_strata=8, generator=torch.Generator()
    )
    assert bool(((recall > 0.0) & (recall < 1.0)).all())


def test_a_fault_in_numbers_is_not_hidden() -> None:
    k, v, _, _ = clustered_layer(NUM_KEYS, seed=20)
    q, _, _ = random_qkv(1, 1, seed=21)
    steady = steady_part(q, k, v)
    q[0, 0, 0] = math.nan
    evidence = torch.zeros(k.shape[:2])
    body = NATIVE.attend_body(q, k, v, steady, scale=SCALE, evidence=evidence)
    assert bool(body.out[0, 0].isnan().all())
    assert bool(body.out[0, 1:].isfinite().all())
    prefix = NATIVE.attend_prefix(q, k[:, :9], v[:, :9], past=8, scale=SCALE)
    assert bool(prefix.out[0, 0].isnan().all())


def test_what_the_kernels_cannot_read_is_refused_by_name() -> None:
    q, k, v = random_qkv(1, 8)
    with pytest.raises(ShapeMismatch, match=r"rows of one type on the CPU; use --backend torch"):
        NATIVE.attend_prefix(q, k, v.double(), past=7, scale=SCALE)
    with pytest.raises(ShapeMismatch, match=r"1 tokens after 8 over 8 slots"):
        NATIVE.attend_prefix(q, k, v, past=8, scale=SCALE)
    with pytest.raises(ShapeMismatch, match=r"weights \[4, 8\] torch.float32 times \[7\]"):
        NATIVE.linear(torch.ones(1, 7), torch.ones(4, 8))
    with pytest.raises(ShapeMismatch, match=r"contiguous ones of torch.float32 on the CPU"):
        library.attend_body(KeysOf(k, v, 6), q[0].double(), q[0], torch.zeros(6), torch.zeros(2, 8))
    with pytest.raises(ShapeMismatch, match=r"5 query heads over 2 KV heads"):
        NATIVE.attend_prefix(q[:, :5], k, v, past=7, scale=SCALE)

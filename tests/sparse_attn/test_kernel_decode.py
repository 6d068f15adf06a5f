"""Decode plans against their twins: float32 in the interpreter, bfloat16 on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sparse_attn import reference
from sparse_attn.folds import NUM_FOLDS, Runs
from sparse_attn.kernels import choice, selected
from sparse_attn.kernels.decode import Attended, DecodeDocument
from sparse_attn.kernels.search import MOST_AT_ONCE
from sparse_attn.select.base import Limit
from sparse_attn.state import log_add, merge_tree
from tests.sparse_attn.decoding import (
    BACKEND,
    LENGTHS,
    Case,
    Kind,
    alike,
    assert_bits,
    assert_near,
    assert_selection,
    case_of,
    keys_of,
    make,
    plan_of,
    read_units,
    run,
    steady_of,
)
from tests.sparse_attn.inputs import SCALE, hold, make_layer
from tests.sparse_attn.reading import Read

pytestmark = [  # logs of nothing, in what is masked
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]
SMALL = (45, 1, 33, 27)
# Some: enough to read, too few for the look-up to open every group.
FEW, SOME, ALL = Limit(keys=0), Limit(keys=60), Limit(keys=10**6)
SOME_OF_SMALL = Limit(keys=10)


SHAPES = [(2, 2, 64), (6, 2, 16), (4, 1, 128), (7, 1, 64), (16, 1, 64), (1, 1, 256)]


DENSE = [*((shape, LENGTHS) for shape in SHAPES), (SHAPES[0], (13, 513)), (SHAPES[2], (77, 1100))]


@pytest.mark.parametrize(("shape", "lengths"), DENSE, ids=str)
def test_dense(kind: Kind, shape: tuple[int, int, int], lengths: tuple[int, ...]) -> None:
    case = make(kind, lengths, heads=shape[:2], head_dim=shape[2], spread=2.0)
    found = run(plan_of([case]), case)
    assert_near(found, reference.attend(case.q, *keys_of(case), scale=SCALE), case)
    assert torch.equal(found.lse, found.lse_read)


CENTROID = [
    *((SHAPES[1], levels, limit) for levels in (1, 2) for limit in (FEW, SOME, ALL)),
    *((SHAPES[1], levels, Limit(mass=x)) for levels in (1, 2) for x in (0.5, 0.9, 1.0)),
    *((shape, 2, SOME_OF_SMALL) for shape in SHAPES if shape != SHAPES[1]),
    *((shape, 1, Limit(mass=0.8)) for shape in SHAPES[3:]),
]


@pytest.mark.parametrize(("shape", "levels", "limit"), CENTROID, ids=str)
def test_centroid(kind: Kind, shape: tuple[int, int, int], levels: int, limit: Limit) -> None:
    lengths = LENGTHS if shape == SHAPES[1] else SMALL
    spread = 1.0 if shape == SHAPES[1] else 2.0
    case = make(kind, lengths, heads=shape[:2], head_dim=shape[2], spread=spread)
    plan = plan_of([case], limit, levels=levels)
    found, expected = run(plan, case), Read(BACKEND, [case.layer], case.q, limit, levels=levels)
    if kind.is_exact:
        assert_selection(plan, case, expected, limit)
    steady = steady_of(case)
    assert_near(found, BACKEND.merge_parts([steady, expected.part]), case)
    read = log_add(steady.lse, expected.lse_read)
    torch.testing.assert_close(
        found.lse_read[0], read, atol=1e-4 if kind.is_exact else 1e-2, rtol=0
    )
    if limit == ALL:
        assert_near(found, reference.attend(case.q, *keys_of(case), scale=SCALE), case)


@pytest.mark.parametrize(
    ("levels", "limit"),
    [(1, FEW), (1, SOME), (2, FEW), (2, SOME), (2, Limit(mass=0.5))],
    ids=str,
)
def test_every_key_counts_once(kind: Kind, levels: int, limit: Limit) -> None:
    """Values of 1 have the mean 1 whatever stands for them; no query, and the mass is a number."""
    layer = make(kind).layer
    sums: dict[str, Any] = {
        name: replace(units, value_sums=units.sizes.unsqueeze(2).expand(-1, -1, 16).half())
        for name, units in (("clusters", layer.index.clusters), ("groups", layer.index.groups))
    }
    ones: dict[str, Any] = {
        name: torch.ones_like(getattr(layer, name)) for name in ("v", "steady_v")
    }
    layer = replace(layer, index=replace(layer.index, **sums), **ones)
    q = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3))
    case = case_of(kind, layer, q)
    plan = plan_of([case], limit, levels=levels)
    found = run(plan, case)
    torch.testing.assert_close(found.out, torch.ones_like(found.out), atol=kind.out, rtol=0)
    q[:, ::2], q[:, 1::2] = 0.0, 1e-20 * q[:, 1::2]
    found = run(plan, case, q.unsqueeze(0))
    num_keys = torch.full_like(found.lse, len(layer.body[0]) + case.num_steady)
    torch.testing.assert_close(found.lse.exp(), num_keys, atol=0, rtol=1e-5)
    num_read = plan.slot_bounds[0, :, NUM_FOLDS].cpu() + case.num_steady
    per_head = num_read.repeat_interleave(3).float().view_as(found.lse)
    torch.testing.assert_close(found.lse_read.exp(), per_head, atol=0, rtol=1e-5)


@pytest.mark.parametrize("levels", [1, 2])
def test_equal_benefits_are_taken_by_lowest_column(
    kind: Kind, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters alike, of 4 keys each: the first that fit, whichever way they are looked for."""
    case = case_of(kind, alike(make(kind, (44, 32, 24, 64)).layer), torch.ones(1, 2, 16))
    few = 16 if levels == 1 else MOST_AT_ONCE
    for limit, num_units, resident in ((40, 10, few), (19, 4, MOST_AT_ONCE), (3, 0, MOST_AT_ONCE)):
        monkeypatch.setattr(choice, "MOST_AT_ONCE", resident)
        plan = plan_of([case], Limit(keys=limit), levels=levels)
        run(plan, case)
        taken = read_units(plan, case)
        assert taken.sum(dim=1).tolist() == [num_units] * 2
        assert bool(taken[:, :num_units].all())
    plan = plan_of([case], Limit(mass=0.5), levels=levels)
    run(plan, case)
    taken = read_units(plan, case)
    expected = Read(BACKEND, [case.layer], case.q, Limit(mass=0.5), levels=levels).num_attended
    for g, num_units in enumerate(taken.sum(dim=1).tolist()):
        assert abs(4 * num_units - int(expected[g, 0])) <= 4
        assert 0 < num_units < taken.shape[1]
        assert bool(taken[g, :num_units].all())


def test_more_units_than_the_chip_holds(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(kind)
    found = []
    for resident in (MOST_AT_ONCE, 32):
        monkeypatch.setattr(choice, "MOST_AT_ONCE", resident)
        plan = plan_of([case], SOME)
        found.append((run(plan, case), read_units(plan, case)))
    assert_bits(*(attended for attended, _ in found))
    assert torch.equal(*(taken for _, taken in found))


@pytest.mark.parametrize("limit", [None, SOME, Limit(mass=0.9)], ids=str)
def test_one_hot_attention(kind: Kind, limit: Limit | None) -> None:
    """The key of each head that points where the queries do is all that counts."""
    layer = make(kind).layer
    q = torch.zeros(1, 6, 16)
    q[..., 2] = 40.0
    k, slots = layer.k.clone(), [layer.body[g][77 * g + 30] for g in (0, 1)]
    k[:, 2] = 0.0
    k[slots, 2] = 8.0
    index = layer.index
    if limit is not None:  # the clusters say so too
        centroids = index.clusters.centroids.clone()
        variances = index.clusters.variances.clone()
        centroids[..., 2], variances[..., 2] = 0.0, 0.0
        for g, slot in enumerate(slots):
            own = index.clusters.starts[g] * (index.clusters.sizes[g] > 0)
            column = int(torch.where(own <= slot, own, -1).argmax())
            centroids[g, column, 2] = 8.0 / float(index.clusters.sizes[g, column])
        clusters = replace(index.clusters, centroids=centroids, variances=variances)
        index = replace(index, clusters=clusters)
    steady = layer.steady_k.clone()
    steady[..., 2] = 0.0
    case = case_of(kind, replace(layer, k=k, steady_k=steady, index=index), q)
    found = run(plan_of([case], limit), case)
    expected = layer.v[slots].repeat_interleave(3, dim=0).float()
    torch.testing.assert_close(found.out[0, 0].float(), expected, atol=10 * kind.out, rtol=0)
    torch.testing.assert_close(found.lse_read, torch.full((1, 1, 6), 80.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_large_logits_stay_finite(kind: Kind, levels: int) -> None:
    case = make(kind, spread=50.0)
    limit = SOME if levels else None
    found = run(plan_of([case], limit, **({"levels": levels} if levels else {})), case)
    assert all(bool(getattr(found, name).isfinite().all()) for name in Attended.__slots__)
    if levels == 0:
        expected = reference.attend(case.q, *keys_of(case), scale=SCALE)
    else:
        read = Read(BACKEND, [case.layer], case.q, SOME, levels=levels)
        expected = BACKEND.merge_parts([steady_of(case), read.part])
    if kind.is_exact:
        torch.testing.assert_close(found.lse[0], expected.lse, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("levels", "shape", "num_queries"),
    [*((levels, SHAPES[0], 2) for levels in (0, 1, 2)), (0, SHAPES[3], 5), (2, SHAPES[3], 5)],
)
def test_bits_depend_on_the_query_alone(
    kind: Kind,
    levels: int,
    shape: tuple[int, int, int],
    num_queries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several queries, several documents, again, another grid: each is as it is alone."""
    options: dict[str, Any] = {"limit": SOME_OF_SMALL, "levels": levels} if levels else {}
    one, two = (
        make(kind, lengths, heads=shape[:2], head_dim=shape[2], seed=seed)
        for lengths, seed in (((37, 29), 0), ((20, 7, 42), 5))
    )
    cases = [one, two] if num_queries == 2 else [one]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(cases), num_queries, *one.q.shape[1:], generator=generator).to(kind.dtype)
    together = plan_of(cases, num_queries=num_queries, see=5, **options)
    found = run(together, one, q)
    if levels != 2:
        assert_bits(found, run(together, one, q))
    monkeypatch.setattr(selected, "_PROGRAMS", (9, 9))
    for b, case in enumerate(cases):
        for t in range(num_queries):
            if len(cases) == 2 and b == t:  # the others tell as much
                continue
            alone = run(plan_of([case], see=5 + t, **options), case, q[b : b + 1, t : t + 1])
            each = {name: getattr(found, name)[b : b + 1, t : t + 1] for name in found.__slots__}
            assert_bits(Attended(**each), alone)


def test_folds_of_two_callers_make_the_whole(kind: Kind) -> None:
    """A caller's tree is a subtree: what is left to do is the last merge."""
    segments = make_layer(LENGTHS, dtype=kind.dtype)
    q = make(kind).q
    whole, *halves = (
        run(plan_of([case], see=0), case)
        for case in (
            case_of(kind, hold(segments), q),
            *(case_of(kind, hold(segments, caller, 2), q) for caller in (0, 1)),
        )
    )
    outs, lses = (torch.stack([getattr(x, name)[0] for x in halves]) for name in ("out", "lse"))
    expected = merge_tree(outs.float(), lses)
    torch.testing.assert_close(whole.lse[0], expected.lse, atol=2e-6, rtol=0)
    torch.testing.assert_close(whole.out[0].float(), expected.out, atol=kind.out * 2e-3, rtol=1e-2)
    if kind.is_exact:  # the interpreter's own functions give the same bits
        high, low = (x.numpy() for x in (lses.amax(dim=0), lses.amin(dim=0)))
        lse = high + np.log(np.float32(1.0) + np.exp(low - high))
        weights = [torch.from_numpy(np.exp(own.numpy() - lse)).unsqueeze(-1) for own in lses]
        assert torch.equal(whole.lse[0], torch.from_numpy(lse))
        assert torch.equal(whole.out[0], outs[0] * weights[0] + outs[1] * weights[1])


@pytest.mark.parametrize("window", [0, 1, 63, 100])
def test_windows_over_a_document_that_is_all_steady(kind: Kind, window: int) -> None:
    generator = torch.Generator().manual_seed(2)
    num_queries, num_slots, room = 5, 150, 40
    q = torch.randn(num_queries, 6, 16, generator=generator).to(kind.dtype)
    k, v = torch.randn(2, 2, num_slots + room, 16, generator=generator).to(kind.dtype)
    document = DecodeDocument(
        runs=nothing(), k=[], v=[], steady_k=[k.to(kind.device)], steady_v=[v.to(kind.device)]
    )
    case = Case(kind=kind, layer=make(kind, SMALL).layer, document=document, q=q)
    plan = plan_of([case], num_queries=num_queries, see=num_slots - 4, windows=[window])
    found = run(plan, case, q.unsqueeze(0))
    seen = num_slots - 4 + torch.arange(num_queries).unsqueeze(1)
    place = torch.arange(num_slots + room).unsqueeze(0)
    mask = (place < seen) & ((place >= seen - window) | (window == 0))
    expected = reference.attend(q, k, v, scale=SCALE, mask=mask)
    torch.testing.assert_close(found.out[0].float(), expected.out, atol=2 * kind.out, rtol=0)
    torch.testing.assert_close(found.lse[0], expected.lse, atol=kind.lse, rtol=0)


def nothing() -> Runs:
    none = torch.zeros(0, dtype=torch.int64)
    return Runs(first=none, count=none, bounds=torch.zeros(2, NUM_FOLDS + 1, dtype=torch.int64))


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_a_document_without_a_body(kind: Kind, levels: int) -> None:
    case = make(kind, (12,))
    for limit in (FEW, SOME, Limit(mass=0.9)):
        plan = plan_of([case], limit, levels=levels) if levels else plan_of([case])
        found = run(plan, case)
        assert_near(found, steady_of(case), case)
        assert torch.equal(found.lse, found.lse_read)
    empty = run(plan_of([case], see=0), case)
    assert not empty.out.any()
    assert bool((empty.lse == -torch.inf).all())


@pytest.mark.parametrize(("levels", "limit"), [(0, SOME), (1, SOME), (2, SOME), (2, FEW)], ids=str)
def test_evidence(kind: Kind, levels: int, limit: Limit) -> None:
    """Every slot gains its share of what was read, and no other does; with another document beside
    it, the same to the bit.
    """
    case, other = make(kind), make(kind, (33, 95), seed=4)
    layer, steady, held = case.layer, steady_of(case), torch.arange(len(case.layer.k)) / 100.0
    spread = []
    for cases in ([case], [other, case]):
        masses = [[held[: len(x.layer.k)].clone().to(kind.device)] for x in cases]
        options: dict[str, Any] = {"limit": limit, "levels": levels} if levels else {}
        plan = plan_of(cases, evidence=masses, **options)
        run(plan, case, torch.stack([x.q for x in cases]))
        plan.spread(0)
        spread.append(masses[-1][0].cpu())
    if levels:
        read = Read(BACKEND, [layer], case.q, limit, levels=levels)
        kept, lse = read.reads[0].kept, log_add(steady.lse, read.lse_read)
    else:
        part, kept = BACKEND.attend_runs(
            case.q, layer.k, layer.v, layer.runs, scale=SCALE, keeps=True
        )
        lse = log_add(steady.lse, part.lse)
    expected = held.clone()
    assert kept is not None
    BACKEND.spread_evidence(expected, kept, lse[0])
    tolerance = 1e-5 if kind.is_exact else 1e-2
    torch.testing.assert_close(spread[0], expected, atol=tolerance, rtol=0)
    assert torch.equal(*spread)
    assert bool((expected > held).any()) == (levels == 0 or limit != FEW)

"""Decode plans over a body in e4m3, against attention over the numbers that its bytes stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_attn import reference
from sparse_attn.errors import AttentionError
from sparse_attn.kernels.decode import Attended, DecodeDocument
from sparse_attn.select.base import Limit
from sparse_attn.state import Part
from sparse_attn.stored import FP8
from tests.sparse_attn.decoding import (
    BACKEND,
    Case,
    Kind,
    assert_bits,
    assert_near,
    fewer_programs,
    keys_of,
    make,
    plan_of,
    run,
    scale_of,
    steady_of,
)
from tests.sparse_attn.inputs import SCALE
from tests.sparse_attn.reading import Read
from tests.sparse_attn.rounding import in_fp8

pytestmark = [  # logs of nothing, in what is masked
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]
SHAPE, LENGTHS = (6, 2), (45, 1, 33, 27)


def cases(kind: Kind, *, spread: float = 2.0, head_dim: int = 16) -> tuple[Case, Case]:
    """A document in e4m3 beside what it was made of; the layer of the first is its numbers."""
    whole = make(kind, LENGTHS, heads=SHAPE, head_dim=head_dim, spread=spread)
    return in_fp8(whole), whole


def copied(found: Attended) -> Attended:
    return Attended(**{name: getattr(found, name).cpu().clone() for name in Attended.__slots__})


@pytest.mark.parametrize("factor", [1.0, 40.0, 1e-20, 1e20], ids=str)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_dense(kind: Kind, head_dim: int, factor: float) -> None:
    case, _ = cases(kind, head_dim=head_dim)
    if factor == 1e20:  # no half holds it; the softmax is all one key's
        case = replace(case, q=(case.q * 1e20).clamp_(-1e20, 1e20))
        found = run(plan_of([case]), case)
        assert bool(found.out.isfinite().all())
        return
    case = replace(case, q=case.q * factor)
    found = run(plan_of([case]), case)
    expected = reference.attend(case.q.float(), *keys_of(case), scale=SCALE)
    assert_near(found, expected, case)


@pytest.mark.parametrize("factor", [1.0, 30.0, 1e-6], ids=str)
@pytest.mark.parametrize("limit", [None, Limit(keys=10)], ids=str)
def test_products_of_halves(
    limit: Limit | None, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, whose streams are of half types, as the interpreter does it in float16."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    fewer_programs(monkeypatch)
    case, _ = cases(Kind(device="cpu", dtype=torch.float16, out=2e-3, lse=1e-3))
    case = replace(case, q=case.q * factor)
    found = run(plan_of([case], limit), case)
    if limit is None:
        keys = (x.float() for x in keys_of(case))
        assert_near(found, reference.attend(case.q.float(), *keys, scale=SCALE), case)
        return
    numbers = replace(case, document=numbers_of(case))
    expected = run(plan_of([numbers], limit), numbers)
    own = Part(expected.out[0].float(), expected.lse[0])
    assert_near(found, own, case)
    torch.testing.assert_close(found.lse_read, expected.lse_read, atol=1e-3, rtol=1e-4)


def test_dense_is_near_what_the_body_was_made_of(kind: Kind) -> None:
    case, whole = cases(kind, spread=1.0)
    found = run(plan_of([case]), case)
    keys = (x.double() for x in keys_of(whole))
    expected = reference.attend(whole.q.double(), *keys, scale=SCALE)
    error = (found.out[0].double() - expected.out).abs() / scale_of(whole)
    assert float(error.max()) <= 3e-2
    assert float(error.max()) > 1e-4  # it is e4m3 that was read


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(
    "limit", [Limit(keys=0), Limit(keys=10), Limit(keys=10**6), Limit(mass=0.8)], ids=str
)
def test_centroid(kind: Kind, levels: int, limit: Limit) -> None:
    case, _ = cases(kind)
    found = run(plan_of([case], limit, levels=levels), case)
    expected = Read(BACKEND, [case.layer], case.q, limit, levels=levels)
    assert_near(found, BACKEND.merge_parts([steady_of(case), expected.part]), case)


def test_scores_and_evidence_are_those_of_the_numbers(kind: Kind) -> None:
    case, _ = cases(kind)
    wide = replace(case, document=numbers_of(case))
    for limit in (None, Limit(keys=10)):
        evidence = []
        for own in (case, wide):
            mass = torch.zeros(len(own.layer.k), device=kind.device)
            plan = plan_of([own], limit, evidence=[[mass]])
            run(plan, own)
            plan.spread(0)
            evidence.append(mass.cpu())
        tolerance = 1e-5 if kind.is_exact else 2e-2
        torch.testing.assert_close(*evidence, atol=tolerance, rtol=tolerance)
        assert float(evidence[0].sum()) > 0


def test_samples_are_those_of_the_numbers(kind: Kind) -> None:
    case, _ = cases(kind)
    missed = []
    for own in (case, replace(case, document=numbers_of(case))):
        plan = plan_of([own], Limit(keys=10), levels=2)
        run(plan, own)
        seeds = torch.tensor([3], device=kind.device)
        q = own.q.to(kind.device, kind.dtype)
        missed.append(plan.sample(0, q, seeds=seeds, num_strata=16))
    # A draw may fall on another unit where a mass was rounded.
    tolerance = 1e-4 if kind.is_exact else 0.1
    for name in ("mean", "log_most"):
        pair = [getattr(own, name).cpu() for own in missed]
        torch.testing.assert_close(*pair, atol=tolerance, rtol=tolerance)
    assert float(missed[0].mean.min()) > 0


def test_bits_do_not_depend_on_the_batch(kind: Kind) -> None:
    case, other = cases(kind)[0], in_fp8(make(kind, (50, 30), heads=SHAPE, seed=5))
    for limit in (None, Limit(keys=10)):
        q = torch.cat([case.q, other.q]).unsqueeze(1)
        both = run(plan_of([case, other], limit), case, q)
        for b, own in enumerate((case, other)):
            alone = run(plan_of([own], limit), own)
            mine = {name: getattr(both, name)[b : b + 1] for name in Attended.__slots__}
            assert_bits(Attended(**mine), alone)


def test_what_cannot_be_read_is_refused() -> None:
    kind = Kind(device="cpu", dtype=torch.float32, out=1e-3, lse=1e-3)
    case, whole = cases(kind)
    document = case.document
    scales = document.scales[0]
    assert scales is not None
    wrong: list[tuple[list[Case], str]] = [
        ([with_scales(case, [])], r"keys torch.float8_e4m3fn, scales none.*pass what"),
        ([with_scales(whole, [scales])], r"keys torch.float32, scales \(2, 2\)"),
        ([with_scales(case, [scales[:1].clone()])], "scales of 1 KV heads; limit 2"),
        ([with_scales(case, [scales.double()])], "torch.float64"),
        ([with_scales(case, [scales.t().contiguous().t()])], "contiguous"),
        ([case, whole], "limit one type a plan"),
    ]
    for own, said in wrong:
        for limit in (None, Limit(keys=4)):
            with pytest.raises(AttentionError, match=said):
                plan_of(own, limit)


def with_scales(case: Case, scales: list[Tensor]) -> Case:
    return replace(case, document=replace(case.document, scales=scales))


def numbers_of(case: Case) -> DecodeDocument:
    """The document of a case in e4m3 with its body as numbers."""
    k, v = (x.to(case.kind.device, case.kind.dtype) for x in (case.layer.k, case.layer.v))
    assert case.document.k[0].dtype == FP8
    return replace(case.document, k=[k], v=[v], scales=())

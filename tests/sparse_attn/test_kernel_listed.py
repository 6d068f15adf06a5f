"""Decode attention over given selections, against softmax in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_attn.errors import AttentionError, ShapeMismatch
from sparse_attn.kernels import listed, read
from sparse_attn.kernels.decode import Attended, Heads
from sparse_attn.kernels.listed import ListedDecode
from tests.sparse_attn.decoding import Kind

KINDS = [
    pytest.param(Kind(device="cpu", dtype=torch.float32, out=1e-5, lse=1e-5), id="interpreter"),
    pytest.param(
        Kind(device="cuda", dtype=torch.bfloat16, out=1e-2, lse=1e-3),
        id="gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]
G, P, D, SCALE = 2, 3, 16, 0.3


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(listed, "_PROGRAMS", 9)


def plan_for(kind: Kind, k: list[Tensor], v: list[Tensor], capacity: int) -> ListedDecode:
    heads = Heads(num_documents=len(k), num_queries=1, num_kv_heads=G, per_group=P, head_dim=D)
    own_k, own_v = ([x.to(kind.device, kind.dtype) for x in own] for own in (k, v))
    return ListedDecode(heads, own_k, own_v, capacity=capacity, scale=SCALE)


def draw(counts: list[int], num_slots: int, capacity: int) -> tuple[Tensor, Tensor]:
    """So many rising slots of each problem, cut into folds at random places."""
    generator = torch.Generator().manual_seed(sum(counts))
    slots = torch.full((len(counts), capacity), -1, dtype=torch.int32)
    bounds = torch.zeros(len(counts), 9, dtype=torch.int32)
    for z, count in enumerate(counts):
        order = torch.randperm(num_slots, generator=generator)[:count].sort().values
        slots[z, :count] = order.int()
        cuts = torch.randint(0, count + 1, (7,), generator=generator).sort().values
        bounds[z, 1:8], bounds[z, 8] = cuts.int(), count
    return slots, bounds


def run(plan: ListedDecode, kind: Kind, q: Tensor, slots: Tensor, bounds: Tensor) -> Attended:
    moved = [x.to(kind.device) for x in (q.to(kind.dtype), slots, bounds)]
    found = plan.run(*moved)
    return Attended(**{name: getattr(found, name).cpu().clone() for name in Attended.__slots__})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_long", [False, True])
def test_attends_to_the_given_slots_alone(
    kind: Kind, is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tiles have several pieces, and where nothing was given."""
    if is_long:
        monkeypatch.setattr(read, "LONG", 0)
    generator = torch.Generator().manual_seed(2)
    k, v = ([torch.randn(n, D, generator=generator) for n in (700, 300)] for _ in range(2))
    counts, capacity = [650, 3, 0, 129], 660
    slots, bounds = draw(counts[:2], 700, capacity)
    more = draw(counts[2:], 300, capacity)
    slots, bounds = torch.cat([slots, more[0]]), torch.cat([bounds, more[1]])
    q = torch.randn(2, 1, G * P, D, generator=generator)
    found = run(plan_for(kind, k, v, capacity), kind, q, slots, bounds)
    for z, count in enumerate(counts):
        b, g = divmod(z, G)
        own = slots[z, :count].long()
        keys, values = (x[b][own].to(kind.dtype).double() for x in (k, v))
        x = q[b, 0, g * P : (g + 1) * P].to(kind.dtype).double()
        scores = x @ keys.T * SCALE
        rows = slice(g * P, (g + 1) * P)
        if not count:
            assert bool((found.lse[b, 0, rows] == -torch.inf).all())
            assert bool((found.out[b, 0, rows] == 0).all())
            continue
        lse = torch.logsumexp(scores, dim=1)
        weights = torch.exp(scores - lse.unsqueeze(1))
        error = (found.out[b, 0, rows].double() - weights @ values).abs() / (weights @ values.abs())
        assert float(error.max()) <= kind.out
        assert float((found.lse[b, 0, rows].double() - lse).abs().max()) <= kind.lse


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_batch(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(3)
    k, v = ([torch.randn(400, D, generator=generator) for _ in range(2)] for _ in range(2))
    slots, bounds = draw([300, 20, 399, 150], 400, 400)
    q = torch.randn(2, 1, G * P, D, generator=generator)
    together = run(plan_for(kind, k, v, 400), kind, q, slots, bounds)
    for b in range(2):
        own = slice(b * G, (b + 1) * G)
        plan = plan_for(kind, k[b : b + 1], v[b : b + 1], 400)
        alone = run(plan, kind, q[b : b + 1], slots[own].contiguous(), bounds[own].contiguous())
        assert torch.equal(together.out[b], alone.out[0])
        assert torch.equal(together.lse[b], alone.lse[0])


def test_what_was_not_planned_for_is_refused() -> None:
    kind = Kind(device="cpu", dtype=torch.float32, out=0, lse=0)
    k = [torch.randn(20, D)]
    plan = plan_for(kind, k, k, 8)
    q = torch.zeros(1, 1, G * P, D)
    slots, bounds = torch.zeros(G, 8, dtype=torch.int32), torch.zeros(G, 9, dtype=torch.int32)
    with pytest.raises(ShapeMismatch, match=r"slots .* limit"):
        plan.run(q, slots[:, :7], bounds)
    with pytest.raises(ShapeMismatch, match=r"bounds .* int32"):
        plan.run(q, slots, bounds.long())
    with pytest.raises(AttentionError, match="convert it"):
        plan.run(q.double(), slots, bounds)
    with pytest.raises(ShapeMismatch, match="one tensor of each"):
        plan_for(kind, k, [], 8)

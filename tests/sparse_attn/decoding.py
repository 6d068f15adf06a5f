"""What the tests of decode plans share: a document as a plan takes it, what it should give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from sparse_attn import reference
from sparse_attn.api import find_backend
from sparse_attn.folds import NUM_FOLDS
from sparse_attn.kernels import selected
from sparse_attn.kernels.decode import Attended, DecodeDocument, DenseDecode, Heads
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import CentroidIndex, Units
from sparse_attn.state import Part
from tests.sparse_attn.inputs import SCALE, Layer, hold, make_layer
from tests.sparse_attn.reading import Read

BACKEND = find_backend("torch")
# Lengths of segments around a tile, some folds filled twice; the first and last hold steady keys.
LENGTHS = (70, 1, 63, 65, 139, 2, 64, 5, 33, 76)
NEARLY_TIED = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Where the kernels run; the greatest error of out, relative to sum p |v|, and of lse."""

    device: str
    dtype: torch.dtype
    out: float
    lse: float

    @property
    def is_exact(self) -> bool:
        """Whether scores are those of the twin but for the order of sums."""
        return self.dtype == torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layer with the CPU, its document where the kernels run, and a query [1, H, D]."""

    kind: Kind
    layer: Layer
    document: DecodeDocument
    q: Tensor

    @property
    def num_kv_heads(self) -> int:
        return self.layer.steady_k.shape[0]

    @property
    def num_steady(self) -> int:
        return self.layer.steady_k.shape[1]


def moved(x: Any, device: str) -> Any:
    """Tables on the device; bounds stay with the host."""
    if isinstance(x, Tensor):
        return x.to(device)
    own = {f.name: getattr(x, f.name) for f in fields(x) if f.init}
    host = {} if not isinstance(x, Units) else {"bounds": x.bounds}
    return replace(x, **{name: moved(y, device) for name, y in own.items() if y is not None} | host)


def make(
    kind: Kind,
    lengths: Sequence[int] = LENGTHS,
    *,
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 16,
    seed: int = 0,
    spread: float = 1.0,
) -> Case:
    """heads: H and G."""
    segments = make_layer(
        lengths, num_kv_heads=heads[1], head_dim=head_dim, seed=seed, dtype=kind.dtype
    )
    generator = torch.Generator().manual_seed(seed + 7)
    q = torch.randn(1, heads[0], head_dim, generator=generator) * spread
    return case_of(kind, hold(segments), q)


def case_of(kind: Kind, layer: Layer, q: Tensor) -> Case:
    """A case of a layer, which may have been changed."""
    index: CentroidIndex = moved(layer.index, kind.device)
    k, v, steady_k, steady_v = (
        [x.contiguous().to(kind.device, kind.dtype)]
        for x in (layer.k, layer.v, layer.steady_k, layer.steady_v)
    )
    document = DecodeDocument(
        runs=layer.runs, indexes=[index], k=k, v=v, steady_k=steady_k, steady_v=steady_v
    )
    return Case(kind=kind, layer=layer, document=document, q=q.to(kind.dtype))


def plan_of(
    cases: Sequence[Case],
    limit: Limit | None = None,
    *,
    num_queries: int = 1,
    levels: int = 1,
    see: int | None = None,
    **options: Any,
) -> Any:
    """A plan: dense without a limit; see: how many steady keys the first query sees."""
    case = cases[0]
    _, num_heads, head_dim = case.q.shape
    heads = Heads(
        num_documents=len(cases),
        num_queries=num_queries,
        num_kv_heads=case.num_kv_heads,
        per_group=num_heads // case.num_kv_heads,
        head_dim=head_dim,
    )
    seen = [x.num_steady if see is None else see for x in cases]
    visible = torch.tensor(seen, device=case.kind.device)
    documents = [x.document for x in cases]
    if limit is None:
        return DenseDecode(heads, documents, visible, scale=SCALE, **options)
    return CentroidDecode(
        heads, documents, visible, limit=limit, levels=levels, scale=SCALE, **options
    )


def run(plan: Any, case: Case, q: Tensor | None = None) -> Attended:
    """What a plan gives for q [B, T, H, D], copied."""
    own = case.q.unsqueeze(0) if q is None else q
    found = plan.run(0, own.to(case.kind.device, case.kind.dtype).contiguous())
    return Attended(**{name: getattr(found, name).cpu().clone() for name in Attended.__slots__})


def fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays for every program of a grid, and for every element of some sums."""
    monkeypatch.setattr(selected, "_PROGRAMS", (4, 4))
    monkeypatch.setattr(selected, "_LEAST", (1, 1))
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_halves)


def reduce_by_halves(own: Any, operands: Any) -> Any:
    """The interpreter's reduction of several vectors at once, which takes elements one by one: half
    of them with the other half instead, by the same function.
    """
    kinds = [x.dtype for x in operands]
    data = [x.handle.data for x in operands]
    assert data[0].ndim == 1
    while len(data[0]) > 1:
        halves = [x.reshape(2, -1) for x in data]
        pairs = zip(halves, kinds, strict=True)
        first, last = zip(*([own.to_tensor(row, of) for row in x] for x, of in pairs), strict=True)
        data = [x.handle.data for x in own.combine_fn.fn(*first, *last)]
    return [own.to_tensor(x[0], of) for x, of in zip(data, kinds, strict=True)]


def steady_of(case: Case) -> Part:
    return BACKEND.attend(case.q, case.layer.steady_k, case.layer.steady_v, scale=SCALE)


def keys_of(case: Case) -> tuple[Tensor, Tensor]:
    """Every key and value, [G, S, D]: the body of each head and what is steady."""
    layer = case.layer
    own = [
        torch.cat([getattr(layer, name)[layer.body[g]], getattr(layer, "steady_" + name)[g]])
        for name in ("k", "v")
        for g in range(case.num_kv_heads)
    ]
    both = torch.stack(own).view(2, case.num_kv_heads, -1, case.q.shape[2])
    return both[0], both[1]


def scale_of(case: Case) -> Tensor:
    """sum p |v| over every key, [H, D]."""
    k, v = keys_of(case)
    return reference.attend(case.q, k, v.abs(), scale=SCALE).out[0]


def assert_near(found: Attended, expected: Part, case: Case) -> None:
    limit = case.kind.out * scale_of(case)
    assert bool(((found.out[0].float() - expected.out).abs() <= limit).all())
    torch.testing.assert_close(found.lse[0], expected.lse, atol=case.kind.lse, rtol=1e-5)


def assert_bits(a: Attended, b: Attended) -> None:
    for name in Attended.__slots__:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def read_units(plan: CentroidDecode, case: Case) -> Tensor:
    """Which clusters the plan read [G, U], after a check that each was read whole, in order."""
    clusters, slots, bounds = case.layer.index.clusters, plan.slots.cpu(), plan.slot_bounds[0].cpu()
    taken = torch.zeros_like(clusters.sizes, dtype=torch.bool)
    for g in range(case.num_kv_heads):
        own = slots[g, : bounds[g, NUM_FOLDS]].tolist()
        units = list(zip(clusters.starts[g].tolist(), clusters.sizes[g].tolist(), strict=True))
        taken[g] = torch.tensor([size > 0 and start in set(own) for start, size in units])
        whole = [
            list(range(*(start, start + size))) if is_taken else []
            for (start, size), is_taken in zip(units, taken[g].tolist(), strict=True)
        ]
        assert own == [slot for unit in whole for slot in unit]
        edges = [sum(map(len, whole[:edge])) for edge in clusters.bounds[g].tolist()]
        assert bounds[g].tolist() == edges
    return taken


def assert_selection(plan: CentroidDecode, case: Case, expected: Read, limit: Limit) -> None:
    """The same clusters as the twin, but for those whose benefit nearly is that of the last."""
    found, units = read_units(plan, case), expected.units[0]
    by_mass = expected.lse_steady if limit.mass is not None else None
    ranks = BACKEND.rank_units(expected.scores[0], units, total=expected.total, lse_steady=by_mass)
    for g in range(case.num_kv_heads):
        is_unit, benefit = units.sizes[g] > 0, ranks.benefit[g, 0]
        columns = torch.arange(len(is_unit)) if units.columns is None else units.columns[g]
        wanted = expected.taken[0][g, 0]
        others = torch.ones(found.shape[1], dtype=torch.bool)
        others[columns[is_unit]] = False
        assert not bool((found[g] & others).any())  # only what was opened is read
        differs = is_unit & (found[g][columns.clamp(min=0)] != wanted)
        if bool(differs.any()):
            cut = float(benefit[wanted].min())
            assert float((benefit[differs] - cut).abs().max()) <= NEARLY_TIED * cut


def alike(layer: Layer) -> Layer:
    """The same runs in clusters of 4 keys and groups of 8, with the same statistics everywhere."""
    tables: dict[str, Any] = {}
    for name, units, size in (
        ("clusters", layer.index.clusters, 4),
        ("groups", layer.index.groups, 8),
    ):
        own = [_pieces(layer, g, size) for g in range(len(layer.body))]
        starts = torch.tensor([[s for s, _ in x] for x in own])
        folds = torch.tensor([[fold for _, fold in x] for x in own])
        same = torch.full((*starts.shape, 16), 0.5, dtype=units.centroids.dtype)
        tables[name] = Units.from_tables(
            centroids=same,
            variances=0 * same,
            value_sums=same,
            radii=torch.zeros(starts.shape),
            starts=starts,
            sizes=torch.full_like(starts, size),
            bounds=torch.searchsorted(folds, torch.arange(NUM_FOLDS + 1).repeat(len(own), 1)),
            ids=torch.arange(starts.shape[1]).repeat(len(own), 1),
        )
    count = torch.full_like(tables["groups"].starts, 2)
    first = count.cumsum(dim=1) - 2
    return replace(layer, index=CentroidIndex(**tables, group_starts=first, group_counts=count))


def _pieces(layer: Layer, g: int, size: int) -> list[tuple[int, int]]:
    return [
        (slot, fold)
        for fold in range(NUM_FOLDS)
        for run in layer.runs.of_fold(g, fold)
        for slot in range(run.start, run.stop, size)
    ]

"""Inputs that the tests of sparse_attn share: random attention, and a document's layer in folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attn.folds import NUM_FOLDS, Runs
from sparse_attn.select.centroid import CentroidIndex, Units
from sparse_attn.select.centroid_build import CentroidParams, build

SCALE = 0.25
PARAMS = CentroidParams(keys_per_cluster=8, clusters_per_group=4)
TABLES = ("centroids", "variances", "value_sums", "radii")


def random_qkv(
    num_tokens: int,
    num_slots: int,
    *,
    seed: int = 0,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    spread: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D], k and v [G, S, D] float32; `spread` sharpens the softmax."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_tokens, num_heads, head_dim, generator=generator) * spread
    k = torch.randn(num_kv_heads, num_slots, head_dim, generator=generator)
    v = torch.randn(num_kv_heads, num_slots, head_dim, generator=generator)
    return q, k, v


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one caller holds of a document's layer.

    k, v: [N, D]; body: for each KV head, the flat slots outside the steady zone; steady_k,
    steady_v: [G, sinks + window, D], the same for every caller; place: [N] int64, where each slot
    lies with a caller who holds everything.
    """

    k: Tensor
    v: Tensor
    runs: Runs
    index: CentroidIndex
    body: list[list[int]]
    steady_k: Tensor
    steady_v: Tensor
    place: Tensor


def make_layer(
    lengths: Sequence[int],
    *,
    seed: int = 0,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    num_sinks: int = 4,
    num_window: int = 8,
    params: CentroidParams = PARAMS,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Tensor]]:
    """One dict a segment: what `build` returned, with `k`, `v` [G, S, D] in slot order."""
    segments = []
    for segment, length in enumerate(lengths):
        _, keys, values = random_qkv(
            1, length, seed=seed + 1000 * segment, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        sinks = num_sinks if segment == 0 else 0
        window = num_window if segment == len(lengths) - 1 else 0
        built = build(keys, values, num_sinks=sinks, num_window=window, params=params)
        order = built["order"].unsqueeze(-1).expand_as(keys)
        built["k"], built["v"] = keys.gather(1, order).to(dtype), values.gather(1, order).to(dtype)
        built["body"] = torch.arange(sinks, max(sinks, length - window))
        segments.append(built)
    return segments


def hold(segments: list[dict[str, Tensor]], caller: int = 0, num_callers: int = 1) -> Layer:
    """The folds of one caller of several: those v with v % num_callers == caller."""
    num_kv_heads, _, head_dim = segments[0]["k"].shape
    every = [
        [(fold, s) for fold in range(NUM_FOLDS) for s in _segments_of(segments, g, fold)]
        for g in range(num_kv_heads)
    ]
    k: list[Tensor] = []
    v: list[Tensor] = []
    place: list[Tensor] = []
    spans: list[tuple[int, int]] = []
    bounds, body = [], []
    slot = start_of_all = 0
    for g in range(num_kv_heads):
        head_bounds, own_body = [len(spans)], []
        for fold in range(NUM_FOLDS):
            for s in _segments_of(segments, g, fold):
                length = segments[s]["k"].shape[1]
                if fold % num_callers == caller:
                    own = segments[s]["body"]
                    k.append(segments[s]["k"][g])
                    v.append(segments[s]["v"][g])
                    spans.append((slot + (int(own[0]) if len(own) else 0), len(own)))
                    own_body += (own + slot).tolist()
                    place.append(torch.arange(length) + start_of_all)
                    slot += length
                start_of_all += length
            head_bounds.append(len(spans))
        bounds.append(head_bounds)
        body.append(own_body)
    runs = torch.tensor(spans, dtype=torch.int64).view(-1, 2)
    empty = torch.zeros(0, head_dim, dtype=segments[0]["k"].dtype)
    sinks, window = _steady(segments)
    last = segments[-1]
    return Layer(
        k=torch.cat([empty, *k]),
        v=torch.cat([empty, *v]),
        runs=Runs(first=runs[:, 0], count=runs[:, 1], bounds=torch.tensor(bounds)),
        index=_index(segments, every, caller, num_callers),
        body=body,
        steady_k=torch.cat([segments[0]["k"][:, :sinks], last["k"][:, window:]], dim=1),
        steady_v=torch.cat([segments[0]["v"][:, :sinks], last["v"][:, window:]], dim=1),
        place=torch.cat([torch.zeros(0, dtype=torch.int64), *place]),
    )


def clustered_layer(num_tokens: int, **options: Any) -> Layer:
    """One segment, held by one caller."""
    return hold(make_layer([num_tokens], **options))


def _segments_of(segments: list[dict[str, Tensor]], g: int, fold: int) -> list[int]:
    return [s for s in range(len(segments)) if (s + g) % NUM_FOLDS == fold]


def _steady(segments: list[dict[str, Tensor]]) -> tuple[int, int]:
    """How many sinks the first segment has, and where the window of the last begins."""
    first, last = segments[0]["body"], segments[-1]["body"]
    if not len(first) or not len(last):
        return 0, segments[-1]["k"].shape[1]
    return int(first[0]), int(last[-1]) + 1


def _index(
    segments: list[dict[str, Tensor]],
    every: list[list[tuple[int, int]]],
    caller: int,
    num_callers: int,
) -> CentroidIndex:
    heads: dict[str, list[dict[str, Tensor]]] = {"cluster": [], "group": []}
    slot = 0
    for g, order in enumerate(every):
        rows: dict[str, list[dict[str, Tensor]]] = {"cluster": [], "group": []}
        num_clusters, before = 0, {"cluster": 0, "group": 0}
        for fold, s in order:
            built = segments[s]
            own = _unit_rows(built, g, fold, slot, num_clusters, before)
            for kind in rows:
                before[kind] += len(own[kind]["sizes"])
            if fold % num_callers == caller:
                for kind, unit_rows in own.items():
                    rows[kind].append(unit_rows)
                num_clusters += len(own["cluster"]["sizes"])
                slot += built["k"].shape[1]
        for kind, of_head in rows.items():
            heads[kind].append(_side_by_side(of_head, segments[0], kind))
    clusters, _ = _units(heads["cluster"])
    groups, extra = _units(heads["group"])
    return CentroidIndex(
        clusters=clusters,
        groups=groups,
        group_starts=extra["first_clusters"].long(),
        group_counts=extra["counts"].long(),
    )


def _unit_rows(
    built: dict[str, Tensor], g: int, fold: int, slot: int, column: int, before: dict[str, int]
) -> dict[str, dict[str, Tensor]]:
    """The clusters and groups of one segment and head, without padding."""
    own: dict[str, dict[str, Tensor]] = {}
    for kind, prefix in (("cluster", ""), ("group", "group_")):
        sizes = built[f"{kind}_sizes"][g].long()
        is_unit = sizes > 0
        rows = {name: built[prefix + name][g][is_unit] for name in TABLES}
        rows["sizes"] = sizes[is_unit]
        rows["ids"] = before[kind] + torch.arange(int(is_unit.sum()))
        rows["folds"] = torch.full_like(rows["sizes"], fold)
        own[kind] = rows
    starts = built["cluster_starts"][g].long()
    own["cluster"]["starts"] = starts[built["cluster_sizes"][g] > 0] + slot
    is_group = built["group_sizes"][g] > 0
    first = built["group_starts"][g][is_group].long()
    own["group"]["starts"] = starts[first] + slot
    own["group"]["first_clusters"] = first + column
    own["group"]["counts"] = built["group_counts"][g][is_group].long()
    return own


def _side_by_side(
    rows: list[dict[str, Tensor]], segment: dict[str, Tensor], kind: str
) -> dict[str, Tensor]:
    if not rows:  # the same names and types, without a row
        own = _unit_rows(segment, 0, 0, 0, 0, {"cluster": 0, "group": 0})[kind]
        return {name: x[:0] for name, x in own.items()}
    return {name: torch.cat([x[name] for x in rows]) for name in rows[0]}


def _units(heads: list[dict[str, Tensor]]) -> tuple[Units, dict[str, Tensor]]:
    """Units of all heads, each filled up with padding, and what else the rows hold."""
    width = max(len(x["sizes"]) for x in heads)
    bounds = torch.stack(
        [torch.searchsorted(x["folds"].contiguous(), torch.arange(NUM_FOLDS + 1)) for x in heads]
    )
    padded = {}
    for name in heads[0]:
        columns = torch.nn.utils.rnn.pad_sequence([x[name] for x in heads], batch_first=True)
        padded[name] = columns[:, :width]
    names = (*TABLES, "starts", "sizes", "ids")
    return Units.from_tables(**{name: padded[name] for name in names}, bounds=bounds), padded

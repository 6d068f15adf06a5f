"""Layers of a document that nobody wrote, straight in the form that decode plans take: timing only.

Keys lie around centres in two levels, as groups and clusters would have found them, and are never
clustered: a million tokens are made in a second. Cluster sizes vary between 1 and twice the mean.
What is measured on it says nothing about answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.folds import NUM_FOLDS, Runs
from sparse_attn.kernels.decode import DecodeDocument
from sparse_attn.select.centroid import CentroidIndex, Units
from sparse_attn.select.centroid_build import LEAST_PER_GROUP, CentroidParams

SEGMENT_TOKENS = 8192
# Rows that statistics are gathered from at a time.
_ROWS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """A document of whole segments. keys_per_cluster, clusters_per_group: mean sizes, None as
    `CentroidParams.for_document` has them; num_steady: capacity of the steady keys.
    """

    num_tokens: int
    num_kv_heads: int = 8
    head_dim: int = 128
    segment_tokens: int = SEGMENT_TOKENS
    keys_per_cluster: int = 8
    clusters_per_group: int | None = None
    num_steady: int = 256

    @property
    def group_size(self) -> int:
        """Clusters of a group."""
        params = CentroidParams(clusters_per_group=self.clusters_per_group)
        return params.for_document(self.num_tokens).clusters_per_group or LEAST_PER_GROUP

    @property
    def num_segments(self) -> int:
        """Segments, all of them full."""
        return self.num_tokens // self.segment_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cuts:
    """How slots are cut: sizes [C] of a segment's clusters, counts [P] of a group's clusters."""

    sizes: Tensor
    counts: Tensor


def make_document(
    shape: LayerShape,
    *,
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> DecodeDocument:
    """Layers that differ in their numbers and not in how they are cut."""
    cuts = _cut(shape, seed)
    layers = [_make_layer(shape, cuts, dtype, device, seed + i) for i in range(num_layers)]
    steady = [
        torch.randn((2, shape.num_kv_heads, shape.num_steady, shape.head_dim), device=device).to(
            dtype
        )
        for _ in layers
    ]
    return DecodeDocument(
        runs=_runs(shape),
        k=[k for k, _, _ in layers],
        v=[v for _, v, _ in layers],
        steady_k=[pair[0] for pair in steady],
        steady_v=[pair[1] for pair in steady],
        indexes=[index for _, _, index in layers],
    )


def _cut(shape: LayerShape, seed: int) -> _Cuts:
    generator, sizes, left = torch.Generator().manual_seed(seed), [], shape.segment_tokens
    while left:
        drawn = int(torch.randint(1, 2 * shape.keys_per_cluster, (1,), generator=generator))
        sizes.append(min(drawn, left))
        left -= sizes[-1]
    pieces = torch.split(torch.ones(len(sizes), dtype=torch.int64), shape.group_size)
    return _Cuts(sizes=torch.tensor(sizes), counts=torch.tensor([len(piece) for piece in pieces]))


def _fold_bounds(shape: LayerShape, per_segment: int) -> Tensor:
    """bounds [G, 9] where every segment has so many columns, segments in order of fold."""
    rows = []
    for g in range(shape.num_kv_heads):
        folds = [(s + g) % NUM_FOLDS for s in range(shape.num_segments)]
        rows.append([per_segment * sum(f < edge for f in folds) for edge in range(NUM_FOLDS + 1)])
    return torch.tensor(rows)


def _runs(shape: LayerShape) -> Runs:
    num_runs = shape.num_kv_heads * shape.num_segments
    first = torch.arange(num_runs) * shape.segment_tokens
    heads = torch.arange(shape.num_kv_heads).unsqueeze(1) * shape.num_segments
    return Runs(
        first=first,
        count=torch.full_like(first, shape.segment_tokens),
        bounds=_fold_bounds(shape, 1) + heads,
    )


def _make_layer(
    shape: LayerShape, cuts: _Cuts, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, CentroidIndex]:
    generator = torch.Generator(device).manual_seed(seed)
    num_all, copies = shape.num_kv_heads * shape.num_tokens, shape.num_kv_heads * shape.num_segments
    group_of = torch.repeat_interleave(torch.arange(len(cuts.counts)), cuts.counts)
    group_sizes = torch.zeros(len(cuts.counts), dtype=torch.int64)
    group_sizes.index_add_(0, group_of, cuts.sizes)
    labels = [_labels(sizes, copies, device) for sizes in (cuts.sizes, group_sizes)]
    counts = [len(cuts.sizes) * copies, len(group_sizes) * copies]

    def normal(num_rows: int) -> Tensor:
        size = (num_rows, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    centres, k, v = [normal(count) for count in counts], normal(num_all), normal(num_all)
    for rows in torch.split(torch.arange(num_all, device=device), _ROWS):
        own = 0.6 * centres[0][labels[0][rows]] + centres[1][labels[1][rows]]
        k[rows] = 0.4 * k[rows] + own
    clusters = _units(shape, k, v, labels[0], cuts.sizes)
    groups = _units(shape, k, v, labels[1], group_sizes)
    per_segment = cuts.counts.cumsum(0) - cuts.counts
    segment = torch.arange(shape.num_segments).unsqueeze(1) * len(cuts.sizes)
    starts = (segment + per_segment).flatten().repeat(shape.num_kv_heads, 1)
    group_counts = cuts.counts.repeat(shape.num_kv_heads, shape.num_segments)
    index = CentroidIndex(
        clusters=clusters,
        groups=groups,
        group_starts=starts.to(device),
        group_counts=group_counts.to(device),
    )
    return k, v, index


def _labels(sizes: Tensor, copies: int, device: torch.device) -> Tensor:
    """The unit of every slot, counted over all heads and segments."""
    every = sizes.repeat(copies).to(device)
    return torch.repeat_interleave(torch.arange(len(every), device=device), every)


def _units(shape: LayerShape, k: Tensor, v: Tensor, labels: Tensor, sizes: Tensor) -> Units:
    """Statistics of units that all heads and segments are cut into alike."""
    device, num_kv_heads = k.device, shape.num_kv_heads
    all_sizes = sizes.repeat(num_kv_heads * shape.num_segments).to(device)
    means, squares, sums = torch.zeros((3, len(all_sizes), shape.head_dim), device=device)
    for rows in torch.split(torch.arange(len(labels), device=device), _ROWS):
        keys, own = k[rows].float(), labels[rows]
        means.index_add_(0, own, keys)
        squares.index_add_(0, own, keys.square_())
        sums.index_add_(0, own, v[rows].float())
    means /= all_sizes.unsqueeze(1)
    variances = (squares / all_sizes.unsqueeze(1) - means.square()).clamp_(min=0)
    columns = len(all_sizes) // num_kv_heads
    tables = [x.half().view(num_kv_heads, columns, -1) for x in (means, variances, sums)]
    return Units.from_tables(
        centroids=tables[0],
        variances=tables[1],
        value_sums=tables[2],
        radii=variances.sum(dim=1).sqrt().view(num_kv_heads, columns),
        starts=(all_sizes.cumsum(0) - all_sizes).view(num_kv_heads, columns),
        sizes=all_sizes.view(num_kv_heads, columns),
        bounds=_fold_bounds(shape, len(sizes)),
        ids=torch.arange(columns, device=device).repeat(num_kv_heads, 1),
    )

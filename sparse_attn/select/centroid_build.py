"""Builds the clusters of one segment: batched k-means over every (layer, KV head) at once.

Owns the slot order of a segment and the named tensors that the store persists (DESIGN section 6);
knows no files and no queries. Lloyd's iterations with L2 distance from evenly spaced start tokens
(RetroInfer, section 4.1), then every cluster above `max_cluster_ratio` times the mean size is cut
along its widest dimension, so that one read never costs much more than another. Groups are k-means
over the centroids. Everything is deterministic: the same keys give the same bytes. This file is the
definition, in torch; `centroid_device.py` does the same with kernels on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# A radius is compared with distances that a query-time product rounds differently.
RADIUS_SLACK = 1.0 + 1e-4
# Tables are half as large in half precision; sums and means beyond its range are cut to it.
_MAX_HALF = torch.finfo(torch.float16).max
# Of the distances that k-means holds at a time, unless one problem has more: what a core's cache
# holds, and on a GPU what fills it. Problems are clustered in batches of that size.
MAX_DISTANCE_BYTES = {"cpu": 2 << 20, "cuda": 1 << 30}

# Clusters of a group up to so many tokens.
LEAST_PER_GROUP, GROUPED_TOKENS = 8, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class CentroidParams:
    """What decides the clusters; part of a document's manifest.

    keys_per_cluster: mean size asked for; iterations: of k-means; max_cluster_ratio: a cluster
    above this many times the mean size is split; clusters_per_group: mean size of a group of the
    two-level look-up, None to go by the document's length (`for_document`).
    """

    keys_per_cluster: int = 4
    iterations: int = 5
    max_cluster_ratio: int = 4
    clusters_per_group: int | None = None

    def for_document(self, num_tokens: int) -> CentroidParams:
        """These, with a size of groups: 8 clusters up to 8,192 tokens, then as the root of the
        length, so that a document 8 times as long has 2.8 times as many groups.
        """
        if self.clusters_per_group is not None:
            return self
        size = LEAST_PER_GROUP * math.sqrt(max(1.0, num_tokens / GROUPED_TOKENS))
        return replace(self, clusters_per_group=round(size))

    def to_dict(self) -> dict[str, int | None]:
        """Plain values for the manifest."""
        return asdict(self)

    def num_clusters(self, num_keys: int) -> int:
        """Clusters that k-means looks for."""
        return max(1, num_keys // self.keys_per_cluster)

    def max_size(self, num_keys: int) -> int:
        """Keys of a cluster at most."""
        return self.max_cluster_ratio * math.ceil(num_keys / self.num_clusters(num_keys))

    def max_clusters(self, num_keys: int) -> int:
        """Clusters at most: one of s keys gives fewer than s / max_size pieces beyond its first."""
        return self.num_clusters(num_keys) + num_keys // self.max_size(num_keys)

    def num_groups(self, num_clusters: int) -> int:
        """Groups of the two-level look-up."""
        return max(1, num_clusters // (self.clusters_per_group or LEAST_PER_GROUP))


class _Stats(NamedTuple):
    """Statistics of runs of keys: [B, U, D] float16 means, spreads, sums; [B, U] radii, sizes."""

    centroids: Tensor
    variances: Tensor
    value_sums: Tensor
    radii: Tensor
    sizes: Tensor


def build(
    keys: Tensor,
    values: Tensor,
    *,
    num_sinks: int,
    num_window: int,
    params: CentroidParams,
    kernels: bool | None = None,
) -> dict[str, Tensor]:
    """Cluster one segment and give its slot order.

    keys, values: [B, S, D], any float type, B = layers x KV heads, token order. The first
    `num_sinks` and the last `num_window` tokens stay where they are and belong to no cluster.
    Returns `order` [B, S] int64 (token of each slot) and the tensors `cluster_*`, `centroids`,
    `value_sums`, `variances`, `radii`, `group_*` of DESIGN section 6, starts in segment-local
    slots. Changes nothing. kernels: `centroid_device.py` computes what is not empty, None: where
    keys are on a GPU; it rounds otherwise, so clusters near a tie differ.
    """
    num_problems, num_tokens, _ = keys.shape
    body = slice(num_sinks, max(num_sinks, num_tokens - num_window))
    if (keys.is_cuda if kernels is None else kernels) and num_tokens > num_sinks + num_window:
        from sparse_attn.select.centroid_device import build_on_device

        return build_on_device(keys, values, body, params)
    body_keys, body_values = keys[:, body].float(), values[:, body].float()
    num_body = body_keys.shape[1]
    labels, max_clusters = _cluster(body_keys, params)
    stats = _statistics(body_keys, body_values, labels, max_clusters)
    group_of, max_groups = _group(stats, params)
    new_column = torch.argsort(
        torch.argsort(_column_key(group_of, stats.sizes, max_groups), dim=1), dim=1
    )
    labels = new_column.gather(1, labels)
    stats = _Stats(*(_permute_columns(x, new_column) for x in stats))
    group_of = _permute_columns(group_of, new_column)
    order = torch.argsort(labels, dim=1, stable=True) + num_sinks
    fixed = torch.arange(num_tokens, device=keys.device).expand(num_problems, -1)
    order = torch.cat([fixed[:, :num_sinks], order, fixed[:, num_sinks + num_body :]], dim=1)
    starts = stats.sizes.cumsum(1) - stats.sizes + num_sinks
    group_labels = group_of.gather(1, labels)
    groups = _statistics(body_keys, body_values, group_labels, max_groups)
    group_counts = _count(group_of.masked_fill(stats.sizes == 0, max_groups), max_groups + 1)[
        :, :-1
    ]
    return {
        "order": order,
        "cluster_starts": starts.int(),
        "cluster_sizes": stats.sizes.int(),
        "centroids": stats.centroids,
        "value_sums": stats.value_sums,
        "variances": stats.variances,
        "radii": stats.radii,
        "group_starts": (group_counts.cumsum(1) - group_counts).int(),
        "group_counts": group_counts.int(),
        "group_sizes": groups.sizes.int(),
        "group_centroids": groups.centroids,
        "group_value_sums": groups.value_sums,
        "group_variances": groups.variances,
        "group_radii": groups.radii,
    }


def kmeans(points: Tensor, *, num_clusters: int, iterations: int) -> Tensor:
    """Labels [B, n] of Lloyd's k-means over points [B, n, D] float32, the same on every run.

    Starts from evenly spaced points; a cluster that loses every point keeps its centre.
    """
    per_problem = points.shape[1] * num_clusters * points.element_size()
    batch = max(1, MAX_DISTANCE_BYTES[points.device.type] // per_problem)
    batches = torch.split(points, batch)
    return torch.cat([_lloyd(some, num_clusters, iterations) for some in batches])


def _lloyd(points: Tensor, num_clusters: int, iterations: int) -> Tensor:
    num_problems, num_points, _ = points.shape
    first = torch.arange(num_clusters, device=points.device) * num_points // num_clusters
    centres = points[:, first]
    # One buffer for every iteration: fresh memory of this size costs more than the product.
    distances = points.new_empty(num_problems, num_points, num_clusters)
    labels = _assign(points, centres, distances)
    for _ in range(iterations):
        sizes = _count(labels, num_clusters).unsqueeze(2)
        means = _sum_by_label(points, labels, num_clusters) / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
        labels = _assign(points, centres, distances)
    return labels


def _assign(points: Tensor, centres: Tensor, distances: Tensor) -> Tensor:
    """Nearest centre of each point; overwrites distances [B, n, C], less each point's own norm."""
    norms = centres.square().sum(dim=2).unsqueeze(1)
    torch.baddbmm(norms, points, centres.transpose(1, 2), alpha=-2.0, out=distances)
    return distances.min(dim=2).indices


def _sum_by_label(x: Tensor, labels: Tensor, num_units: int) -> Tensor:
    """[B, n, D] and labels [B, n] -> sums [B, U, D]."""
    num_problems, _, dim = x.shape
    offsets = torch.arange(num_problems, device=x.device).unsqueeze(1) * num_units
    sums = x.new_zeros(num_problems * num_units, dim)
    sums.index_add_(0, (labels + offsets).view(-1), x.reshape(-1, dim))
    return sums.view(num_problems, num_units, dim)


def _cluster(points: Tensor, params: CentroidParams) -> tuple[Tensor, int]:
    """Labels [B, n] and the number of label values, oversized clusters already split."""
    num_points = points.shape[1]
    if num_points == 0:
        return torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device), 1
    num_clusters = params.num_clusters(num_points)
    labels = kmeans(points, num_clusters=num_clusters, iterations=params.iterations)
    _split_oversized(points, labels, num_clusters, params.max_size(num_points))
    return labels, params.max_clusters(num_points)


def _split_oversized(points: Tensor, labels: Tensor, num_clusters: int, max_size: int) -> None:
    """Cut clusters above max_size into even pieces along their widest dimension; writes labels."""
    sizes = _count(labels, num_clusters)
    next_label = [num_clusters] * labels.shape[0]
    for problem, cluster in (sizes > max_size).nonzero().tolist():
        members = (labels[problem] == cluster).nonzero().squeeze(1)
        own = points[problem, members]
        widest = int(own.var(dim=0, unbiased=False).argmax())
        members = members[torch.argsort(own[:, widest], stable=True)]
        pieces = torch.tensor_split(members, math.ceil(members.numel() / max_size))
        for piece in pieces[1:]:
            labels[problem, piece] = next_label[problem]
            next_label[problem] += 1


def _statistics(keys: Tensor, values: Tensor, labels: Tensor, num_units: int) -> _Stats:
    sizes = _count(labels, num_units)
    counts = sizes.clamp(min=1).unsqueeze(2)
    # Spread and radius are taken about the centroid as it is stored: the bound stays a bound.
    centroids = _halve(_sum_by_label(keys, labels, num_units) / counts)
    if keys.shape[1] == 0:
        return _Stats(centroids, centroids, centroids, sizes.float(), sizes)
    columns = labels.unsqueeze(2).expand(-1, -1, keys.shape[2])
    centred = keys - centroids.float().gather(1, columns)
    squares = centred.square_()
    distance = squares.sum(dim=2).sqrt_()
    radii = torch.zeros_like(sizes, dtype=torch.float32)
    radii.scatter_reduce_(1, labels, distance, "amax")
    return _Stats(
        centroids=centroids,
        variances=_halve(_sum_by_label(squares, labels, num_units) / counts),
        value_sums=_halve(_sum_by_label(values, labels, num_units)),
        radii=radii * RADIUS_SLACK,
        sizes=sizes,
    )


def _halve(x: Tensor) -> Tensor:
    return x.clamp_(-_MAX_HALF, _MAX_HALF).half()


def _group(stats: _Stats, params: CentroidParams) -> tuple[Tensor, int]:
    """Group [B, C] of every cluster, and the number of groups."""
    num_groups = params.num_groups(stats.sizes.shape[1])
    return kmeans(
        stats.centroids.float(), num_clusters=num_groups, iterations=params.iterations
    ), num_groups


def _column_key(group_of: Tensor, sizes: Tensor, num_groups: int) -> Tensor:
    """Sort key that puts a group's clusters side by side and empty clusters last."""
    group = group_of.masked_fill(sizes == 0, num_groups)
    return group * sizes.shape[1] + torch.arange(sizes.shape[1], device=sizes.device)


def _permute_columns(x: Tensor, new_column: Tensor) -> Tensor:
    index = new_column if x.dim() == 2 else new_column.unsqueeze(2).expand_as(x)
    return torch.empty_like(x).scatter_(1, index, x)


def _count(labels: Tensor, num_values: int) -> Tensor:
    counts = torch.zeros(labels.shape[0], num_values, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(1, labels, torch.ones_like(labels))

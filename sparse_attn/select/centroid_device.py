"""Builds the clusters of one segment with kernels, on a GPU: `centroid_build.py` is the definition.

Owns the sequence: k-means, cut, group, sort by group, statistics. Refuses to know how any of them
is computed (`kernels/kmeans.py`, `label_runs.py`, `run_*.py`) and never waits for the device. The
same keys give the same bytes on one type of device; the definition's clusters differ from these
where rounding to half precision decides which centre is nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.kernels.kmeans import kmeans
from sparse_attn.kernels.label_runs import Runs, exclusive_sum, find_runs
from sparse_attn.kernels.run_split import split_oversized
from sparse_attn.kernels.run_statistics import run_means, run_statistics
from sparse_attn.select.centroid_build import RADIUS_SLACK, CentroidParams


def build_on_device(
    keys: Tensor, values: Tensor, body: slice, params: CentroidParams
) -> dict[str, Tensor]:
    """`centroid_build.build` of tokens `body`, at least one, of keys, values [B, S, D]."""
    num_tokens = keys.shape[1]
    own_keys, own_values = keys[:, body], values[:, body]
    labels, num_columns = _cluster(own_keys, params)
    num_groups = params.num_groups(num_columns)
    runs = find_runs(labels, num_columns)
    group_of = kmeans(
        run_means(own_keys, runs), num_clusters=num_groups, iterations=params.iterations
    )
    # Side by side within their group, empty clusters last.
    columns = find_runs(group_of.masked_fill(runs.sizes == 0, num_groups), num_groups + 1)
    runs = find_runs(_rename(labels, columns.members), num_columns)
    clusters = run_statistics(own_keys, own_values, runs, slack=RADIUS_SLACK)
    group_runs = _join(runs, group_of.gather(1, columns.members.long()), num_groups)
    groups = run_statistics(own_keys, own_values, group_runs, slack=RADIUS_SLACK)
    fixed = torch.arange(num_tokens, device=keys.device).expand(keys.shape[0], -1)
    order = [fixed[:, : body.start], runs.members.long() + body.start, fixed[:, body.stop :]]
    return {
        "order": torch.cat(order, dim=1),
        "cluster_starts": runs.starts + body.start,
        "cluster_sizes": runs.sizes,
        "centroids": clusters.centroids,
        "value_sums": clusters.value_sums,
        "variances": clusters.variances,
        "radii": clusters.radii,
        "group_starts": columns.starts[:, :-1].contiguous(),
        "group_counts": columns.sizes[:, :-1].contiguous(),
        "group_sizes": group_runs.sizes,
        "group_centroids": groups.centroids,
        "group_value_sums": groups.value_sums,
        "group_variances": groups.variances,
        "group_radii": groups.radii,
    }


def _cluster(keys: Tensor, params: CentroidParams) -> tuple[Tensor, int]:
    """Labels [B, n] int32 and the number of label values, oversized clusters already split."""
    num_keys = keys.shape[1]
    num_clusters = params.num_clusters(num_keys)
    labels = kmeans(keys, num_clusters=num_clusters, iterations=params.iterations)
    split_oversized(keys, labels, num_clusters, max_size=params.max_size(num_keys))
    return labels, params.max_clusters(num_keys)


def _rename(labels: Tensor, sorted_labels: Tensor) -> Tensor:
    """Labels [B, n], each replaced by where it stands in sorted_labels [B, U]."""
    place = torch.arange(sorted_labels.shape[1], device=labels.device, dtype=labels.dtype)
    new_label = torch.empty_like(sorted_labels)
    new_label.scatter_(1, sorted_labels.long(), place.expand_as(sorted_labels))
    return new_label.gather(1, labels.long())


def _join(runs: Runs, group_of: Tensor, num_groups: int) -> Runs:
    """The runs of groups, whose clusters lie side by side; group_of: [B, U]."""
    sizes = runs.sizes.new_zeros(runs.sizes.shape[0], num_groups)
    sizes.scatter_add_(1, group_of.long(), runs.sizes)
    return Runs(runs.members, exclusive_sum(sizes), sizes)

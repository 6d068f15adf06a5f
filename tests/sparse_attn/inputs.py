"""Inputs that the tests of sparse_attn share: random attention, and a clustered layer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.select.centroid import CentroidIndex, Units
from sparse_attn.select.centroid_build import CentroidParams, build

SCALE = 0.25


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


def clustered_layer(
    num_tokens: int,
    *,
    num_sinks: int = 4,
    num_window: int = 8,
    seed: int = 0,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    params: CentroidParams | None = None,
) -> tuple[Tensor, Tensor, CentroidIndex, dict[str, Tensor]]:
    """Keys and values [G, S, D] in slot order, the index over them, and what `build` returned."""
    _, keys, values = random_qkv(
        1, num_tokens, seed=seed, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    built = build(
        keys,
        values,
        num_sinks=num_sinks,
        num_window=num_window,
        params=params or CentroidParams(keys_per_cluster=8, clusters_per_group=4),
    )
    index = built["order"].unsqueeze(-1).expand_as(keys)
    return keys.gather(1, index), values.gather(1, index), make_index(built), built


def make_index(built: dict[str, Tensor]) -> CentroidIndex:
    """The look-up tables of one segment."""
    clusters = Units.from_tables(
        centroids=built["centroids"],
        variances=built["variances"],
        value_sums=built["value_sums"],
        radii=built["radii"],
        starts=built["cluster_starts"],
        sizes=built["cluster_sizes"],
    )
    first = built["group_starts"].long().clamp(max=clusters.starts.shape[1] - 1)
    groups = Units.from_tables(
        centroids=built["group_centroids"],
        variances=built["group_variances"],
        value_sums=built["group_value_sums"],
        radii=built["group_radii"],
        starts=clusters.starts.gather(1, first),
        sizes=built["group_sizes"],
    )
    return CentroidIndex(
        clusters=clusters,
        groups=groups,
        group_starts=built["group_starts"].long(),
        group_counts=built["group_counts"].long(),
    )

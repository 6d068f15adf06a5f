"""Keys of a full segment -> its clusters and slot order: what `prefill.py` seals.

Owns how clustering is shared by the ranks that have the keys. Refuses to know files, and whose
segment it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from collectives import Group
from collectives.mesh import split_evenly
from sparse_attn.select.centroid_build import CentroidParams, build


def cluster_together(
    k: Tensor,
    v: Tensor,
    clustered: tuple[int, int],
    params: CentroidParams | None,
    context: Group,
) -> dict[str, Tensor]:
    """`cluster_segment` over the context ranks, which all have these keys: each clusters as many
    heads of layers as the others, whoever owns them, and all get all. Collective.
    """
    num_layers, num_kv_heads = k.shape[:2]
    if context.size == 1 or params is None or num_layers == 0:
        return cluster_segment(k, v, clustered, params)
    runs = split_evenly(num_layers * num_kv_heads, context.size)
    own = runs[context.rank] or range(1)  # who has none brings rows that nobody takes
    own_k, own_v = (x.flatten(0, 1)[own.start : own.stop].unsqueeze(1) for x in (k, v))
    built = cluster_segment(own_k, own_v, clustered, params)
    widest = max(len(run) for run in runs)
    gathered = {}
    for name, tensor in built.items():
        brought = context.all_gather(_pad_rows(tensor.squeeze(1), widest))
        rows = [x[: len(run)] for x, run in zip(brought, runs, strict=True)]
        gathered[name] = _by_layer(torch.cat(rows), num_layers)
    return gathered


def cluster_segment(
    k: Tensor, v: Tensor, clustered: tuple[int, int], params: CentroidParams | None
) -> dict[str, Tensor]:
    """Clusters of k, v [L, G, S, D] of one segment, and `order`, the token of each slot, all
    [L, G, ...]; nothing where there is nothing to cluster.
    """
    num_layers, _, num_tokens, _ = k.shape
    if params is None or num_layers == 0:
        return {}
    first, last = clustered
    built = build(
        k.flatten(0, 1),
        v.flatten(0, 1),
        num_sinks=first,
        num_window=num_tokens - last,
        params=params,
    )
    return {name: _by_layer(x, num_layers) for name, x in built.items()}


def put_in_order(k: Tensor, v: Tensor, clusters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored of k, v [L, G, S, D]: both in slot order, positions, and the clusters."""
    num_layers, num_kv_heads, num_tokens, head_dim = k.shape
    if not clusters:
        positions = torch.arange(num_tokens, device=k.device, dtype=torch.int32)
        positions = positions.expand(num_layers, num_kv_heads, -1).clone()
        return {"k": k.clone(), "v": v.clone(), "positions": positions}
    tables = dict(clusters)
    order = tables.pop("order")
    index = order.unsqueeze(-1).expand(-1, -1, -1, head_dim)
    return {"k": k.gather(2, index), "v": v.gather(2, index), "positions": order.int(), **tables}


def pick(x: Tensor, dim: int, chosen: list[int]) -> Tensor:
    """Some indices of a dimension, ascending; `x` itself where those are all of them."""
    if len(chosen) == x.shape[dim]:
        return x
    return x.index_select(dim, torch.tensor(chosen, device=x.device))


def _by_layer(x: Tensor, num_layers: int) -> Tensor:
    """[L G, ...] as [L, G, ...]."""
    return x.view(num_layers, -1, *x.shape[1:])


def _pad_rows(x: Tensor, num_rows: int) -> Tensor:
    """Contiguous [num_rows, ...]: x, then zeros."""
    return torch.cat([x, x.new_zeros(num_rows - x.shape[0], *x.shape[1:])])

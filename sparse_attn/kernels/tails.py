"""What a step left unread, for the sample of its recall: off the hot path, in torch operators."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.select.base import Tail
from sparse_attn.select.centroid import Units


def tail_of(
    q: Tensor, units: Units, mass: Tensor, *, scale: float, columns: Tensor | None = None
) -> Tail:
    """The tail of units, or of those at columns [G, W], for one query q [1, H, D].

    mass: [H, U], estimated log mass of each unit, -inf where it was read or does not count.
    """
    num_kv_heads, head_dim = units.sizes.shape[0], q.shape[2]

    def own(table: Tensor) -> Tensor:
        return table if columns is None else table.gather(1, columns)

    centroids = units.centroids
    if columns is not None:
        centroids = centroids.gather(1, columns.unsqueeze(2).expand(-1, -1, head_dim))
    rows = q.view(num_kv_heads, -1, head_dim).float()
    linear = torch.bmm(rows, centroids.float().transpose(1, 2)).mul_(scale)
    linear += own(units.log_sizes).unsqueeze(1)
    return Tail(
        log_mass=mass.unsqueeze(0),
        log_mass_linear=linear.flatten(0, 1).unsqueeze(0),
        radii=own(units.radii),
        starts=own(units.starts),
        sizes=own(units.sizes),
    )

"""Which units a query reads: the rule, in torch operators.

Units go in order of benefit, equal ones by lowest column, until the limit. By keys: while all of
their keys fit. By mass: until every head of the group has read enough of its attention. Shares are
added as integers (multiples of 2^-40): a sum of them does not depend on the order, the device or
the backend. `lists.py` applies the same rule to units that lie with several callers, and
`native/kernels.c` is the same in C.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparse_attn.select.base import Limit
from sparse_attn.step import Ranks

_QUANTA = 2.0**40


def take(ranks: Ranks, sizes: Tensor, limit: Limit) -> Tensor:
    """Taken [G, T, U] bool; sizes: [G, U] int64, 0 at padding."""
    order = descending(ranks.benefit)
    sizes = sizes.unsqueeze(1).expand_as(order).gather(2, order)
    shares = None
    if ranks.shares is not None:
        shares = ranks.shares.gather(3, order.unsqueeze(1).expand_as(ranks.shares))
    taken = fits(sizes, shares, ranks.steady, limit)
    return torch.zeros_like(taken).scatter_(2, order, taken)


def fits(sizes: Tensor, shares: Tensor | None, steady: Tensor | None, limit: Limit) -> Tensor:
    """Which of the units in order of benefit are read, [G, T, n] bool.

    sizes: [G, T, n] int64; by mass also shares: [G, H/G, T, n], steady: [G, H/G, T].
    """
    if limit.keys is not None:
        return (sizes.cumsum(dim=-1) <= limit.keys) & (sizes > 0)
    assert limit.mass is not None
    assert shares is not None
    assert steady is not None
    quanta = quantised(shares)
    before = quanta.cumsum(dim=-1) - quanta + quantised(steady).unsqueeze(-1)
    return (before < int(limit.mass * _QUANTA)).any(dim=1) & (sizes > 0)


def quantised(shares: Tensor) -> Tensor:
    """Shares as whole multiples of 2^-40, int64; what is not a number counts nothing."""
    return shares.double().nan_to_num(nan=0.0).mul_(_QUANTA).floor_().long()


def descending(benefit: Tensor) -> Tensor:
    """Order of non-negative float32 rows from greatest to least, equal values by lowest index.

    On the CPU each value and its index become one integer that sorts the same way (bits of a
    non-negative float are ordered as it is): numpy sorts those in vector registers, several times
    faster than a stable sort.
    """
    if benefit.device.type != "cpu":
        return benefit.sort(dim=-1, descending=True, stable=True).indices
    bits = benefit.contiguous().view(torch.int32).numpy().astype(np.int64)
    packed = -(bits << 32) + np.arange(benefit.shape[-1])
    packed.sort(axis=-1)
    return torch.from_numpy(packed & 0xFFFFFFFF)

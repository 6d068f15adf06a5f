"""What units are worth to a query and KV head, as a choice among them goes by it.

Owns benefit and shares: of the attention of all heads of the group, what share a unit is estimated
to have, against the number of its keys. The rule of `select/take.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LOWEST

PARTS = tl.constexpr(float(1 << 30))  # of the greatest mass
QUANTA = tl.constexpr(float(1 << 40))  # shares are added as integers (`select/take.py`)


@triton.jit
def lses_of(
    steady, num_steady, first, num_first, second, num_second, max_second, place,
    P: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Log masses at places [n, 1] of three lists [., P], one behind the other: [n, BLOCK_P].

    Of the third everything is asked for, up to max_second, without waiting for how many count.
    """
    head = tl.arange(0, BLOCK_P)[None, :]
    own = place * P + head
    is_steady = place < num_steady
    is_first = ~is_steady & (place < num_steady + num_first)
    own_first = own - num_steady * P
    x = tl.load(steady + own, mask=is_steady & (head < P), other=-float("inf"))
    y = tl.load(first + own_first, mask=is_first & (head < P), other=-float("inf"))
    x = tl.maximum(x, y)
    if second is not None:
        place_second = place - num_steady - num_first
        is_second = (place_second >= 0) & (place_second < max_second) & (head < P)
        at = second + place_second * P + head
        more = tl.load(at, mask=is_second, other=-float("inf"))
        x = tl.maximum(x, tl.where(place_second < num_second, more, -float("inf")))
    return x


@triton.jit
def total_of(
    steady, num_steady, first, num_first, second, num_second, max_second,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log mass of the steady parts alone, and of them and two lists: [BLOCK_P] each.

    Masses are added as multiples of 2^-30 of the greatest: a sum does not depend on its order.
    """
    count = num_steady + num_first + num_second
    place = tl.arange(0, BLOCK)[:, None]
    x = lses_of(
        steady, num_steady, first, num_first, second, num_second, max_second, place, P, BLOCK_P
    )  # fmt: skip
    high = tl.max(x, 0)
    for start in range(BLOCK, count, BLOCK):
        more = lses_of(
            steady, num_steady, first, num_first, second, num_second, max_second,
            start + place, P, BLOCK_P,
        )  # fmt: skip
        high = tl.maximum(high, tl.max(more, 0))
    high = tl.maximum(high, LOWEST)
    own = (tl.exp(x - high[None, :]) * PARTS).to(tl.int64)
    reads = tl.sum(tl.where(place < num_steady, own, 0), 0)
    total = tl.sum(own, 0)
    for start in range(BLOCK, count, BLOCK):
        more = lses_of(
            steady, num_steady, first, num_first, second, num_second, max_second,
            start + place, P, BLOCK_P,
        )  # fmt: skip
        own = (tl.exp(more - high[None, :]) * PARTS).to(tl.int64)
        reads += tl.sum(tl.where(start + place < num_steady, own, 0), 0)
        total += tl.sum(own, 0)
    return log_of(high, reads), log_of(high, total)


@triton.jit
def log_of(high, parts):
    """high + log of so many parts; -inf for none."""
    share = tl.maximum(parts, 1).to(tl.float32) / PARTS
    return tl.where(parts > 0, high + tl.log(share), -float("inf"))


@triton.jit
def scalar(x, index, BLOCK: tl.constexpr):
    """One element of x [BLOCK]."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == index, x, 0.0), 0)


@triton.jit
def share_of(log_mass, width, unit, is_unit, totals, p, BLOCK_P: tl.constexpr):
    """Share of head p's attention that each unit has."""
    at = log_mass + p * width + unit
    mass = tl.load(at, mask=is_unit, other=-float("inf"))
    return tl.exp(mass - tl.maximum(scalar(totals, p, BLOCK_P), LOWEST))


@triton.jit
def bits_of(log_mass, width, unit, is_unit, sizes, totals, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Benefit of units as ordered integers: shares of all heads over the root of the size; -1 for
    what is no unit.
    """
    benefit = share_of(log_mass, width, unit, is_unit, totals, 0, BLOCK_P)
    for p in tl.static_range(1, P):
        benefit += share_of(log_mass, width, unit, is_unit, totals, p, BLOCK_P)
    benefit *= tl.rsqrt(tl.maximum(sizes, 1).to(tl.float32))
    return tl.where(is_unit & (sizes > 0), benefit.to(tl.int32, bitcast=True), -1)


@triton.jit
def quanta_of(log_mass, width, unit, is_unit, totals, p, BLOCK_P: tl.constexpr):
    """Shares of head p as whole multiples of 2^-40."""
    share = share_of(log_mass, width, unit, is_unit, totals, p, BLOCK_P)
    return (share.to(tl.float64) * QUANTA).to(tl.int64)

"""What units are worth to a query and KV head, as a choice among them goes by it.

Owns benefit and shares: of the attention of all heads of the group, what share a unit is estimated
to have, against the number of its keys. The rule of `select/take.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LOWEST, fold_lse, log_add, log_sum, tree_lse

QUANTA = tl.constexpr(float(1 << 40))  # shares are added as integers (`select/take.py`)


@triton.jit
def total_of(
    steady, num_steady, lists_a, bounds_a, lists_b, bounds_b, P: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Log mass of the steady parts, and of them and two lists cut by fold: [BLOCK_P] each."""
    head = tl.arange(0, BLOCK_P)[None, :]
    reads = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    for start in range(0, num_steady, 16):
        place = start + tl.arange(0, 16)[:, None]
        is_part = (place < num_steady) & (head < P)
        x = tl.load(steady + place * P + head, mask=is_part, other=-float("inf"))
        reads = log_add(reads, log_sum(x, 0))
    folds = fold_lse(lists_a, bounds_a, P, BLOCK_P, 16)
    folds = log_add(folds, fold_lse(lists_b, bounds_b, P, BLOCK_P, 16))
    return reads, log_add(reads, tree_lse(folds, BLOCK_P))


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

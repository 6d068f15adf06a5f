"""What the kernels share: the arithmetic of a part, and where a tile of a list lies.

Owns the log-sum-exp rules of `state.py` inside a kernel (natural log outside, base 2 inside), the
tree in which the 8 folds meet, and the tiling of lists that are cut by fold. A list is divided into
the 8 folds by 9 rising bounds; a tile never crosses a fold, so what a tile holds does not depend on
who else's folds the caller has.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where a difference to -inf is taken (`state.LOWEST`)


@triton.jit
def log_add(a, b):
    """log(exp(a) + exp(b)), elementwise; either may be -inf."""
    high = tl.maximum(a, b)
    low = tl.minimum(a, b)
    return high + tl.log(1.0 + tl.exp(low - tl.maximum(high, LOWEST)))


@triton.jit
def log_sum(x, axis: tl.constexpr):
    """log of the sum of exp along an axis; -inf where every number is."""
    high = tl.maximum(tl.max(x, axis), LOWEST)
    total = tl.sum(tl.exp(x - tl.expand_dims(high, axis)), axis)
    is_seen = total > 0.0
    return tl.where(is_seen, high + tl.log(tl.where(is_seen, total, 1.0)), -float("inf"))


@triton.jit
def halves(x, n: tl.constexpr, width: tl.constexpr):
    """The first and the last n / 2 of x [n, width], [n / 2, width] each."""
    paired = tl.reshape(x, (2, n // 2, width))
    return tl.split(tl.permute(paired, (1, 2, 0)))


@triton.jit
def tiles_of_folds(bounds, tile):
    """(first, last, tiles before, tiles) of each fold of a list, [8] int32."""
    fold = tl.arange(0, 8)
    first = tl.load(bounds + fold)
    last = tl.load(bounds + fold + 1)
    tiles = (last - first + tile - 1) // tile
    return first, last, tl.cumsum(tiles, 0) - tiles, tiles


@triton.jit
def pick(x, index):
    """One element of x [8]."""
    return tl.sum(tl.where(tl.arange(0, 8) == index, x, 0), 0)


@triton.jit
def fold_of(before, tiles, tile):
    """The fold that a tile belongs to."""
    return tl.sum((before + tiles <= tile).to(tl.int32), 0)


@triton.jit
def span_of(first, last, before, tiles, tile, TILE: tl.constexpr):
    """(start, length) of a tile of a list with these `tiles_of_folds`."""
    fold = fold_of(before, tiles, tile)
    start = pick(first, fold) + (tile - pick(before, fold)) * TILE
    return start, tl.minimum(pick(last, fold) - start, TILE)


@triton.jit
def address(at, kind):
    """The pointer that is stored at `at` as an integer."""
    return tl.load(at).to(tl.pointer_type(kind))


@triton.jit
def fit_queries(x, KV: tl.constexpr, STORED: tl.constexpr):
    """Rows of queries [R, D] in the type in which they meet stored keys, and what to multiply
    products by: [R], a power of two.

    Keys in e4m3 are widened to half, which holds each of them, and of a query whose greatest
    element is below 1 all that matters beside that one; where queries are float32, to float32.
    """
    x = x.to(tl.float32)
    power = tl.full((x.shape[0],), 1.0, tl.float32)
    if tl.float8e4nv == STORED and tl.float32 != KV:
        greatest = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
        power = tl.exp2(tl.floor(tl.log2(greatest)) + 1.0)
        x = (x / power[:, None]).to(tl.float16)
    return x, power


@triton.jit
def load_stored(base, row, is_row, D: tl.constexpr, KV: tl.constexpr, STORED: tl.constexpr):
    """Rows [n, D] of a table of keys or values as `fit_queries` fits queries to them: numbers of
    type KV, or what stands for them in e4m3, to be multiplied by their head's scale.
    """
    x = tl.load(rows_at(base, row, D), mask=is_row[:, None], other=0.0)
    if tl.float8e4nv == STORED:
        x = x.to(tl.float32 if tl.float32 == KV else tl.float16)
    return x


@triton.jit
def rows_at(base, row, D: tl.constexpr):
    """Pointers [n, D] to rows [n] of a table of width D that begins at a multiple of 16 bytes,
    which the compiler cannot know of an address that was loaded: rows are read in vectors.
    """
    return tl.multiple_of(base + row[:, None] * D + tl.arange(0, D)[None, :], (1, 16))

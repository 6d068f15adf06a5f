"""What a query missed: a sample of its unread keys, and the radius bound (`estimate.py`).

The same estimator as `estimate.sample_missed`, in two launches. Unread keys stand in two lists of
units a problem, of those looked at first and of the clusters of opened groups; a unit is drawn by
its estimated mass, mixed with its size so that no key is out of reach, then a key of it evenly; two
draws fall in each stratum of the cumulated probability. Off the hot path: a few queries of each
layer are sampled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.common import LOWEST, address, log_add, log_sum, rows_at
from sparse_attn.kernels.score import LOW, load_queries, product

# Columns of a list of units: addresses of log masses [P, width], sizes and first slots [n] int32,
# units, width; and what the bound goes by: addresses of columns [n] int32 in the tables (0 where
# each is its own), of centroids [U, D] half and radii [U] float32.
LIST_COLUMNS = 8


@triton.jit
def chances(masses, sizes, log_total, num_keys, UNIFORM: tl.constexpr):
    """Probability of each unit: by mass, mixed with the share of the unread keys."""
    is_unread = masses > -float("inf")
    by_mass = tl.exp(masses - log_total)
    by_size = sizes.to(tl.float32) / tl.maximum(num_keys, 1).to(tl.float32)
    return tl.where(is_unread, (1.0 - UNIFORM) * by_mass + UNIFORM * by_size, 0.0)


@triton.jit
def units_of(entry, p, unit, count):
    """Log mass for head p and size of units of a list."""
    is_unit = unit < count
    width = tl.load(entry + 4)
    at = address(entry, tl.float32) + p * width + unit
    masses = tl.load(at, mask=is_unit, other=-float("inf"))
    return masses, tl.load(address(entry + 1, tl.int32) + unit, mask=is_unit, other=0)


@triton.jit
def totals_of(own, p, NUM_LISTS: tl.constexpr, TILE: tl.constexpr, UNIFORM: tl.constexpr):
    """log mass of a problem's unread units for head p, their keys, and the sum of their chances."""
    log_total = -float("inf")
    num_keys = tl.zeros((), tl.int32)
    for index in range(NUM_LISTS):
        entry = own + index * 8
        count = tl.load(address(entry + 3, tl.int32))
        for start in range(0, count, TILE):
            masses, sizes = units_of(entry, p, start + tl.arange(0, TILE), count)
            log_total = log_add(log_total, log_sum(masses, 0))
            num_keys += tl.sum(tl.where(masses > -float("inf"), sizes, 0), 0)
    log_total = tl.maximum(log_total, LOWEST)
    whole = 0.0
    for index in range(NUM_LISTS):
        entry = own + index * 8
        count = tl.load(address(entry + 3, tl.int32))
        for start in range(0, count, TILE):
            masses, sizes = units_of(entry, p, start + tl.arange(0, TILE), count)
            whole += tl.sum(chances(masses, sizes, log_total, num_keys, UNIFORM), 0)
    return log_total, num_keys, whole


@triton.jit
def random_pair(seed, query, layer, head, DRAWS: tl.constexpr):
    """Two numbers from 0 to 1 for each draw, of their own for each seed, query, layer and head
    (Philox, Salmon et al. 2011): no state, so that they do not depend on what else was sampled.
    """
    draw = tl.arange(0, DRAWS)
    none = tl.zeros((DRAWS,), tl.int32)
    a, b, _, _ = tl.philox(
        seed, none + head.to(tl.int32) * DRAWS + draw, none + query.to(tl.int32), none + layer, none
    )
    return tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b)


@triton.jit(do_not_specialize=["layer"])
def sample_kernel(
    q, documents, lists, seeds, visible, layer, chosen, lse_read, most, mean, variance, log_most,
    scale,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, STORED: tl.constexpr,
    NUM_LISTS: tl.constexpr,
    DRAWS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr,
    UNIFORM: tl.constexpr, MAX_RATIO: tl.constexpr, IS_SCALED: tl.constexpr,
):  # fmt: skip
    """Mass of the unread keys over lse_read, estimated from DRAWS of them, two a stratum.

    Grid: (P, Z), one query a document. documents: int64 [B, 3], addresses of keys [N, D] of type
    STORED, of values, and, where IS_SCALED, of what a head's are multiplied by, [G, 2]; lists:
    int64 [Z, NUM_LISTS, 8]; seeds, visible: int64 [B], whose random numbers are drawn, and of which
    query: how many steady keys it sees; chosen: int32 [B], which documents' queries are sampled,
    None for all; most [Z, SPLITS, P], what `bound_kernel` wrote. Writes mean and variance [Z, P] of
    those, zero where no key is unread, and log_most [Z, P], -inf there. Reads each list three times
    and DRAWS keys.
    """
    p = tl.program_id(0)
    z = tl.program_id(1)
    document = z // G
    if chosen is not None:  # noqa: SIM102  (None is known when it is compiled)
        if tl.load(chosen + document) == 0:
            return
    keys = address(documents + document * 3, STORED)
    own = lists + z * NUM_LISTS * 8
    log_total, num_keys, whole = totals_of(own, p, NUM_LISTS, WIDE, UNIFORM)
    draw = tl.arange(0, DRAWS)
    row = z * P + p
    within, inside = random_pair(
        tl.load(seeds + document), tl.load(visible + document), layer, row % (G * P), DRAWS
    )
    place = (within + (draw // 2).to(tl.float32)) / (DRAWS // 2) * whole
    slots = tl.zeros((DRAWS,), tl.int64)
    weights = tl.zeros((DRAWS,), tl.float32)
    before = 0.0
    for index in range(NUM_LISTS):
        entry = own + index * 8
        count = tl.load(address(entry + 3, tl.int32))
        starts_at = address(entry + 2, tl.int32)
        for start in range(0, count, TILE):
            unit = start + tl.arange(0, TILE)
            masses, sizes = units_of(entry, p, unit, count)
            chance = chances(masses, sizes, log_total, num_keys, UNIFORM)
            ends = before + tl.cumsum(chance, 0)
            # Rounding may put the last places at the very end: the last that can be drawn has them.
            is_here = (chance > 0.0)[None, :] & (place[:, None] >= (ends - chance)[None, :])
            found = tl.max(tl.where(is_here, unit[None, :], -1), 1)
            is_found = found >= 0
            size = tl.load(address(entry + 1, tl.int32) + found, mask=is_found, other=1)
            first = tl.load(starts_at + found, mask=is_found, other=0)
            of_unit = tl.where(unit[None, :] == found[:, None], chance[None, :], 0.0)
            offset = tl.minimum((inside * size.to(tl.float32)).to(tl.int32), size - 1)
            slots = tl.where(is_found, (first + offset).to(tl.int64), slots)
            weight = size.to(tl.float32) / tl.maximum(tl.sum(of_unit, 1), 1e-30)
            weights = tl.where(is_found, weight, weights)
            before += tl.sum(chance, 0)
    columns = tl.arange(0, D)
    x = tl.load(q + row * D + columns).to(tl.float32)
    k = tl.load(rows_at(keys, slots, D), mask=(weights > 0.0)[:, None], other=0.0)
    if IS_SCALED:
        scale *= tl.load(address(documents + document * 3 + 2, tl.float32) + 2 * (z % G))
    scores = tl.sum(k.to(tl.float32) * x[None, :], 1) * scale
    ratio = weights * tl.exp(tl.minimum(scores - tl.load(lse_read + row), MAX_RATIO))
    a, b = tl.split(tl.reshape(ratio, (DRAWS // 2, 2)))
    tl.store(mean + row, tl.sum(a + b, 0) / DRAWS)
    tl.store(variance + row, tl.sum((a - b) * (a - b), 0) / (DRAWS * DRAWS))
    parts = tl.load(most + (z * SPLITS + tl.arange(0, SPLITS)) * P + p)
    tl.store(log_most + row, log_sum(parts, 0))


@triton.jit
def bound_kernel(
    q, lists, chosen, most, scale,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
    NUM_LISTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """log of the greatest mass that the unread keys can have: log n + s (q.c + |q| r), summed over
    every SPLITS-th tile of units.

    Grid: (SPLITS, Z). lists, chosen as in `sample_kernel`. Writes most [Z, SPLITS, P], -inf where
    no key is unread. Reads 2 D bytes of each unit.
    """
    split = tl.program_id(0)
    z = tl.program_id(1)
    if chosen is not None:  # noqa: SIM102  (None is known when it is compiled)
        if tl.load(chosen + z // G) == 0:
            return
    head = tl.arange(0, BLOCK_R)
    is_head = head < P
    high, low, _, _, factor = load_queries(q, z * P + head, is_head, scale, D)
    x = high.to(tl.float32) + low.to(tl.float32) * (1.0 / LOW)
    reach = tl.sqrt(tl.sum(x * x, 1)) * factor
    own_most = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    for index in range(NUM_LISTS):
        entry = lists + (z * NUM_LISTS + index) * 8
        count = tl.load(address(entry + 3, tl.int32))
        width = tl.load(entry + 4)
        has_columns = tl.load(entry + 5) != 0
        for start in range(split * TILE, count, tl.num_programs(0) * TILE):
            unit = start + tl.arange(0, TILE)
            is_unit = unit < count
            named = address(entry + 5, tl.int32) + unit
            column = tl.load(named, mask=is_unit & has_columns, other=0)
            column = tl.where(has_columns, column, unit)
            rows = rows_at(address(entry + 6, tl.float16), column, D)
            c = tl.load(rows, mask=is_unit[:, None], other=0.0)
            radii = tl.load(address(entry + 7, tl.float32) + column, mask=is_unit, other=0.0)
            sizes = tl.load(address(entry + 1, tl.int32) + unit, mask=is_unit, other=1)
            linear = product(c, high, low) * factor[None, :]
            linear += tl.log(tl.maximum(sizes, 1).to(tl.float32))[:, None]
            mass_at = address(entry, tl.float32) + head[None, :] * width + unit[:, None]
            is_own = is_head[None, :] & is_unit[:, None]
            masses = tl.load(mass_at, mask=is_own, other=-float("inf"))
            linear += reach[None, :] * radii[:, None]
            linear = tl.where(masses > -float("inf"), linear, -float("inf"))
            own_most = log_add(own_most, log_sum(linear, 0))
    at_most = most + (z * tl.num_programs(0) + split) * P + head
    tl.store(at_most, own_most, mask=is_head)

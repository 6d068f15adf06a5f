"""Batched k-means: Lloyd's iterations with L2 distance, no distance in memory.

Owns the nearest centre of every point and the iterations; `run_statistics.py` owns what is
summed over clusters, `select/centroid_build.py` the definition. Who is nearest does not change when
all points of a problem are moved and scaled: points are centred, scaled by a power of two and
rounded to half precision, which tensor cores multiply with float32 sums. Knows no segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.errors import InvalidBudget, ShapeMismatch
from sparse_attn.kernels.label_runs import Runs, check_points, find_runs, pad_dim
from sparse_attn.kernels.run_statistics import write_means

# Points reach at most 2^15 from the mean: within half precision, and squares within single.
_LOG_REACH = 14.0
ROWS = 64  # of a program that centres
_INFINITE = tl.constexpr(0x7F800000)  # bits of an infinite distance


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How `assign_kernel` is launched. rows: points of a program; centres: compared at a time.

    registers: of a thread at most; 128 let two programs of 8 warps share a multiprocessor, so that
    one multiplies while the other looks for its minimum.
    """

    rows: int
    centres: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Keywords of a launch; AMD's compiler knows no limit of registers."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None and torch.version.hip is None:
            options["maxnreg"] = self.registers
        return options


# By the widest row in elements; chosen by registers and shared memory of sm_90.
TILES = {
    128: Tile(rows=128, centres=128, warps=8, stages=2, registers=128),
    256: Tile(rows=128, centres=64, warps=8, stages=2),
}
# Products of single precision have no tensor cores: exact, and only for small problems.
TILE_SINGLE = Tile(rows=32, centres=32, warps=8, stages=1)


@triton.jit(do_not_specialize=["num_points"])
def centre_kernel(
    x,
    shifts,
    scales,
    points,
    problem_stride,
    row_stride,
    num_points,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """points = (x - shift) * scale, rounded; columns from D to BLOCK_D are zero.

    Grid: (blocks of rows, problems). Rows beyond the last are masked.
    Reads D elements a row.
    """
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    is_row = (row < num_points)[:, None]
    is_own = is_row & (dim < D)[None, :]
    x += problem * problem_stride
    own = tl.load(x + row[:, None] * row_stride + dim[None, :], mask=is_own, other=0.0)
    shift = tl.load(shifts + problem * D + dim, mask=dim < D, other=0.0)
    moved = (own.to(tl.float32) - shift[None, :]) * tl.load(scales + problem)
    moved = tl.where(is_own, moved, 0.0).to(points.dtype.element_ty)
    points += problem * num_points * BLOCK_D
    tl.store(points + row[:, None] * BLOCK_D + dim[None, :], moved, mask=is_row)


@triton.jit(do_not_specialize=["num_points"])
def assign_kernel(
    points,
    centres,
    norms,
    labels,
    num_points,
    num_centres,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """label = argmin over c of |x|^2 + |c|^2 - 2 x c, the lowest where distances tie.

    A distance's lowest log2 CENTRES bits make room for the centre's column, so that one integer
    minimum finds both: distances closer than 2^-16 of themselves tie, which is less than what
    rounding to half precision moves them by.
    Grid: (blocks of points, problems). Points beyond the last are masked; num_centres is a multiple
    of CENTRES, and norms of centres that do not exist are infinite.
    Reads 2 D bytes a point once, and (2 D + 4) num_centres bytes, mostly from the L2 cache.
    """
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    column = tl.arange(0, CENTRES)
    points += problem * num_points * D
    centres += problem * num_centres * D
    norms += problem * num_centres
    x = tl.load(
        points + row[:, None] * D + dim[None, :], mask=(row < num_points)[:, None], other=0.0
    )
    own = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    best = tl.full((ROWS,), _INFINITE, tl.int32)
    first = tl.zeros((ROWS,), tl.int32)
    for start in tl.range(0, num_centres, CENTRES, num_stages=STAGES):
        c = tl.load(centres + (start + column)[None, :] * D + dim[:, None])
        norm = tl.load(norms + start + column)
        product = tl.dot(x, c, input_precision="ieee")
        distance = own[:, None] + norm[None, :] - 2.0 * product
        packed = (distance.to(tl.int32, bitcast=True) & -CENTRES) | column[None, :]
        nearest = tl.min(packed, 1)
        is_nearer = (nearest & -CENTRES) < (best & -CENTRES)
        best = tl.where(is_nearer, nearest, best)
        first = tl.where(is_nearer, start, first)
    label = first + (best & (CENTRES - 1))
    tl.store(labels + problem * num_points + row, label, mask=row < num_points)


def kmeans(
    x: Tensor, *, num_clusters: int, iterations: int, precision: torch.dtype = torch.float16
) -> Tensor:
    """Labels [B, n] int32 of Lloyd's k-means over x [B, n, D]: bf16, fp16 or float32, D up to 256.

    Starts from evenly spaced points; a cluster that loses every point keeps its centre. The same
    bits on every run. precision: of centred points and centres, float16 or float32.
    """
    num_problems = check_points(x)[0]
    if num_clusters < 1 or iterations < 0:
        raise InvalidBudget(
            f"{num_clusters} clusters, {iterations} iterations; limit 1 and 0; ask for more"
        )
    points = centre_points(x, precision)
    tile = _tile(points)
    padded = triton.cdiv(num_clusters, tile.centres) * tile.centres
    centres = points.new_zeros(num_problems, padded, points.shape[2])
    norms = torch.full((num_problems, padded), torch.inf, device=x.device)
    write_means(points, _evenly_spaced(points, num_clusters), centres, norms)
    labels = assign(points, centres, norms)
    for _ in range(iterations):
        write_means(points, find_runs(labels, num_clusters), centres, norms)
        labels = assign(points, centres, norms)
    return labels


def centre_points(x: Tensor, precision: torch.dtype) -> Tensor:
    """x [B, n, D] less its mean, times a power of two: [B, n, D padded by zeros to a power of 2].

    Largest magnitudes lie between 2^13 and 2^15 in either precision, unless all points are equal.
    """
    if precision not in (torch.float16, torch.float32):
        raise ShapeMismatch(
            f"k-means in {precision}; limit float16, float32; bfloat16 has too few digits"
        )
    num_problems, num_points, dim = check_points(x)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=(1, 2), dtype=torch.float32)
    # No infinite scale for tiny points, no logarithm of zero.
    exponent = (_LOG_REACH - largest.clamp(min=2.0**-100).log2()).floor()
    block_dim = pad_dim(dim)
    points = x.new_empty(num_problems, num_points, block_dim, dtype=precision)
    centre_kernel[(triton.cdiv(num_points, ROWS), num_problems)](
        x,
        x.mean(dim=1, dtype=torch.float32),
        exponent.exp2(),
        points,
        x.stride(0),
        x.stride(1),
        num_points,
        D=dim,
        BLOCK_D=block_dim,
        ROWS=ROWS,
        num_warps=4,
    )
    return points


def assign(points: Tensor, centres: Tensor, norms: Tensor, *, tile: Tile | None = None) -> Tensor:
    """Nearest centre [B, n] int32 of points [B, n, D], D a power of two; lowest index on ties.

    centres: [B, C, D] of the same type; norms: [B, C] float32, squared, infinite where a centre
    does not count; C a multiple of the tile's centres. tile: None for that of the points' width.
    """
    num_problems, num_points, dim = check_points(points)
    num_centres, tile = centres.shape[1], tile or _tile(points)
    is_fitting = centres.shape == (num_problems, num_centres, dim) and norms.shape == (
        num_problems,
        num_centres,
    )
    if not is_fitting or centres.dtype != points.dtype or num_centres % tile.centres:
        raise ShapeMismatch(
            f"centres {list(centres.shape)} {centres.dtype}, norms {list(norms.shape)} for points "
            f"{list(points.shape)} {points.dtype}; limit: the same type, B and D, a multiple of "
            f"{tile.centres} centres; pad them with infinite norms"
        )
    labels = torch.empty(points.shape[:2], dtype=torch.int32, device=points.device)
    assign_kernel[(triton.cdiv(num_points, tile.rows), num_problems)](
        points,
        centres,
        norms,
        labels,
        num_points,
        num_centres,
        D=dim,
        ROWS=tile.rows,
        CENTRES=tile.centres,
        STAGES=tile.stages,
        **tile.options(),
    )
    return labels


def _tile(points: Tensor) -> Tile:
    if points.dtype == torch.float32:
        return TILE_SINGLE
    return TILES[max(128, points.shape[2])]


def _evenly_spaced(points: Tensor, num_clusters: int) -> Runs:
    """One point a cluster: where Lloyd's iterations start."""
    num_problems, num_points, _ = points.shape
    column = torch.arange(num_clusters, device=points.device)
    runs = (column * num_points // num_clusters, column, torch.ones_like(column))
    return Runs(*(x.int().expand(num_problems, -1).contiguous() for x in runs))

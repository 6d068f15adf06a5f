"""What a run of points sums up to: means, spreads, value sums, radii.

Owns the sums of every run, added in the order of its members without atomics, so that the same runs
give the same bits (`select/centroid_build.py` is the definition). Refuses to know how runs come
about (`label_runs.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.errors import ShapeMismatch
from sparse_attn.kernels.label_runs import UNROLL, Runs, check_points, pad_dim

_ELEMENTS = 2048  # of the tile of means that a program holds
_MAX_HALF = tl.constexpr(65504.0)


class RunStatistics(NamedTuple):
    """[B, U, D] float16 means, spreads about them, sums of values; [B, U] float32 radii."""

    centroids: Tensor
    variances: Tensor
    value_sums: Tensor
    radii: Tensor


@triton.jit
def load_row(x, members, place, is_own, row_stride, dim, D: tl.constexpr):
    """Rows of x [U, BLOCK_D] float32 of the points at some places of members; 0 where not own."""
    point = tl.load(members + place, mask=is_own, other=0)
    row = x + point[:, None] * row_stride + dim[None, :]
    return tl.load(row, mask=is_own[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def mean_row(x, members, start, size, row_stride, dim, D: tl.constexpr, U: tl.constexpr):
    """Means [U, BLOCK_D] float32 of runs, added up in the order of members; 0 of an empty run."""
    total = tl.zeros((U, dim.shape[0]), tl.float32)
    for step in range(0, tl.max(size, 0), UNROLL):
        for i in tl.static_range(UNROLL):
            total += load_row(x, members, start + step + i, step + i < size, row_stride, dim, D)
    return total / tl.maximum(size, 1).to(tl.float32)[:, None]


@triton.jit
def halve(x):
    """Numbers within the range of half precision."""
    return tl.minimum(tl.maximum(x, -_MAX_HALF), _MAX_HALF)


@triton.jit(do_not_specialize=["num_members", "num_runs"])
def mean_kernel(
    x,
    members,
    starts,
    sizes,
    means,
    norms,
    problem_stride,
    row_stride,
    num_members,
    num_runs,
    means_stride,
    norms_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    U: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """mean_u = 1 / size_u * sum of x over run u, and its squared norm as it is stored.

    Grid: (blocks of U runs, problems). An empty run writes nothing: its mean stays. Columns beyond
    D and runs beyond the last are masked.
    Reads D elements of every member of its runs.
    """
    problem = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0) * U + tl.arange(0, U)
    dim = tl.arange(0, BLOCK_D)
    start = tl.load(starts + problem * num_runs + run, mask=run < num_runs, other=0)
    size = tl.load(sizes + problem * num_runs + run, mask=run < num_runs, other=0)
    x += problem * problem_stride
    members += problem * num_members
    mean = mean_row(x, members, start, size, row_stride, dim, D, U)
    mean = halve(mean).to(means.dtype.element_ty)
    row = means + problem * means_stride + run[:, None] * D + dim[None, :]
    tl.store(row, mean, mask=(size > 0)[:, None] & (dim < D)[None, :])
    if HAS_NORMS:
        stored = mean.to(tl.float32)
        norm = tl.sum(stored * stored, 1)
        tl.store(norms + problem * norms_stride + run, norm, mask=size > 0)


@triton.jit(do_not_specialize=["num_members", "num_runs"])
def statistics_kernel(
    keys,
    values,
    members,
    starts,
    sizes,
    centroids,
    variances,
    value_sums,
    radii,
    keys_stride,
    keys_row,
    values_stride,
    values_row,
    num_members,
    num_runs,
    slack,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    U: tl.constexpr,
):
    """c = mean k, stored in half; variance = mean (k - c)^2; sum v; radius = slack * max |k - c|.

    Grid: (blocks of U runs, problems). Empty runs give zeros; columns beyond D and runs beyond the
    last are masked.
    Reads 3 D elements of every member of its runs, the keys twice.
    """
    problem = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0) * U + tl.arange(0, U)
    dim = tl.arange(0, BLOCK_D)
    is_run = run < num_runs
    start = tl.load(starts + problem * num_runs + run, mask=is_run, other=0)
    size = tl.load(sizes + problem * num_runs + run, mask=is_run, other=0)
    keys += problem * keys_stride
    values += problem * values_stride
    members += problem * num_members
    centroid = halve(mean_row(keys, members, start, size, keys_row, dim, D, U)).to(tl.float16)
    centre = centroid.to(tl.float32)
    squares = tl.zeros((U, BLOCK_D), tl.float32)
    value_sum = tl.zeros((U, BLOCK_D), tl.float32)
    reach = tl.zeros((U,), tl.float32)
    for step in range(0, tl.max(size, 0), UNROLL):
        for i in tl.static_range(UNROLL):
            is_own = step + i < size
            away = load_row(keys, members, start + step + i, is_own, keys_row, dim, D) - centre
            square = tl.where(is_own[:, None], away * away, 0.0)
            squares += square
            reach = tl.maximum(reach, tl.sum(square, 1))
            value_sum += load_row(values, members, start + step + i, is_own, values_row, dim, D)
    count = tl.maximum(size, 1).to(tl.float32)[:, None]
    row = (problem * num_runs + run)[:, None] * D + dim[None, :]
    is_kept = is_run[:, None] & (dim < D)[None, :]
    tl.store(centroids + row, centroid, mask=is_kept)
    tl.store(variances + row, halve(squares / count).to(tl.float16), mask=is_kept)
    tl.store(value_sums + row, halve(value_sum).to(tl.float16), mask=is_kept)
    tl.store(radii + problem * num_runs + run, tl.sqrt(reach) * slack, mask=is_run)


def run_means(x: Tensor, runs: Runs) -> Tensor:
    """Means [B, U, D] float16 of the runs of x [B, n, D], cut to its range; 0 of empty runs."""
    means = x.new_zeros(*runs.sizes.shape, x.shape[2], dtype=torch.float16)
    write_means(x, runs, means, None)
    return means


def write_means(x: Tensor, runs: Runs, means: Tensor, norms: Tensor | None) -> None:
    """Write the mean of each run of x [B, n, D] to means [B, >= U, D] and its squared norm to norms
    [B, >= U] float32; those of empty runs stay.
    """
    num_problems, _, dim = check_points(x)
    num_runs, (block_dim, block_runs) = runs.sizes.shape[1], tile_runs(dim)
    assert means.shape[1] >= num_runs
    assert norms is None or norms.shape[1] >= num_runs
    mean_kernel[(triton.cdiv(num_runs, block_runs), num_problems)](
        x,
        *runs,
        means,
        means if norms is None else norms,
        x.stride(0),
        x.stride(1),
        runs.members.shape[1],
        num_runs,
        means.stride(0),
        0 if norms is None else norms.stride(0),
        D=dim,
        BLOCK_D=block_dim,
        U=block_runs,
        HAS_NORMS=norms is not None,
        num_warps=4,
    )


def run_statistics(keys: Tensor, values: Tensor, runs: Runs, *, slack: float) -> RunStatistics:
    """Statistics of every run of keys, values [B, n, D]; radii are `slack` times the reach."""
    num_problems, num_points, dim = check_points(keys)
    if check_points(values) != (num_problems, num_points, dim):
        raise ShapeMismatch(
            f"values {list(values.shape)} for keys {list(keys.shape)}; limit: the same shape; give "
            f"one value a key"
        )
    num_runs, (block_dim, block_runs) = runs.sizes.shape[1], tile_runs(dim)
    shape = (num_problems, num_runs, dim)
    centroids, variances, value_sums = (
        keys.new_empty(shape, dtype=torch.float16) for _ in range(3)
    )
    radii = keys.new_empty(num_problems, num_runs, dtype=torch.float32)
    statistics_kernel[(triton.cdiv(num_runs, block_runs), num_problems)](
        keys,
        values,
        *runs,
        centroids,
        variances,
        value_sums,
        radii,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        num_points,
        num_runs,
        slack,
        D=dim,
        BLOCK_D=block_dim,
        U=block_runs,
        num_warps=4,
    )
    return RunStatistics(centroids, variances, value_sums, radii)


def tile_runs(dim: int) -> tuple[int, int]:
    """Columns and runs of a program's tile."""
    block_dim = pad_dim(dim)
    return block_dim, _ELEMENTS // block_dim

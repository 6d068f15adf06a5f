"""Points by label: which points lie in which cluster, as runs of a sorted list.

Owns a stable counting sort of many short lists at once, and what every kernel on points [B, n, D]
asks of its inputs. Refuses to know how labels come about. Only integers are added by atomics, and
where these leave the order open it is put right: the same labels give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.errors import ShapeMismatch

MAX_HEAD_DIM = 256
MAX_PROBLEMS = 65_535  # of the second dimension of a grid
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SLOTS = 128  # of a program that sorts
UNROLL = tl.constexpr(4)  # members of a run that are in flight at a time


class Runs(NamedTuple):
    """Points by label: members [B, n] int32, each run ascending; starts, sizes [B, U] int32."""

    members: Tensor
    starts: Tensor
    sizes: Tensor


@triton.jit(do_not_specialize=["num_points", "num_runs"])
def count_kernel(labels, sizes, places, num_points, num_runs, BLOCK: tl.constexpr):
    """sizes[l] = number of points with label l; places: a place of each point among its own.

    Grid: (blocks of points, problems). Points beyond the last are masked. Which point gets which
    place differs between runs of the program; `sort_kernel` puts that right.
    Reads 4 BLOCK bytes.
    """
    problem = tl.program_id(1).to(tl.int64)
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_point = point < num_points
    label = tl.load(labels + problem * num_points + point, mask=is_point, other=0)
    place = tl.atomic_add(sizes + problem * num_runs + label, 1, mask=is_point, sem="relaxed")
    tl.store(places + problem * num_points + point, place, mask=is_point)


@triton.jit(do_not_specialize=["num_points", "num_runs"])
def place_kernel(
    labels, starts, places, unsorted, slot_labels, num_points, num_runs, BLOCK: tl.constexpr
):
    """unsorted[starts[l] + place] = point, and slot_labels likewise = l.

    Grid: (blocks of points, problems). Points beyond the last are masked.
    Reads 12 BLOCK bytes.
    """
    problem = tl.program_id(1).to(tl.int64)
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_point = point < num_points
    base = problem * num_points
    label = tl.load(labels + base + point, mask=is_point, other=0)
    slot = tl.load(starts + problem * num_runs + label, mask=is_point, other=0)
    slot += tl.load(places + base + point, mask=is_point, other=0)
    tl.store(unsorted + base + slot, point, mask=is_point)
    tl.store(slot_labels + base + slot, label, mask=is_point)


@triton.jit(do_not_specialize=["num_points", "num_runs"])
def sort_kernel(
    unsorted, slot_labels, starts, sizes, members, num_points, num_runs, BLOCK: tl.constexpr
):
    """members[starts[l] + #{q of l: q < p}] = p for every point p of label l.

    Grid: (blocks of slots, problems). Slots beyond the last and beyond a point's own run are
    masked.
    Reads 16 bytes a slot, and 4 bytes for each slot of its run, which the L1 cache has.
    """
    problem = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_slot = slot < num_points
    base = problem * num_points
    point = tl.load(unsorted + base + slot, mask=is_slot, other=0)
    label = tl.load(slot_labels + base + slot, mask=is_slot, other=0)
    start = tl.load(starts + problem * num_runs + label, mask=is_slot, other=0)
    size = tl.load(sizes + problem * num_runs + label, mask=is_slot, other=0)
    rank = tl.zeros((BLOCK,), tl.int32)
    for step in range(0, tl.max(size, 0), UNROLL):
        for i in tl.static_range(UNROLL):
            place = unsorted + base + start + step + i
            other = tl.load(place, mask=step + i < size, other=num_points)
            rank += (other < point).to(tl.int32)
    tl.store(members + base + start + rank, point, mask=is_slot)


def find_runs(labels: Tensor, num_runs: int) -> Runs:
    """Points by label; labels [B, n] int32 below `num_runs`, n at least 1."""
    return sort_labels(labels, num_runs)[0]


def sort_labels(labels: Tensor, num_runs: int) -> tuple[Runs, Tensor]:
    """Runs, and the label of every slot [B, n] int32."""
    num_problems, num_points = check_points(labels, ndim=2, dtypes=(torch.int32,))[:2]
    labels = labels.contiguous()
    sizes = labels.new_zeros(num_problems, num_runs)
    places, unsorted, slot_labels, members = (torch.empty_like(labels) for _ in range(4))
    grid = (triton.cdiv(num_points, SLOTS), num_problems)
    block = {"BLOCK": SLOTS, "num_warps": 4}
    count_kernel[grid](labels, sizes, places, num_points, num_runs, **block)
    starts = exclusive_sum(sizes)
    place_kernel[grid](labels, starts, places, unsorted, slot_labels, num_points, num_runs, **block)
    sort_kernel[grid](unsorted, slot_labels, starts, sizes, members, num_points, num_runs, **block)
    return Runs(members, starts, sizes), slot_labels


def exclusive_sum(counts: Tensor) -> Tensor:
    """Sum of what is before, along the last dimension, in the type of counts."""
    return counts.cumsum(-1, dtype=counts.dtype) - counts


def check_points(
    x: Tensor, *, ndim: int = 3, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> tuple[int, ...]:
    """Shape of x [B, n, D] or [B, n]; raises ShapeMismatch for what no kernel here can read."""
    if x.dim() != ndim or 0 in x.shape or x.shape[0] > MAX_PROBLEMS:
        raise ShapeMismatch(
            f"points {list(x.shape)}; limit {ndim} dimensions, none empty, at most {MAX_PROBLEMS} "
            f"problems; give fewer problems at a time"
        )
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise ShapeMismatch(f"points of {x.dtype}; limit {names}; convert them")
    if ndim == 3 and (x.shape[2] > MAX_HEAD_DIM or x.stride(2) != 1):
        raise ShapeMismatch(
            f"points [B, n, D] with D {x.shape[2]} and stride {x.stride(2)}; limit D up to "
            f"{MAX_HEAD_DIM}, stride 1; make them contiguous, or build without kernels"
        )
    return tuple(x.shape)


def pad_dim(dim: int) -> int:
    """Columns of a tile: the next power of two, 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())

"""Cuts runs that are too long into even pieces along their widest dimension.

Owns the rule of `select/centroid_build._split_oversized` on a device: nothing waits for it, and
programs that see no long run end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.label_runs import SLOTS, UNROLL, check_points, exclusive_sum, sort_labels
from sparse_attn.kernels.run_statistics import load_row, mean_row, tile_runs


@triton.jit(do_not_specialize=["num_members", "num_runs", "max_size"])
def widest_kernel(
    keys,
    members,
    starts,
    sizes,
    widest,
    keys_stride,
    keys_row,
    num_members,
    num_runs,
    max_size,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    U: tl.constexpr,
):
    """widest_u = argmax over dimensions of the variance of run u, the lowest where they tie.

    Grid: (blocks of U runs, problems). Runs of at most max_size members are masked: nothing is
    written for them. Reads 2 D elements of every member of the others.
    """
    problem = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0) * U + tl.arange(0, U)
    dim = tl.arange(0, BLOCK_D)
    size = tl.load(sizes + problem * num_runs + run, mask=run < num_runs, other=0)
    is_long = size > max_size
    size = tl.where(is_long, size, 0)
    if tl.max(size, 0) > 0:
        start = tl.load(starts + problem * num_runs + run, mask=is_long, other=0)
        keys += problem * keys_stride
        members += problem * num_members
        centre = mean_row(keys, members, start, size, keys_row, dim, D, U)
        squares = tl.zeros((U, BLOCK_D), tl.float32)
        for step in range(tl.max(size, 0)):
            is_own = step < size
            away = load_row(keys, members, start + step, is_own, keys_row, dim, D) - centre
            squares += tl.where(is_own[:, None], away * away, 0.0)
        squares = tl.where((dim < D)[None, :], squares, -1.0)
        dimension = tl.argmax(squares, 1, tie_break_left=True)
        tl.store(widest + problem * num_runs + run, dimension, mask=is_long)


@triton.jit(do_not_specialize=["num_points", "num_runs", "max_size"])
def cut_kernel(
    keys,
    members,
    slot_labels,
    starts,
    sizes,
    widest,
    next_labels,
    labels,
    keys_stride,
    keys_row,
    num_points,
    num_runs,
    max_size,
    BLOCK: tl.constexpr,
):
    """rank = place of a point among its run, by coordinate, then index; piece = of even pieces.

    A run of s members has p = ceil(s / max_size) pieces, the first s mod p of them one longer; the
    first keeps the label, the others get next_labels[l] and those after it.
    Grid: (blocks of slots, problems). Slots of runs of at most max_size are masked.
    Reads 4 bytes and one coordinate of each slot of a long run, once for each of its points.
    """
    problem = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base = problem * num_points
    runs = problem * num_runs
    keys += problem * keys_stride
    is_slot = slot < num_points
    label = tl.load(slot_labels + base + slot, mask=is_slot, other=0)
    size = tl.load(sizes + runs + label, mask=is_slot, other=0)
    is_long = size > max_size
    if tl.max(size, 0) > max_size:
        start = tl.load(starts + runs + label, mask=is_long, other=0)
        dimension = tl.load(widest + runs + label, mask=is_long, other=0)
        point = tl.load(members + base + slot, mask=is_long, other=0)
        own = tl.load(keys + point * keys_row + dimension, mask=is_long, other=0.0).to(tl.float32)
        rank = tl.zeros((BLOCK,), tl.int32)
        for step in range(0, tl.max(tl.where(is_long, size, 0), 0), UNROLL):
            for i in tl.static_range(UNROLL):
                is_other = is_long & (step + i < size)
                other = tl.load(members + base + start + step + i, mask=is_other, other=0)
                its = tl.load(keys + other * keys_row + dimension, mask=is_other, other=0.0)
                its = its.to(tl.float32)
                is_before = (its < own) | ((its == own) & (other < point))
                rank += (is_other & is_before).to(tl.int32)
        num_pieces = tl.maximum((size + max_size - 1) // max_size, 1)
        short = tl.maximum(size // num_pieces, 1)
        in_longer = (size % num_pieces) * (short + 1)
        piece = tl.where(
            rank < in_longer,
            rank // (short + 1),
            size % num_pieces + (rank - in_longer) // short,
        )
        following = tl.load(next_labels + runs + label, mask=is_long, other=0) + piece - 1
        tl.store(labels + base + point, following, mask=is_long & (piece > 0))


def split_oversized(keys: Tensor, labels: Tensor, num_runs: int, *, max_size: int) -> None:
    """Cut runs above max_size into even pieces along their widest dimension; writes labels.

    keys: [B, n, D]; labels: [B, n] int32 below num_runs, contiguous. New labels count up from
    num_runs, run by run.
    """
    num_problems, num_points, dim = check_points(keys)
    runs, slot_labels = sort_labels(labels, num_runs)
    block_dim, block_runs = tile_runs(dim)
    widest = torch.empty_like(runs.sizes)
    strides = (keys.stride(0), keys.stride(1))
    widest_kernel[(triton.cdiv(num_runs, block_runs), num_problems)](
        keys,
        *runs,
        widest,
        *strides,
        num_points,
        num_runs,
        max_size,
        D=dim,
        BLOCK_D=block_dim,
        U=block_runs,
        num_warps=4,
    )
    extra = (runs.sizes - 1).clamp(min=0) // max_size
    cut_kernel[(triton.cdiv(num_points, SLOTS), num_problems)](
        keys,
        runs.members,
        slot_labels,
        runs.starts,
        runs.sizes,
        widest,
        exclusive_sum(extra) + num_runs,
        labels,
        *strides,
        num_points,
        num_runs,
        max_size,
        BLOCK=SLOTS,
        num_warps=4,
    )

"""What a decode step does between attentions, one launch each: residual and norm, rotary embedding
and append, gate, and products of few rows.

Owns the arithmetic of a layer as a model defines it: every intermediate number that a chain of
operators would round to the stream's type is rounded to it here too, so that a fused layer differs
from that chain by the order of sums and by how exp is approximated, and by nothing else. Refuses to
know models, caches and attention. Streams are bfloat16 or float16 (float32 under the interpreter),
norm weights float32. Nothing waits for the device and grids depend on shapes alone: after a first
call of the same shapes, which compiles, every call can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.errors import ShapeMismatch
from sparse_attn.kernels.early import early_launch, take_turn
from sparse_attn.kernels.layer_checks import check_first, check_like
from sparse_attn.kernels.prefill_launch import padded
from sparse_attn.kernels.rotary import rotate_append, rotate_append_each

# What a decoder takes as its `Fused`.
__all__ = ["add_rms_norm", "gate", "rotate_append", "rotate_append_each", "small_linear"]

MAX_MODEL_DIM = 8192
MAX_ROWS = 64
GATE_COLUMNS = 512  # of a program
_GELU_SLOPE = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
_GELU_CUBE = tl.constexpr(0.044715)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How `small_linear_kernel` is launched: columns of a program and the part of K a step."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Keywords of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# By columns of a program: a wide matrix takes wide tiles, a narrow one as many programs as it can.
# 16 and 32 columns are products of one warp each (m16n8k16), 64 of a warpgroup (sm_90).
NVIDIA = {
    16: Tile(block_n=16, block_k=256, num_warps=1, num_stages=4),
    32: Tile(block_n=32, block_k=256, num_warps=2, num_stages=4),
    64: Tile(block_n=64, block_k=128, num_warps=4, num_stages=5),
}
# 64 KiB on chip (gfx942).
AMD = {
    16: Tile(block_n=16, block_k=256, num_warps=1, num_stages=2),
    32: Tile(block_n=32, block_k=128, num_warps=2, num_stages=2),
    64: Tile(block_n=64, block_k=128, num_warps=4, num_stages=2),
}
TILES = AMD if torch.version.hip else NVIDIA
_ENOUGH_PROGRAMS = 256  # about two for each multiprocessor of an H100, an H200 or an MI300X


@triton.jit
def normed_row(x, scale, eps, E: tl.constexpr):
    """scale * x / sqrt(mean(x^2) + eps), rounded, for a row of E numbers, zero beyond them."""
    wide = x.to(tl.float32)
    return (wide * tl.rsqrt(tl.sum(wide * wide, 0) / E + eps) * scale).to(x.dtype)


@triton.jit
def add_rms_norm_kernel(
    x, branch, weight, post_norm, stream, normed, eps, E: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """stream = x + branch, or x + rms_norm(branch, post_norm) where the model has one (Gemma);
    normed = rms_norm(stream, weight) of the rounded stream; without a branch the stream is x.

    Grid: (T), a row each. Masked: columns beyond E, which add zero to the sum of squares. Bytes: 8
    E to read (with a branch), 4 E to write, and 4 E of each norm weight.
    """
    column = tl.arange(0, BLOCK)
    is_own = column < E
    at = tl.program_id(0).to(tl.int64) * E + column
    scale = tl.load(weight + column, mask=is_own, other=0.0)
    if post_norm is not None:
        post_scale = tl.load(post_norm + column, mask=is_own, other=0.0)
    take_turn(EARLY)
    own = tl.load(x + at, mask=is_own, other=0.0)
    if branch is not None:
        added = tl.load(branch + at, mask=is_own, other=0.0)
        if post_norm is not None:
            added = normed_row(added, post_scale, eps, E)
        own = (own.to(tl.float32) + added.to(tl.float32)).to(own.dtype)
        tl.store(stream + at, own, mask=is_own)
    tl.store(normed + at, normed_row(own, scale, eps, E), mask=is_own)


@triton.jit
def gate_kernel(
    gate_up, out, F: tl.constexpr, IS_SILU: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """act(gate), rounded, times up: silu(x) = x / (1 + exp(-x)), and gelu by tanh(u) is
    x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).

    Grid: (blocks of columns, T). Masked: columns beyond F. Bytes: 4 BLOCK to read, 2 to write.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_own = column < F
    row = tl.program_id(1).to(tl.int64)
    from_ = gate_up + row * (2 * F) + column
    take_turn(EARLY)
    x = tl.load(from_, mask=is_own, other=0.0)
    up = tl.load(from_ + F, mask=is_own, other=0.0)
    wide = x.to(tl.float32)
    slope = wide if IS_SILU else _GELU_SLOPE * (wide + _GELU_CUBE * (wide * wide * wide))
    act = (wide / (1.0 + tl.exp(-slope))).to(x.dtype)
    product = act.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * F + column, product.to(x.dtype), mask=is_own)


@triton.jit(do_not_specialize=["num_rows"])
def small_linear_kernel(
    x, weight, bias, out, num_rows, num_columns,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[t, n] = round(sum over k of weight[n, k] x[t, k], in float32, + bias[n]).

    The weight is the left operand: the instruction is chosen by BLOCK_N, whatever T is, and each
    sum runs through K in order. Grid: (tiles of BLOCK_N columns), each with all rows. Masked: rows
    beyond T (of ROWS, at least 16), columns beyond N, and the end of K. Bytes: 2 BLOCK_N K of
    weights, read once; 2 T K of x, from the L2.
    """
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    inner = tl.arange(0, BLOCK_K)
    is_column = column < num_columns
    is_row = row < num_rows
    weight_at = weight + column.to(tl.int64)[:, None] * K + inner[None, :]
    x_at = x + row[None, :] * K + inner[:, None]
    take_turn(EARLY)
    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for start in range(0, K, BLOCK_K):
        is_inner = inner < K - start
        w = tl.load(weight_at + start, mask=is_column[:, None] & is_inner[None, :], other=0.0)
        y = tl.load(x_at + start, mask=is_row[None, :] & is_inner[:, None], other=0.0)
        total = tl.dot(w, y, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[:, None]
    at = out + row.to(tl.int64)[None, :] * num_columns + column[:, None]
    tl.store(at, total.to(x.dtype.element_ty), mask=is_column[:, None] & is_row[None, :])


def add_rms_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    post_norm: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream x + branch and its norm, [T, E] each; x, branch [T, E], norm weights [E] f32.

    Without a branch the stream is x itself and only the norm is written. out: stream and norm; the
    stream may be x.
    """
    check_first("x", x, ndim=2)
    num_rows, dim = x.shape
    if dim > MAX_MODEL_DIM:
        raise ShapeMismatch(f"model dim: {dim}, at most {MAX_MODEL_DIM}; use --backend torch")
    check_like(x, branch=(branch, (num_rows, dim)))
    check_like(x, torch.float32, weight=(weight, (dim,)), post_norm=(post_norm, (dim,)))
    if out is None:
        out = x if branch is None else torch.empty_like(x), torch.empty_like(x)
    check_like(x, stream=(out[0], (num_rows, dim)), normed=(out[1], (num_rows, dim)))
    block = padded(dim)
    add_rms_norm_kernel[(num_rows,)](
        x, branch, weight, post_norm, out[0], out[1], eps, dim, block,
        num_warps=norm_warps(block), **early_launch(x.device),
    )  # fmt: skip
    return x if branch is None else out[0], out[1]


def gate(
    gate_up: Tensor, activation: Literal["silu", "gelu_tanh"], *, out: Tensor | None = None
) -> Tensor:
    """act(gate) * up, [T, F], of gate_up [T, 2F]: gate, then up."""
    check_first("gate_up", gate_up, ndim=2)
    num_rows, width = gate_up.shape
    if width % 2 or activation not in ("silu", "gelu_tanh"):
        raise ShapeMismatch(
            f"columns and activation: {width}, {activation!r}, an even number and silu or "
            "gelu_tanh; use --backend torch"
        )
    dim = width // 2
    result = gate_up.new_empty((num_rows, dim)) if out is None else out
    check_like(gate_up, out=(result, (num_rows, dim)))
    grid = (triton.cdiv(dim, GATE_COLUMNS), num_rows)
    gate_kernel[grid](
        gate_up, result, dim, activation == "silu", GATE_COLUMNS, num_warps=2,
        **early_launch(gate_up.device),
    )  # fmt: skip
    return result


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, K] times weight [N, K], plus bias [N]: [T, N] for at most 64 rows.

    A row's bits depend on the tile and on no other row; the tile of None depends on N alone.
    """
    check_first("x", x, ndim=2)
    num_rows, inner = x.shape
    if num_rows > MAX_ROWS:
        raise ShapeMismatch(f"rows: {num_rows}, at most {MAX_ROWS}; use torch's linear")
    num_columns = weight.shape[0]
    check_like(x, weight=(weight, (num_columns, inner)), bias=(bias, (num_columns,)))
    result = x.new_empty((num_rows, num_columns)) if out is None else out
    check_like(x, out=(result, (num_rows, num_columns)))
    tile = tile or tile_for(num_columns)
    small_linear_kernel[(triton.cdiv(num_columns, tile.block_n),)](
        x, weight, bias, result, num_rows, num_columns,
        inner, padded_rows(num_rows), tile.block_n, tile.block_k,
        **tile.options(), **early_launch(x.device),
    )  # fmt: skip
    return result


def tile_for(num_columns: int) -> Tile:
    """The widest tile that gives every multiprocessor two programs, or the narrowest."""
    wide = [n for n in TILES if num_columns >= n * _ENOUGH_PROGRAMS]
    return TILES[max(wide, default=min(TILES))]


def padded_rows(num_rows: int) -> int:
    """Rows of a product on tensor cores: 16, 32 or 64."""
    return max(16, padded(num_rows))


def norm_warps(block: int) -> int:
    """Warps of a row: 16 numbers a thread, two vectors, where there are as many."""
    return min(16, max(1, block // 512))

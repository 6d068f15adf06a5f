"""Rotary embedding and append, one launch: queries, keys and values of a step's tokens.

Owns that arithmetic, rounded where a chain of operators would round it (`layer.py`, whose rules
hold here too), and where keys and values go: one buffer for all tokens, or one each.
Never starts early: what is launched here may have been made to wait for another stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.errors import ShapeMismatch
from sparse_attn.kernels.common import address
from sparse_attn.kernels.early import ordered_launch, take_turn
from sparse_attn.kernels.layer_checks import check_buffers, check_first, check_like
from sparse_attn.kernels.prefill_launch import padded


@triton.jit
def turned(own, other, cos, sin):
    """own * cos, rounded, plus other * sin: one half of a rotated head."""
    kept = (own.to(tl.float32) * cos.to(tl.float32)).to(own.dtype)
    return (kept.to(tl.float32) + other.to(tl.float32) * sin.to(tl.float32)).to(own.dtype)


@triton.jit
def turned_head(
    heads, cos, sin, qk_norm, t, head, column, is_own, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Both halves of a token's head: normed (where there is a norm) and rotated but for a value.

    With x = (low, high), halves of a head: low * cos + high * sin and high * cos + low * sin, cos
    and sin those of each half (sin has the sign of rotate-half).
    """
    low, high = load_halves(heads + (t * (H + 2 * G) + head) * D + column, is_own, D)
    if head < H + G:
        cos_low, cos_high = load_halves(cos + t * D + column, is_own, D)
        sin_low, sin_high = load_halves(sin + t * D + column, is_own, D)
        if qk_norm is not None:
            scale_low, scale_high = load_halves(qk_norm + head * D + column, is_own, D)
            a, b = low.to(tl.float32), high.to(tl.float32)
            inverse = tl.rsqrt(tl.sum(a * a + b * b, 0) / D + eps)
            low = (a * inverse * scale_low).to(low.dtype)
            high = (b * inverse * scale_high).to(high.dtype)
        low, high = turned(low, high, cos_low, sin_low), turned(high, low, cos_high, sin_high)
    return low, high


@triton.jit(do_not_specialize=["capacity"])
def rotate_append_kernel(
    heads, cos, sin, qk_norm, k_buffer, v_buffer, at, q, capacity, stride_k, stride_v, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Norm (where there is one) and rotate the H queries and G keys of a token; append k and v.

    Grid: (T, H + 2G), a head each. Masked: columns beyond D / 2, and the store of rows that the
    buffers do not have. Bytes: 4 D of the head, 4 D of cos and sin, 4 D of its norm.
    """
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    is_own = column < D // 2
    take_turn(EARLY)
    row = tl.load(at) + t
    is_kept = is_own & (row >= 0) & (row < capacity)
    low, high = turned_head(heads, cos, sin, qk_norm, t, head, column, is_own, eps, H, G, D)
    if head < H:
        store_halves(q + (t * H + head) * D + column, low, high, is_own, D)
    elif head < H + G:
        to = k_buffer + (head - H).to(tl.int64) * stride_k + row * D + column
        store_halves(to, low, high, is_kept, D)
    else:
        to = v_buffer + (head - H - G).to(tl.int64) * stride_v + row * D + column
        store_halves(to, low, high, is_kept, D)


@triton.jit
def rotate_append_each_kernel(
    heads, cos, sin, qk_norm, rooms, q, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """As `rotate_append_kernel`, with buffers of its own for each token: a row of `rooms` names
    them, int64 [T, 4]: addresses of k and of v [G, capacity, D], of the row that is next, capacity.
    """
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    is_own = column < D // 2
    take_turn(EARLY)
    low, high = turned_head(heads, cos, sin, qk_norm, t, head, column, is_own, eps, H, G, D)
    if head < H:
        store_halves(q + (t * H + head) * D + column, low, high, is_own, D)
    else:
        room = rooms + t * 4
        capacity = tl.load(room + 3)
        row = tl.load(address(room + 2, tl.int64))
        is_kept = is_own & (row >= 0) & (row < capacity)
        is_value = head >= H + G
        own = (head - H - tl.where(is_value, G, 0)).to(tl.int64)
        to = address(room + is_value.to(tl.int32), q.dtype.element_ty)
        store_halves(to + (own * capacity + row) * D + column, low, high, is_kept, D)


@triton.jit
def load_halves(at, mask, D: tl.constexpr):
    """Both halves of a row of D numbers, from the pointers to the first."""
    return tl.load(at, mask=mask, other=0.0), tl.load(at + D // 2, mask=mask, other=0.0)


@triton.jit
def store_halves(at, low, high, mask, D: tl.constexpr):
    """Both halves of a row of D numbers, to the pointers to the first."""
    tl.store(at, low, mask=mask)
    tl.store(at + D // 2, high, mask=mask)


def rotate_append(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    qk_norm: Tensor | None,
    k_buffer: Tensor,
    v_buffer: Tensor,
    at: Tensor,
    *,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """Queries [T, H, D], normed and rotated; keys, likewise, and values go to the buffers.

    heads: [T, H + 2G, D], the product of queries, keys and values; cos, sin: [T, 1, D]; qk_norm: [H
    + G, D] f32; buffers: [G, capacity, D], rows contiguous; at: [1] int64, the row of the first of
    the T tokens. Rows that the buffers do not have are not written.
    """
    check_first("heads", heads, ndim=3)
    check_buffers(heads, k_buffer, v_buffer)
    num_kv_heads, capacity = k_buffer.shape[:2]
    q = _checked_queries(heads, cos, sin, qk_norm, num_kv_heads, out)
    check_like(heads, torch.int64, at=(at, (1,)))
    num_tokens, num_heads, dim = q.shape
    rotate_append_kernel[(num_tokens, heads.shape[1])](
        heads, cos, sin, qk_norm, k_buffer, v_buffer, at, q,
        capacity, k_buffer.stride(0), v_buffer.stride(0), eps,
        num_heads, num_kv_heads, dim, padded(dim // 2), num_warps=1, **ordered_launch(q.device),
    )  # fmt: skip
    return q


def rotate_append_each(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    qk_norm: Tensor | None,
    rooms: Tensor,
    *,
    num_kv_heads: int,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """`rotate_append` of tokens that each have buffers of their own (`rooms_of`)."""
    check_first("heads", heads, ndim=3)
    q = _checked_queries(heads, cos, sin, qk_norm, num_kv_heads, out)
    num_tokens, num_heads, dim = q.shape
    check_like(heads, torch.int64, rooms=(rooms, (num_tokens, 4)))
    rotate_append_each_kernel[(num_tokens, heads.shape[1])](
        heads, cos, sin, qk_norm, rooms, q, eps,
        num_heads, num_kv_heads, dim, padded(dim // 2), num_warps=1, **ordered_launch(q.device),
    )  # fmt: skip
    return q


def rooms_of(like: Tensor, rooms: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The table of `rotate_append_each`: k, v [G, capacity, D], contiguous, and `at` of each token.

    Holds addresses: whoever keeps it keeps the buffers. like: a tensor of their type and place.
    """
    rows = []
    for k, v, at in rooms:
        check_like(like, k=(k, tuple(k.shape)), v=(v, tuple(k.shape)))
        check_like(like, torch.int64, at=(at, (1,)))
        rows.append([k.data_ptr(), v.data_ptr(), at.data_ptr(), k.shape[1]])
    return torch.tensor(rows, device=like.device).view(-1, 4)


def _checked_queries(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    qk_norm: Tensor | None,
    num_kv_heads: int,
    out: Tensor | None,
) -> Tensor:
    """Where rotated queries [T, H, D] go, after a look at what they are made of."""
    num_tokens, num_all, dim = heads.shape
    num_heads = num_all - 2 * num_kv_heads
    if num_heads < 1 or dim % 2:
        raise ShapeMismatch(
            f"query heads and head dim: {num_heads}, {dim}, at least 1 and even; "
            "pass the product of queries, keys and values"
        )
    turn = (num_tokens, 1, dim)
    check_like(heads, cos=(cos, turn), sin=(sin, turn))
    check_like(heads, torch.float32, qk_norm=(qk_norm, (num_heads + num_kv_heads, dim)))
    q = heads.new_empty((num_tokens, num_heads, dim)) if out is None else out
    check_like(heads, out=(q, (num_tokens, num_heads, dim)))
    return q

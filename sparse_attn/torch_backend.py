"""Vectorised torch: the production backend on CPUs, and on GPUs where no kernel exists yet.

Same functions and signatures as `reference.py`. Query heads of one KV head are folded into the rows
of one product, so a key is read once for its whole group. Scores of dense attention never exist as
a whole matrix where torch has a fused operator that also returns the log-sum-exp (CPU: every float
type; CUDA: half types); elsewhere they are computed for `_ROWS_AT_ONCE` rows at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn.state import LOWEST, Part

_ROWS_AT_ONCE = 4096
# Runs of keys up to this long are widened to float32 on the CPU (see `widened`).
_MAX_WIDENED_SLOTS = 2048
_FUSED_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_CUDA = torch.ops.aten._scaled_dot_product_flash_attention
# The fused operators tile over rows; below this many the two plain products are as fast (measured:
# `longspan bench attention`), and they give the float32 output that a part wants.
_MIN_FUSED_ROWS = 8


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Part:
    """Softmax attention of every query over every key.

    q: [T, H, D]; k, v: [G, S, D]; mask: [T, S] bool, True where the key may be seen.
    Rows that see no key give the empty part.
    """
    num_tokens, num_heads, _ = q.shape
    num_kv_heads, num_slots, _ = k.shape
    rows = fold_rows(q, num_kv_heads)
    if mask is None and num_slots and rows.shape[1] >= _MIN_FUSED_ROWS and _has_fused(q):
        return _unfold(*_fused(rows, k, v, scale, is_causal=False), num_tokens)
    if num_slots <= _MAX_WIDENED_SLOTS:
        rows, k, v = (widened(x) for x in (rows, k, v))
    if mask is not None:
        per_group = num_heads // num_kv_heads
        mask = (
            mask.unsqueeze(0).expand(per_group, -1, -1).reshape(per_group * num_tokens, num_slots)
        )
    pieces = []
    for start in range(0, rows.shape[1], _ROWS_AT_ONCE):
        piece = slice(start, start + _ROWS_AT_ONCE)
        scores = scaled_product(rows[:, piece], k, scale)
        if mask is not None:
            scores.masked_fill_(~mask[piece], LOWEST)
        pieces.append(softmax_product(scores, v, may_hide=mask is not None))
    out, lse = (torch.cat(column, dim=1) for column in zip(*pieces, strict=True))
    return _unfold(out, lse, num_tokens)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part:
    """Attention of a chunk over itself: token t sees keys 0 to t.

    q: [T, H, D]; k, v: [G, T, D].
    """
    num_tokens, num_heads, _ = q.shape
    if num_tokens >= _MIN_FUSED_ROWS and _has_fused(q):
        per_group = num_heads // k.shape[0]
        k, v = (x.repeat_interleave(per_group, dim=0) for x in (k, v))
        out, lse = _fused(q.transpose(0, 1), k, v, scale, is_causal=True)
        return Part(out.transpose(0, 1).float(), lse.transpose(0, 1).float())
    order = torch.arange(num_tokens, device=q.device)
    return attend(q, k, v, scale=scale, mask=order.unsqueeze(0) <= order.unsqueeze(1))


def attend_scored(
    q: Tensor, k: Tensor, v: Tensor, *, visible: Tensor | None, scale: float
) -> tuple[Part, Tensor]:
    """Attention of the heads of one group over their keys, and the scores.

    q: [T, P, D]; k, v: [S, D]; visible: [T, S] bool, which keys each query attends to, None for
    all. Returns the part and the scores [T, P, S] float32. For few queries: the scores are a whole
    matrix.
    """
    if k.shape[0] <= _MAX_WIDENED_SLOTS:
        q, k, v = (widened(x) for x in (q, k, v))
    scores = _scores(q, k, scale)
    hidden = scores
    if visible is not None:
        hidden = scores.masked_fill(~visible.unsqueeze(1), LOWEST)
    rows = hidden.view(1, -1, k.shape[0])
    out, lse = softmax_product(rows, v.unsqueeze(0), may_hide=visible is not None)
    return Part(out.float().view(q.shape), lse.view(q.shape[:2])), scores


def score_keys(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """Scores [T, P, S] float32 of q [T, P, D] over the keys k [S, D] of its group."""
    return _scores(q, k, scale)


def score_units(
    q: Tensor,
    centroids: Tensor,
    variances: Tensor,
    log_sizes: Tensor,
    critical: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Estimated log mass of each unit for each query of a group, and without its spread: [T, P, U].

    q: [T, P, D]; centroids, variances: [U, D]; log_sizes, critical: [U] float32.
    """
    rows = q.float().mul(scale).reshape(-1, q.shape[2])
    linear = torch.addmm(log_sizes, rows, centroids.float().t())
    sigma = torch.mm(rows.square(), variances.float().t()).sqrt_()
    knee = torch.minimum(sigma, critical)
    log_mass = linear + knee * sigma.sub_(knee, alpha=0.5)
    shape = (*q.shape[:2], centroids.shape[0])
    return log_mass.view(shape), linear.view(shape)


def attend_estimated(log_mass: Tensor, value_sums: Tensor, sizes: Tensor) -> Part:
    """The part of keys of one KV head that were not read, each unit standing for its keys.

    log_mass: [T, P, U] float32, -inf where the unit does not count; value_sums: [U, D];
    sizes: [U] keys of each unit, 0 at padding.
    """
    shape = log_mass.shape
    weights, lse = _softmax(log_mass.clamp(min=LOWEST).reshape(-1, shape[2]))
    weights /= sizes.clamp(min=1)
    out = torch.mm(weights, value_sums.float())
    out.masked_fill_((lse == -math.inf).unsqueeze(-1), 0.0)
    return Part(out.view(*shape[:2], -1), lse.view(shape[:2]))


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [n, D] of x [N, D]."""
    if x.element_size() == 2 and x.shape[1] % 2 == 0:
        # Two halves move as one word: half as many elements, and the fast path of index_select.
        return x.view(torch.int32).index_select(0, rows).view(x.dtype)
    if x.element_size() == 1:  # torch moves bytes, not numbers of 8 bits
        return x.view(torch.uint8).index_select(0, rows).view(x.dtype)
    return x.index_select(0, rows)


def unfold_rows(rows: Tensor, num_tokens: int) -> Tensor:
    """[G, (H/G)*T, X] -> [T, H, X]."""
    num_kv_heads, num_rows, width = rows.shape
    if num_tokens == 1:  # a decode step: one view instead of three
        return rows.view(1, num_kv_heads * num_rows, width)
    return (
        rows.view(num_kv_heads, num_rows // num_tokens, num_tokens, width)
        .permute(2, 0, 1, 3)
        .reshape(num_tokens, num_kv_heads * (num_rows // num_tokens), width)
    )


def fold_rows(q: Tensor, num_kv_heads: int) -> Tensor:
    """[T, H, X] -> [G, (H/G)*T, X]: every query row that reads one KV head, together."""
    num_tokens, num_heads, width = q.shape
    per_group = num_heads // num_kv_heads
    if num_tokens == 1:
        return q.reshape(num_kv_heads, per_group, width)
    return (
        q.view(num_tokens, num_kv_heads, per_group, width)
        .permute(1, 2, 0, 3)
        .reshape(num_kv_heads, -1, width)
    )


def _unfold(out: Tensor, lse: Tensor, num_tokens: int) -> Part:
    if num_tokens == 1:
        return Part(unfold_rows(out.float(), 1), lse.float().view(1, -1))
    lse = unfold_rows(lse.float().unsqueeze(-1), num_tokens).squeeze(-1)
    return Part(unfold_rows(out.float(), num_tokens), lse)


def log_sum_exp(scores: Tensor) -> Tensor:
    """Natural log of the sum of exp over the last dimension, -inf where every score is.

    `torch.logsumexp` is a dozen operators on the CPU, which is most of a decode step's overhead.
    """
    return _softmax(scores.clamp(min=LOWEST))[1]


def _softmax(scores: Tensor, *, may_hide: bool = True) -> tuple[Tensor, Tensor]:
    """Softmax of each row and its log-sum-exp; a row of nothing but LOWEST gives -inf.

    The weights of such a row mean nothing. Scores must be finite: LOWEST hides a key, and where
    no key is hidden that case is not looked for. The greatest weight is exp(0) / total, so its
    logarithm gives the total without another pass.
    """
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -math.inf)
    weights = torch.softmax(scores, dim=-1)
    lse = scores.amax(dim=-1) - weights.amax(dim=-1).log()
    if may_hide:
        lse.masked_fill_(lse < 0.5 * LOWEST, -math.inf)
    return weights, lse


def softmax_product(scores: Tensor, values: Tensor, *, may_hide: bool) -> tuple[Tensor, Tensor]:
    """Weighted mean of the values and log-sum-exp; 0 for a row without a score."""
    weights, lse = _softmax(scores, may_hide=may_hide)
    out = torch.bmm(weights.to(values.dtype), values)
    if may_hide:
        out.masked_fill_((lse == -math.inf).unsqueeze(-1), 0.0)
    return out, lse


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q @ k^T of q [T, P, D], k [S, D]: [T, P, S] float32."""
    rows = q.to(k.dtype).reshape(1, -1, q.shape[2])
    return scaled_product(rows, k.unsqueeze(0), scale).view(*q.shape[:2], k.shape[0])


def scaled_product(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """scale * rows @ keys^T, [G, R, S] float32."""
    nothing = rows.new_empty(1)
    return torch.baddbmm(nothing, rows, keys.transpose(1, 2), beta=0, alpha=scale).float()


def widened(x: Tensor) -> Tensor:
    """float32 for a small half-precision operand on the CPU, else x itself.

    Half-precision products compile a kernel for every new shape there, and the shapes of selections
    and of growing answers are always new.
    """
    return x.float() if x.device.type == "cpu" else x


def _has_fused(q: Tensor) -> bool:
    return q.device.type == "cpu" or (
        q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
    )


def _fused(
    rows: Tensor, k: Tensor, v: Tensor, scale: float, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    operator = _FUSED_CPU if rows.device.type == "cpu" else _FUSED_CUDA
    result = operator(
        rows.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), 0.0, is_causal, scale=scale
    )
    return result[0][0], result[1][0]

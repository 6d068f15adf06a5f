"""The sample of what a step left unread, of one query a document: launches of `sample.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.errors import ShapeMismatch
from sparse_attn.estimate import MAX_LOG_RATIO, UNIFORM_SHARE, Missed
from sparse_attn.kernels.sample import bound_kernel, sample_kernel

# Units of a tile of the bound, and programs that share it; units drawn from, and summed, at once.
_BOUND_TILE, _SPLITS = 64, 16
_DRAWN, _WIDE = 128, 1024


def sample_unread(
    q: Tensor,
    documents: Tensor,
    lists: Tensor,
    lse_read: Tensor,
    *,
    kind: Any,
    scale: float,
    seeds: Tensor,
    visible: Tensor,
    layer: int,
    num_strata: int,
    chosen: Tensor | None = None,
    out: Missed | None = None,
) -> Missed:
    """What queries [B, H, D] missed; lists: int64 [Z, n, 8] (`sample.LIST_COLUMNS`); lse_read [B,
    H].

    documents: int64 [B, 3], each one's keys, of triton type `kind`, values and scales; seeds,
    visible: int64 [B], and the layer, whose random numbers are drawn; num_strata: a power of two;
    chosen: int32 [B], whose queries are sampled, None for all; out: where the result goes, for the
    others unchanged. Launches alone: it can be captured. `estimate.sample_missed` is the
    definition.
    """
    num_documents, num_heads, head_dim = q.shape
    num_kv_heads = lists.shape[0] // num_documents
    draws, per_group = 2 * num_strata, num_heads // num_kv_heads
    if tuple(seeds.shape) != (num_documents,) or draws & (draws - 1):
        raise ShapeMismatch(
            f"seeds {tuple(seeds.shape)} and {num_strata} strata; limit ({num_documents},) and a "
            "power of two; pass a seed for each query"
        )
    missed = out or Missed(*torch.empty(3, num_documents, num_heads, device=q.device))
    most = torch.empty(lists.shape[0], _SPLITS, per_group, device=q.device)
    bound_kernel[_SPLITS, lists.shape[0]](
        q, lists, chosen, most, scale, G=num_kv_heads, P=per_group, D=head_dim,
        BLOCK_R=max(16, triton.next_power_of_2(per_group)), NUM_LISTS=lists.shape[1],
        TILE=_BOUND_TILE,
    )  # fmt: skip
    sample_kernel[per_group, lists.shape[0]](
        q, documents, lists, seeds, visible, layer, chosen, lse_read, most, *missed, scale,
        G=num_kv_heads, P=per_group, D=head_dim, STORED=kind, NUM_LISTS=lists.shape[1], DRAWS=draws,
        TILE=_DRAWN, WIDE=_WIDE, SPLITS=_SPLITS, UNIFORM=UNIFORM_SHARE, MAX_RATIO=MAX_LOG_RATIO,
        IS_SCALED=kind == tl.float8e4nv, num_warps=8,
    )  # fmt: skip
    return missed

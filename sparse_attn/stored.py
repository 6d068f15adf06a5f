"""Keys and values as a document stores them: numbers, or e4m3 with a scale for each KV head.

Owns what a stored row means. A scale is a power of two, so widening is exact in bfloat16 and
float32. Refuses to know who chose the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.errors import AttentionError

FP8 = torch.float8_e4m3fn


def check_scales(k: Tensor, scales: Tensor | None) -> None:
    """Raises AttentionError for e4m3 rows without scales [G, 2] float32, or scales of others."""
    is_fp8 = k.dtype == FP8
    if is_fp8 != (scales is not None):
        raise AttentionError(
            f"keys {k.dtype}, scales {'none' if scales is None else tuple(scales.shape)}; limit "
            f"scales [G, 2] with {FP8} and none with others; pass what the document has"
        )
    if scales is not None and (
        scales.ndim != 2
        or scales.shape[1] != 2
        or (scales.dtype, scales.device) != (torch.float32, k.device)
        or not scales.is_contiguous()
    ):
        raise AttentionError(
            f"scales {tuple(scales.shape)} {scales.dtype} on {scales.device}; limit [G, 2] "
            f"torch.float32, contiguous, on {k.device}; pass what the document has"
        )


def widen(x: Tensor, scales: Tensor | None, g: int, which: int, dtype: torch.dtype) -> Tensor:
    """Rows x of KV head g as numbers: x itself, or in `dtype` where it is in e4m3; which: 0 of
    keys, 1 of values.
    """
    return x if scales is None else x.to(dtype) * scales[g, which].to(dtype)

"""What decode plans accept: shapes, types and places, and the sentence for the rest.

Looks at no element of any tensor: nothing waits for the device, and captures are not broken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn.errors import AttentionError, ShapeMismatch
from sparse_attn.stored import FP8, check_scales

HEAD_DIMS = (16, 32, 64, 128, 256)
MAX_GROUP = 16
KV_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_SLOTS = 2**31 - 1  # slots are int32 in kernels


def check_heads(head_dim: int, per_group: int) -> None:
    """Raises ShapeMismatch for what no kernel was made for."""
    if head_dim not in HEAD_DIMS:
        raise ShapeMismatch(
            f"head dim {head_dim}; limit one of {HEAD_DIMS} for backend triton; "
            "choose --backend torch"
        )
    if not 1 <= per_group <= MAX_GROUP:
        raise ShapeMismatch(
            f"{per_group} query heads a KV head; limit 1 to {MAX_GROUP} for backend triton; "
            "choose --backend torch"
        )


def check_body(
    name: str,
    x: Tensor,
    like: Tensor,
    shape: tuple[int, int],
    scales: Tensor | None,
    num_heads: int,
) -> None:
    """`check_keys` of a document's body, which may be in e4m3 with scales [num_heads, 2]."""
    check_keys(name, x, like, shape, dtype=FP8 if x.dtype == FP8 else like.dtype)
    check_scales(x, scales)
    if scales is not None and len(scales) != num_heads:
        raise ShapeMismatch(
            f"scales of {len(scales)} KV heads; limit {num_heads}, one pair for each; pass those "
            "of the document"
        )


def check_keys(
    name: str,
    x: Tensor,
    like: Tensor,
    shape: Sequence[int | None],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """A tensor of keys or values: contiguous, of a shape (None: any length) and like another, but
    for its type where one is given.
    """
    wanted_dtype = dtype or like.dtype
    fits = x.ndim == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(x.shape, shape, strict=True)
    )
    if not fits or not x.is_contiguous():
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeMismatch(
            f"{name}: {tuple(x.shape)}, strides {x.stride()}; limit [{wanted}], contiguous; "
            "pass the tensors of one document"
        )
    if x.dtype not in (*KV_DTYPES, dtype) or (x.dtype, x.device) != (wanted_dtype, like.device):
        raise AttentionError(
            f"{name}: {x.dtype} on {x.device}; limit one of {KV_DTYPES}, or {FP8} of a document's "
            f"body, as all others of the plan ({wanted_dtype} on {like.device}); convert it"
        )
    if x.ndim == 2 and x.shape[0] > MAX_SLOTS:
        raise ShapeMismatch(f"{name}: {x.shape[0]} slots; limit {MAX_SLOTS}; split the document")


def check_layer(layer: int, num_layers: int, q: Tensor, like: Tensor, shape: Sequence[int]) -> None:
    """The arguments of a plan's `run`: a layer that there is, and q [B, T, H, D] as planned."""
    if not 0 <= layer < num_layers:
        raise AttentionError(f"layer {layer}; limit 0 to {num_layers - 1}; name one of the plan's")
    if tuple(q.shape) != tuple(shape) or not q.is_contiguous():
        raise ShapeMismatch(
            f"q: {tuple(q.shape)}, strides {q.stride()}; limit {tuple(shape)}, contiguous; "
            "make a plan for that many queries"
        )
    if (q.dtype, q.device) != (like.dtype, like.device):
        raise AttentionError(
            f"q: {q.dtype} on {q.device}; limit {like.dtype} on {like.device}, as the keys; "
            "convert it"
        )

"""What the kernels of a layer accept: shapes, types and places, and the sentence for the rest.

Looks at no element of any tensor: nothing waits for the device, and captures are not broken.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparse_attn.errors import AttentionError, ShapeMismatch


def check_first(name: str, x: Tensor, *, ndim: int) -> None:
    """The tensor that the others must fit: contiguous, of a type that kernels exist for."""
    is_interpreted = x.device.type == "cpu"
    if is_interpreted and not triton.knobs.runtime.interpret:
        raise AttentionError(
            "device: cpu, kernels need a GPU or the interpreter; use --backend torch"
        )
    dtypes = [torch.bfloat16, torch.float16, *([torch.float32] if is_interpreted else [])]
    if x.dtype not in dtypes:
        raise AttentionError(f"{name}: {x.dtype}, one of {dtypes}; convert it")
    if x.ndim != ndim or not x.is_contiguous():
        raise ShapeMismatch(
            f"{name}: {tuple(x.shape)}, strides {x.stride()}, expected {ndim} dimensions, "
            "contiguous; reshape it"
        )


def check_like(
    first: Tensor,
    dtype: torch.dtype | None = None,
    **expected: tuple[Tensor | None, tuple[int, ...]],
) -> None:
    """Tensors that are there have their shape, `dtype` or else the first's, and its device."""
    wanted, device = first.dtype if dtype is None else dtype, first.device
    for name, (x, shape) in expected.items():
        if x is None:
            continue
        if tuple(x.shape) != shape or not x.is_contiguous():
            raise ShapeMismatch(
                f"{name}: {tuple(x.shape)}, strides {x.stride()}, expected {shape}, contiguous; "
                "pass the tensors of one layer"
            )
        if (x.dtype, x.device) != (wanted, device):
            raise AttentionError(
                f"{name}: {x.dtype} on {x.device}, expected {wanted} on {device}; convert it"
            )


def check_buffers(heads: Tensor, k_buffer: Tensor, v_buffer: Tensor) -> None:
    """Buffers [G, capacity, D] of the heads' type and device, rows of a KV head contiguous."""
    dim = heads.shape[2]
    for x in (k_buffer, v_buffer):
        fits = x.ndim == 3 and x.shape == k_buffer.shape and x.stride()[1:] == (dim, 1)
        if not fits or x.shape[2] != dim:
            raise ShapeMismatch(
                f"key and value buffers: {tuple(x.shape)}, strides {x.stride()}, expected twice "
                f"[G, capacity, {dim}], contiguous rows; allocate both alike"
            )
        if (x.dtype, x.device) != (heads.dtype, heads.device):
            raise AttentionError(
                f"key and value buffers: {x.dtype} on {x.device}, those of the heads are "
                f"{heads.dtype} on {heads.device}; allocate both alike"
            )

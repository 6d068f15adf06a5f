"""Large host buffers.

Owns how they are allocated: on pages of 2 MiB, since filling hundreds of MB of new memory by pages
of 4 KiB takes longer than reading it from the page cache. Refuses to know what is stored in them.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
# Below this, rounding up to huge pages costs more memory than it saves time.
_MIN_MAPPED_BYTES = 4 * _HUGE_PAGE_BYTES


def zeros_host(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor of zeros, on huge pages if it is large."""
    if math.prod(shape) * dtype.itemsize < _MIN_MAPPED_BYTES:
        return torch.zeros(tuple(shape), dtype=dtype)
    return empty_host(shape, dtype)  # the kernel maps zeroed pages


def empty_host(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor; large ones ask the kernel for huge pages."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _MIN_MAPPED_BYTES:
        return torch.empty(tuple(shape), dtype=dtype)
    pages = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping alive. Untouched pages of the alignment cost no memory.
    raw = torch.frombuffer(pages, dtype=torch.uint8)
    skip = -raw.data_ptr() % _HUGE_PAGE_BYTES
    return raw[skip : skip + num_bytes].view(dtype).view(tuple(shape))

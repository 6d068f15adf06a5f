"""What one layer's attention over a document gives back, whichever backend computed it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sparse_attn.select.base import Tail


class Step(NamedTuple):
    """Attention of one tile over steady, retrieved and estimated keys.

    out: [T, H, D] float32, everything merged; lse_read: [T, H], natural log of what was read
    (steady and retrieved); tail: what stands for the rest. num_attended: [G, T], retrieved keys of
    each query; num_read: [G], keys that the tile read; lookup_bytes: what the look-up itself read.
    """

    out: Tensor
    lse_read: Tensor
    tail: Tail
    num_attended: Tensor
    num_read: Tensor
    lookup_bytes: int

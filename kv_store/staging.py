"""A segment on its way from a GPU to files: its bytes in host memory that the GPU writes to itself.

Owns the buffer, which is page-locked: copies to other memory go through the driver piece by piece,
several times slower, and hold up whoever launches kernels meanwhile. It is made once, since locking
pages takes longer than filling them. Refuses to know files, streams and threads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kv_store.clusters import trim_padding

_ALIGNMENT = 64

Heads = Mapping[int, Mapping[str, Tensor]]


class Staging:
    """Host memory for one segment at a time."""

    def __init__(self, *, is_locked: bool) -> None:
        """is_locked: where there is a GPU to copy from."""
        self._is_locked = is_locked
        self._room = torch.empty(0, dtype=torch.uint8)

    def copy(self, heads: Heads) -> dict[int, dict[str, Tensor]]:
        """The tensors of some KV heads, contiguous in host memory, without padding columns that no
        layer uses. They are there when the current stream is done, until the next call.
        """
        tensors = [x for own in heads.values() for x in own.values()]
        num_bytes = sum(_padded(x.nbytes) for x in tensors)
        if num_bytes > self._room.numel():
            self._room = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_locked)
        start, host = 0, {}
        for kv_head_idx, own in heads.items():
            host[kv_head_idx] = trim_padding(own)
            for name, x in host[kv_head_idx].items():
                place = self._room[start : start + x.nbytes].view(x.dtype).view(x.shape)
                host[kv_head_idx][name] = place.copy_(x, non_blocking=True)
                start += _padded(x.nbytes)
        return host


def _padded(num_bytes: int) -> int:
    """Where the next tensor may begin."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

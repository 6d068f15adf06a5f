"""Exact attention of a prefill chunk over everything before it, with bounded memory.

Owns the keys of the open (not yet sealed) segment and the rule that later chunks attend to the
stored form of sealed segments. Knows no store and no clusters. Full-attention layers merge three
parts: sealed segments in slot order | the open segment's earlier chunks | the chunk itself,
causally.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_store import ResidentDocument
from sparse_attn.api import Backend
from sparse_attn.state import Part, merge_parts


class PrefillAttention:
    """`attend` of an ingest. Call `advance` after each chunk, `restart` after each seal.

    open_k, open_v: [L, G, segment_tokens, D], the open segment of every layer in token order.
    """

    def __init__(
        self,
        resident: ResidentDocument,
        backend: Backend,
        *,
        scale: float,
        windows: tuple[int | None, ...],
        segment_tokens: int,
        head_dim: int,
    ) -> None:
        self._resident, self._backend = resident, backend
        self._scale, self._windows = scale, windows
        self.full_layers = [layer for layer, window in enumerate(windows) if window is None]
        self.sliding_layers = [layer for layer, window in enumerate(windows) if window is not None]
        self._place = {
            layer: i
            for kind in (self.full_layers, self.sliding_layers)
            for i, layer in enumerate(kind)
        }
        shape = (len(windows), resident.num_kv_heads, segment_tokens, head_dim)
        self.open_k = torch.empty(shape, dtype=resident.dtype, device=resident.device)
        self.open_v = torch.empty_like(self.open_k)
        self._num_open = 0

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output [T, H, D] for rotated q [T, H, D] and the chunk's own k, v [T, G, D]."""
        start, stop = self._num_open, self._num_open + q.shape[0]
        open_k, open_v = self.open_k[layer_idx], self.open_v[layer_idx]
        open_k[:, start:stop] = k.transpose(0, 1)
        open_v[:, start:stop] = v.transpose(0, 1)
        window = self._windows[layer_idx]
        if window is not None:
            return self._attend_sliding(layer_idx, q, stop, window).out.to(q.dtype)
        parts = [
            self._backend.attend_causal(
                q, open_k[:, start:stop], open_v[:, start:stop], scale=self._scale
            )
        ]
        if start:
            parts.append(
                self._backend.attend(q, open_k[:, :start], open_v[:, :start], scale=self._scale)
            )
        sealed = self._resident.num_sealed
        if sealed:
            place = self._place[layer_idx]
            sealed_k, sealed_v = (
                self._resident.k[place][:, :sealed],
                self._resident.v[place][:, :sealed],
            )
            parts.append(self._backend.attend(q, sealed_k, sealed_v, scale=self._scale))
        return merge_parts(parts).out.to(q.dtype)

    def advance(self, num_tokens: int) -> None:
        """The chunk's keys are in the open segment of every layer."""
        self._num_open += num_tokens

    def restart(self) -> None:
        """The open segment was sealed and appended to the resident document."""
        self._num_open = 0

    def _attend_sliding(self, layer_idx: int, q: Tensor, stop: int, window: int) -> Part:
        place, num_tokens = self._place[layer_idx], q.shape[0]
        before = self._resident.sliding_k[place], self._resident.sliding_v[place]
        k = torch.cat([before[0], self.open_k[layer_idx][:, :stop]], dim=1)
        v = torch.cat([before[1], self.open_v[layer_idx][:, :stop]], dim=1)
        first = max(0, k.shape[1] - num_tokens - window + 1)
        key = torch.arange(first, k.shape[1], device=q.device)
        query = torch.arange(k.shape[1] - num_tokens, k.shape[1], device=q.device).unsqueeze(1)
        mask = (key <= query) & (key > query - window)
        return self._backend.attend(q, k[:, first:], v[:, first:], scale=self._scale, mask=mask)

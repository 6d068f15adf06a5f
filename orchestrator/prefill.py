"""Prefill of a document into memory: chunks in, the tensors of each full segment out.

The other meeting place (DESIGN section 3): keys from the decoder -> slot order and clusters from
`sparse_attn` -> what `kv_store` keeps. Owns the keys of the open (not yet sealed) segment and the
rule that later chunks attend to the stored form of sealed segments. Knows no files and no
questions; `ingest.py` writes what it builds. Full-attention layers merge three parts:
sealed segments in slot order | the open segment's earlier chunks | the chunk itself, causally.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_store import Layout, ResidentDocument
from orchestrator.model.decoder import Decoder
from sparse_attn.api import Backend
from sparse_attn.select.centroid_build import CentroidParams, build
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
        self.store(layer_idx, k, v)
        open_k, open_v = self.open_k[layer_idx], self.open_v[layer_idx]
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

    def store(self, layer_idx: int, k: Tensor, v: Tensor) -> None:
        """Put the chunk's k, v [T, G, D] into the open segment of one layer."""
        chunk = slice(self._num_open, self._num_open + k.shape[0])
        self.open_k[layer_idx][:, chunk] = k.transpose(0, 1)
        self.open_v[layer_idx][:, chunk] = v.transpose(0, 1)

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


class Prefill:
    """Prefill of one document into memory, segment by segment; knows no files.

    Computes chunks, turns a full segment into the tensors that are stored, and attends to the
    stored form from then on.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: Backend,
        layout: Layout,
        *,
        clusters: CentroidParams | None,
    ) -> None:
        self.layout = layout
        self.resident = ResidentDocument.for_layout(
            layout, dtype=decoder.dtype, device=decoder.device
        )
        self._decoder, self._clusters = decoder, clusters
        self._attention = PrefillAttention(
            self.resident,
            backend,
            scale=decoder.cfg.attention_scale,
            windows=decoder.cfg.windows,
            segment_tokens=layout.segment_tokens,
            head_dim=decoder.cfg.head_dim,
        )

    def forward(self, ids: Tensor, start: int) -> Tensor:
        """Hidden states [T, E] of a chunk that begins at document token `start`.

        A chunk never crosses a segment; chunks come in order.
        """
        with torch.inference_mode():
            hidden = self._decoder.forward(ids, _positions(ids, start), self._attention)
        self._attention.advance(len(ids))
        return hidden

    def fill(self, ids: Tensor, start: int) -> None:
        """`forward` for the keys and values alone: what an ingest needs."""
        attention = self._attention
        with torch.inference_mode():
            self._decoder.fill(ids, _positions(ids, start), attention, attention.store)
        attention.advance(len(ids))

    def build(self, segment_idx: int) -> list[dict[str, Tensor]]:
        """The named tensors of each KV head's file of the open segment, which is full."""
        with torch.inference_mode():
            tensors = self._build(segment_idx)
        return [
            {name: tensor[:, head].contiguous() for name, tensor in tensors.items()}
            for head in range(self.layout.num_kv_heads)
        ]

    def append(self, heads: list[dict[str, Tensor]]) -> None:
        """Take a sealed segment's stored form; the open segment starts anew."""
        self.resident.append(heads)
        self._attention.restart()

    def _build(self, segment_idx: int) -> dict[str, Tensor]:
        attention, layout = self._attention, self.layout
        start, stop = layout.segment_span(segment_idx)
        stored = getattr(torch, layout.kv_dtype)
        k, v = (x[:, :, : stop - start].to(stored) for x in (attention.open_k, attention.open_v))
        full, sliding = attention.full_layers, attention.sliding_layers
        clustered = layout.clustered_span(segment_idx)
        tensors = order_segment(k[full], v[full], clustered, self._clusters)
        tensors["positions"] += start
        if sliding:
            kept = stop - start - layout.sliding_tokens(segment_idx)
            tensors["sliding_k"] = k[sliding][:, :, kept:]
            tensors["sliding_v"] = v[sliding][:, :, kept:]
        return tensors


def order_segment(
    k: Tensor, v: Tensor, clustered: tuple[int, int], params: CentroidParams | None
) -> dict[str, Tensor]:
    """Slot order and clusters of k, v [L, G, S, D] of one segment, all tensors [L, G, ...]."""
    num_layers, num_kv_heads, num_tokens, head_dim = k.shape
    if params is None or num_layers == 0:
        positions = torch.arange(num_tokens, device=k.device, dtype=torch.int32)
        return {"k": k, "v": v, "positions": positions.expand(num_layers, num_kv_heads, -1).clone()}
    first, last = clustered
    built = build(
        k.reshape(-1, num_tokens, head_dim),
        v.reshape(-1, num_tokens, head_dim),
        num_sinks=first,
        num_window=num_tokens - last,
        params=params,
    )
    tensors = {name: x.view(num_layers, num_kv_heads, *x.shape[1:]) for name, x in built.items()}
    order = tensors.pop("order")
    index = order.unsqueeze(-1).expand(-1, -1, -1, head_dim)
    return {"k": k.gather(2, index), "v": v.gather(2, index), "positions": order.int(), **tensors}


def _positions(ids: Tensor, start: int) -> Tensor:
    return torch.arange(start, start + len(ids), device=ids.device)

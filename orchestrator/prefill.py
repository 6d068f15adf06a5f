"""Prefill of a document into memory: chunks in, the tensors of each full segment out.

The other meeting place (DESIGN section 3): keys from the decoder -> slot order and clusters from
`sparse_attn` -> what `kv_store` keeps. Owns the order of chunks, seals and what is stored. Knows no
files and no questions, `worker.py` writes what it builds; `prefill_attention.py` attends.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from collectives.overlap import Steps, run_pair, run_steps
from kv_store import Layout, ResidentDocument
from orchestrator import packing
from orchestrator.model.decoder import Decoder
from orchestrator.place import Place, alone
from orchestrator.prefill_attention import PrefillAttention
from orchestrator.sealing import cluster_together, pick, put_in_order
from orchestrator.sparse_prefill import SparseParams
from sparse_attn.api import Backend
from sparse_attn.select.centroid_build import CentroidParams


class Prefill:
    """Prefill of one document into memory, segment by segment; knows no files.

    Computes chunks, turns a full segment into the tensors that are stored, and attends to the
    stored form from then on. Collective over the place's ranks.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: Backend,
        layout: Layout,
        *,
        clusters: CentroidParams | None,
        sparse: SparseParams | None = None,
        place: Place | None = None,
    ) -> None:
        """sparse: how sealed segments are read, None to read all of them."""
        cfg = decoder.cfg
        self.place = place or alone(num_heads=cfg.num_heads, num_kv_heads=cfg.num_kv_heads)
        self.layout = layout
        self.resident = ResidentDocument(
            self.place.holding(layout, by_fold=False), dtype=decoder.dtype, device=decoder.device
        )
        self._decoder, self._clusters = decoder, clusters
        self._attention = PrefillAttention(
            self.resident,
            backend,
            self.place,
            scale=cfg.attention_scale,
            windows=cfg.windows,
            sparse=sparse,
        )

    def forward(self, ids: Tensor, start: int) -> Tensor:
        """Hidden states [T, E] of a chunk that begins at document token `start`.

        A chunk never crosses a segment; chunks come in order.
        """
        attend, _ = self._attention.at(0)
        with torch.inference_mode():
            hidden = self._decoder.forward(ids, _positions(ids, start), attend)
        self._attention.advance(len(ids))
        return hidden

    def fill(self, ids: Tensor, start: int, *, split: int | None = None) -> None:
        """`forward` for the keys and values alone: what an ingest needs.

        split: the chunk's first tokens, which are computed beside the others: while one half waits
        for other ranks, the other computes.
        """
        with torch.inference_mode():
            if split is None:
                run_steps(self._fill_steps(ids, start, 0))
            else:
                first = self._fill_steps(ids[:split], start, 0)
                run_pair(first, self._fill_steps(ids[split:], start + split, split))
        self._attention.advance(len(ids))

    def _fill_steps(self, ids: Tensor, start: int, offset: int) -> Steps[None]:
        attend, store = self._attention.at(offset)
        return self._decoder.fill_steps(ids, _positions(ids, start), attend, store)

    def fit_scales(self, segment_idx: int) -> None:
        """Of a document in fp8: choose scales by the first segment, and see that they fit the open
        one, which is full. Raises KvOutOfRange.
        """
        if not self.layout.is_fp8:
            return
        attention = self._attention
        k, v = (pick(x, 0, attention.full_layers) for x in (attention.open_k, attention.open_v))
        packing.fit_scales(self.resident, segment_idx, k, v)

    def build(self, segment_idx: int) -> dict[int, dict[str, Tensor]]:
        """The named tensors of the open segment, which is full, by KV head: everything that its
        file holds where this rank owns it, elsewhere what sliding-window layers keep.
        """
        with torch.inference_mode():
            return self._build(segment_idx)

    def append(self, segment_idx: int, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take a sealed segment's stored form; the open segment starts anew."""
        self.resident.append(segment_idx, heads)
        self._attention.restart()

    def _build(self, segment_idx: int) -> dict[int, dict[str, Tensor]]:
        attention, layout, kv_heads = self._attention, self.layout, self.place.kv_heads
        start, stop = layout.segment_span(segment_idx)
        k, v = (x[:, :, : stop - start] for x in (attention.open_k, attention.open_v))
        if not layout.is_fp8:
            k, v = (x.to(getattr(torch, layout.kv_dtype)) for x in (k, v))
        full, sliding = attention.full_layers, attention.sliding_layers
        kept = stop - start - layout.sliding_tokens(segment_idx)
        heads: dict[int, dict[str, Tensor]] = {kv_head_idx: {} for kv_head_idx in kv_heads}
        full_k, full_v = given_k, given_v = [pick(x, 0, full) for x in (k, v)]
        if layout.is_fp8:
            scales = packing.scales_of(self.resident)
            full_k, full_v = packing.rounded(scales, given_k, given_v)
        clusters = cluster_together(
            full_k, full_v, layout.clustered_span(segment_idx), self._clusters, self.place.context
        )
        owned = [head for head in kv_heads if self.place.owns(segment_idx, head)]
        if owned:
            own = [head - kv_heads.start for head in owned]
            own_k, own_v = (pick(x, 1, own) for x in (full_k, full_v))
            tensors = put_in_order(
                own_k, own_v, {name: pick(x, 1, own) for name, x in clusters.items()}
            )
            tensors["positions"] += start
            for i, head in enumerate(owned):
                heads[head] = {name: x[:, i].contiguous() for name, x in tensors.items()}
                if layout.is_fp8:
                    steady = {"k": given_k[:, own[i]], "v": given_v[:, own[i]]}
                    heads[head] = packing.pack_head(
                        scales[:, own[i]], layout.clustered_span(segment_idx), heads[head], steady
                    )
        if sliding:
            for i, head in enumerate(kv_heads):
                heads[head]["sliding_k"] = k[sliding, i, kept:].contiguous()
                heads[head]["sliding_v"] = v[sliding, i, kept:].contiguous()
        return heads


def _positions(ids: Tensor, start: int) -> Tensor:
    return torch.arange(start, start + len(ids), device=ids.device)

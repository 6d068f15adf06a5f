"""A document that nobody wrote: seeded KV of N tokens, for timing only.

Keys of each KV head are drawn around random centres, so that clusters exist; one token in
`HEAVY_PERIOD` is a heavy hitter whose key points along the mean query direction. Values are noise.
Layers hold the same numbers, each its own copy: they are clustered once, so that a million tokens
are made in seconds.
Whatever is measured on it says nothing about answers, and every result says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_store import Layout, ResidentDocument, fp8
from orchestrator import packing
from orchestrator.ingest import NUM_SINKS
from orchestrator.model.config import ModelConfig
from orchestrator.model.context import DocumentContext
from orchestrator.place import alone
from orchestrator.planning import KV_DTYPES
from orchestrator.sealing import cluster_segment, put_in_order
from sparse_attn.select.centroid_build import CentroidParams

KEYS_PER_CENTRE = 24
HEAVY_PERIOD = 997
GREATEST = 8.0  # of keys and values, nearly always
NOTICE = "random weights and synthetic KV: timing only, answers mean nothing"


def synthetic_context(
    cfg: ModelConfig,
    *,
    num_tokens: int,
    segment_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: str | None = None,
    clusters: CentroidParams | None = None,
    seed: int = 0,
) -> DocumentContext:
    """A resident document of num_tokens tokens in cfg's shape, clustered as an ingest would;
    kv_dtype: as in `IngestOptions`.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    layout = Layout(
        num_tokens=num_tokens,
        segment_tokens=segment_tokens,
        sinks=NUM_SINKS,
        window=64,
        num_full_layers=len(cfg.full_layers),
        num_sliding_layers=len(cfg.sliding_layers),
        sliding_window=max((w for w in cfg.windows if w is not None), default=0),
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        kv_dtype=dtype_name if kv_dtype is None else KV_DTYPES[kv_dtype],
        dtype=dtype_name,
    )
    place = alone(num_heads=cfg.num_heads, num_kv_heads=cfg.num_kv_heads)
    holding = place.holding(layout, by_fold=True)
    resident = ResidentDocument(holding, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for segment_idx in range(layout.num_segments):
        heads = _segment(
            layout, segment_idx, clusters or CentroidParams(), dtype, device, generator
        )
        resident.append(segment_idx, dict(enumerate(heads)))
    resident.freeze()
    return DocumentContext(resident, place)


def _segment(
    layout: Layout,
    segment_idx: int,
    params: CentroidParams,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> list[dict[str, Tensor]]:
    """The tensors of each KV head: one layer's, seen as every layer's."""
    start, stop = layout.segment_span(segment_idx)
    shape = (1, layout.num_kv_heads, stop - start, layout.head_dim)
    keys = _clustered_keys(shape, start, device, generator).to(dtype)
    values = torch.randn(shape, generator=generator, device=device).to(dtype)
    clustered = layout.clustered_span(segment_idx)
    given = {"k": keys, "v": values}
    scales = fp8.choose_scales(torch.full((1, layout.num_kv_heads, 2), GREATEST, device=device))
    if layout.is_fp8:
        keys, values = packing.rounded(scales, keys, values)
    clusters = cluster_segment(keys, values, clustered, params)
    tensors = put_in_order(keys, values, clusters)
    tensors["positions"] += start
    if layout.num_sliding_layers:
        kept = layout.sliding_tokens(segment_idx)
        sliding = (1, layout.num_kv_heads, kept, layout.head_dim)
        for name in ("sliding_k", "sliding_v"):
            tensors[name] = torch.randn(sliding, generator=generator, device=device).to(dtype)
    heads = []
    for head in range(layout.num_kv_heads):
        own = {name: tensor[:, head].contiguous() for name, tensor in tensors.items()}
        if layout.is_fp8:
            steady = {name: x[:, head] for name, x in given.items()}
            own = packing.pack_head(scales[:, head], clustered, own, steady)
        heads.append({name: _of_all_layers(layout, name, x) for name, x in own.items()})
    return heads


def _of_all_layers(layout: Layout, name: str, x: Tensor) -> Tensor:
    """x [1, ...] as [L, ...], a view."""
    is_sliding = name.startswith("sliding_")
    num_layers = layout.num_sliding_layers if is_sliding else layout.num_full_layers
    return x.expand(num_layers, *x.shape[1:])


def _clustered_keys(
    shape: tuple[int, int, int, int], start: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    num_layers, num_kv_heads, num_tokens, head_dim = shape
    num_centres = max(1, num_tokens // KEYS_PER_CENTRE)
    centres = torch.randn(
        (num_layers, num_kv_heads, num_centres, head_dim), generator=generator, device=device
    )
    owner = torch.randint(num_centres, (num_tokens,), generator=generator, device=device)
    noise = torch.randn(shape, generator=generator, device=device)
    keys = centres[:, :, owner] + 0.5 * noise
    heavy = torch.arange(start, start + num_tokens, device=device) % HEAVY_PERIOD == 0
    keys[:, :, heavy] = 3.0
    return keys

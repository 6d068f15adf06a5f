"""A full segment's keys and values in fp8: the scales they need, and what is stored of them.

Owns which keys are stored in how many bits: the body in e4m3, the steady zone as the model gives
it. Clusters are built over what `rounded` returns, which is what the store will give back, so that
estimates and bounds hold for it. Refuses to know files and ranks; `kv_store.fp8` says what a number
becomes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kv_store import ResidentDocument, fp8
from orchestrator.errors import KvOutOfRange


def fit_scales(resident: ResidentDocument, segment_idx: int, k: Tensor, v: Tensor) -> None:
    """Choose the document's scales by its first segment, and see that they fit this one: k, v [Lf,
    G, S, D] of all KV heads, token order. Waits for the device. Raises KvOutOfRange.
    """
    layout, kv_heads = resident.layout, resident.holding.kv_heads
    body = slice(*layout.clustered_span(segment_idx))
    greatest = torch.stack([fp8.greatest_of(x[:, :, body]) for x in (k, v)], dim=-1)
    if segment_idx == 0:
        for i, head in enumerate(kv_heads):
            resident.set_scales(head, fp8.choose_scales(greatest[:, i]))
    shares = (greatest / (fp8.GREATEST * scales_of(resident))).nan_to_num(nan=torch.inf)
    if shares.numel() and float(shares.max()) > 1.0:
        layer, head, which = (int(i) for i in torch.unravel_index(shares.argmax(), shares.shape))
        raise KvOutOfRange(
            f"segment {segment_idx}, full-attention layer {layer}, KV head {kv_heads[head]}: a "
            f"{('key', 'value')[which]} of {float(greatest[layer, head, which]):.4g}; limit "
            f"{float(greatest[layer, head, which] / shares[layer, head, which]):.4g}, "
            "28 times the first segment's or more; ingest with --kv-dtype bfloat16 --restart"
        )


def scales_of(resident: ResidentDocument) -> Tensor:
    """Scales [Lf, G, 2] of a document in fp8; of a model without full-attention layers, nothing."""
    scales = [x for x in resident.scales if x is not None]
    if not scales:
        return torch.ones((0, resident.num_kv_heads, 2), device=resident.device)
    return torch.stack(scales)


def rounded(scales: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """k, v [Lf, G, S, D] as the store will give them back by scales [Lf, G, 2], in their type."""
    each = zip((k, v), scales.unbind(-1), strict=True)
    return [fp8.widen(fp8.narrow(x, own), own, x.dtype) for x, own in each]


def pack_head(
    scales: Tensor,
    clustered: tuple[int, int],
    tensors: Mapping[str, Tensor],
    steady: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What is stored of one KV head of scales [Lf, 2]: tensors with k, v [Lf, S, D] as `rounded`
    gave them, in slot order; steady: k, v as the model gave them, in token order, of which what is
    not `clustered` is kept.
    """
    first, last = clustered
    packed = {**tensors, "scales": scales}
    for i, name in enumerate(("k", "v")):
        packed[name] = fp8.narrow(tensors[name], scales[:, i])
        rows = steady[name]
        packed[f"steady_{name}"] = torch.cat([rows[:, :first], rows[:, last:]], dim=1)
    return packed

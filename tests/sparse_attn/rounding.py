"""A document of decode plans in e4m3: what the tests of fp8 share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_attn.stored import FP8
from tests.sparse_attn.decoding import Case
from tests.sparse_attn.inputs import Layer

OCTAVES = 4  # above 1 in which the greatest number of a head is stored, one more in every other


def scales_of(layer: Layer) -> Tensor:
    """Scales [G, 2] that hold a layer's keys and values, other ones in neighbouring heads."""
    greatest = torch.stack(
        [torch.stack([x[body].abs().max() for x in (layer.k, layer.v)]) for body in layer.body]
    ).float()
    exponent = torch.frexp(greatest)[1] - OCTAVES
    exponent[1::2] -= 1
    return torch.ldexp(torch.ones_like(greatest), exponent)


def round_layer(layer: Layer) -> tuple[Layer, Tensor, Tensor, Tensor]:
    """The layer as its bytes give it back, the bytes of k and v [N, D], and the scales."""
    scales = scales_of(layer)
    own = torch.ones(len(layer.k), 2)
    for g, body in enumerate(layer.body):
        own[body] = scales[g]
    rounded, stored = [], []
    for i, x in enumerate((layer.k, layer.v)):
        eighths = (x.float() / own[:, i : i + 1]).clamp(-448, 448).to(FP8)
        stored.append(eighths)
        rounded.append((eighths.float() * own[:, i : i + 1]).to(x.dtype))
    return replace(layer, k=rounded[0], v=rounded[1]), stored[0], stored[1], scales


def in_fp8(case: Case) -> Case:
    """The same document with its body in e4m3; its layer is what that stands for."""
    layer, k, v, scales = round_layer(case.layer)
    device = case.kind.device
    document = replace(
        case.document, k=[k.to(device)], v=[v.to(device)], scales=[scales.to(device)]
    )
    return replace(case, layer=layer, document=document)

"""Keys and values in one byte a number: e4m3 with one scale for each layer and KV head.

Owns the choice of a scale, and what is stored for a number. A scale is a power of two, so that a
stored number times its scale is exact in bfloat16 and float32: whoever widens it changes nothing.
e4m3 is a float: its relative error (2^-4 at most) is the same over 15 octaves, wherever a scale
puts them, so one scale serves a whole document. It is chosen by the first segment, with room for
what comes later. Refuses to know files and layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
GREATEST = 448.0  # of e4m3
# The greatest number of the first segment is stored as 8 to 16: 28 times as much still fits, and
# what is below 2^-9 of it is stored to 2^-13 of it.
_OCTAVES = 4


def choose_scales(greatest: Tensor) -> Tensor:
    """Scales [...] for numbers up to `greatest` [...] float32: powers of two, 1 for zero and for
    what is not finite.
    """
    _, exponent = torch.frexp(greatest)
    scales = torch.ldexp(torch.ones_like(greatest), exponent - _OCTAVES)
    return torch.where((greatest > 0) & greatest.isfinite(), scales, 1.0)


def greatest_of(x: Tensor) -> Tensor:
    """Greatest magnitude [...] of x [..., S, D], float32; NaN where there is one, 0 of nothing."""
    if not x.shape[-2]:
        return torch.zeros(x.shape[:-2], device=x.device)
    return x.abs().amax(dim=(-2, -1)).float()


def narrow(x: Tensor, scales: Tensor) -> Tensor:
    """x [..., S, D] as e4m3 of scales [...]; what is too large becomes the greatest number."""
    scaled = x / scales[..., None, None]  # float32, as scales are
    return scaled.clamp_(-GREATEST, GREATEST).to(DTYPE)


def widen(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 x [..., S, D] of scales [...] as numbers, exactly, of bfloat16 or float32."""
    return x.to(dtype).mul_(scales[..., None, None])

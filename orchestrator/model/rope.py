"""Rotary position embedding: frequencies of each kind, and cos/sin tables for token positions.

Owns the frequency formulas (RoPE, arXiv 2104.09864; linear, arXiv 2306.15595; YaRN, arXiv
2309.00071; llama3 as published with Llama 3.1) in the half-split layout: dimension i is paired
with dimension i + D/2. Refuses to know models; layers rotate with what it returns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orchestrator.model.config import RopeConfig


class Rotation(NamedTuple):
    """cos and sin, [T, 1, D] each, to broadcast over heads; sin carries the sign of rotate-half."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return radians per token of each dimension pair, [D/2] float32 on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.base**exponents)
    if rope.divisors is not None:
        return frequencies / torch.tensor(rope.divisors, dtype=torch.float32)
    match rope.kind:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(frequencies, rope)
        case "yarn":
            return _yarn(frequencies, rope, head_dim)


def rotation(
    frequencies: Tensor, positions: Tensor, *, factor: float, dtype: torch.dtype
) -> Rotation:
    """Return cos/sin of `positions` [T], computed in float32, times `factor`, cast to `dtype`."""
    angles = positions.to(torch.float32)[:, None] * frequencies
    cos = (angles.cos() * factor).to(dtype)
    sin = (angles.sin() * factor).to(dtype)
    return Rotation(torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Rotate `x` [T, heads, D]: swapped halves times signed sin is rotate-half times sin."""
    return torch.addcmul(x * turn.cos, x.roll(x.shape[-1] // 2, -1), turn.sin)


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Keep short wavelengths, divide long ones by the factor, blend between the two limits."""
    turns = rope.original_context_tokens * frequencies / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / rope.factor)


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Interpolate slow dimensions, extrapolate fast ones, ramp between the two rotation counts."""

    def dimension(num_rotations: float) -> float:
        span = math.log(rope.original_context_tokens / (num_rotations * 2 * math.pi))
        return head_dim * span / (2 * math.log(rope.base))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    steps = torch.arange(head_dim // 2, dtype=torch.float32)
    slow = ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return frequencies * (slow / rope.factor + 1 - slow)

"""Parts of attention and their merge: the monoid that everything else is built on.

Owns the type `Part` and the rule that joins two parts over disjoint keys; knows no keys, no
selection and no ranks. The maths is in `docs/maths.md`, section 1.

A part over a key set S is `lse = log sum_{i in S} exp(s_i)` and `out = sum_{i in S} exp(s_i - lse)
v_i`. Merging is associative and order-free up to rounding; the empty part `(0, -inf)` is its
neutral element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Stands in for -inf where a difference is taken; exp(-inf - LOWEST) is 0 and not NaN.
LOWEST = -1e30


class Part(NamedTuple):
    """Attention over one set of keys.

    out: [T, H, D] float32, the softmax-weighted mean of the values.
    lse: [T, H] float32, natural log of the softmax denominator; -inf where no key was seen.
    """

    out: Tensor
    lse: Tensor


def empty_part(
    num_tokens: int, num_heads: int, head_dim: int, device: torch.device | None = None
) -> Part:
    """The neutral element: attention over no key at all."""
    out = torch.zeros(num_tokens, num_heads, head_dim, device=device)
    return Part(out, torch.full((num_tokens, num_heads), -math.inf, device=device))


def merge_parts(parts: Sequence[Part]) -> Part:
    """Attention over the union of disjoint key sets, from the part over each.

    parts: at least one; all `out` [T, H, D] and `lse` [T, H] of one shape. Changes nothing.
    A row whose every `lse` is -inf gives out = 0 and lse = -inf.
    """
    out, lse = parts[0]
    for part in parts[1:]:
        merged = torch.logaddexp(lse, part.lse)
        # exp(-inf - -inf) would be NaN: a row that saw no key on either side keeps a weight of 0.
        weight = torch.exp(part.lse - merged.clamp(min=LOWEST))
        out, lse = torch.lerp(out, part.out, weight.unsqueeze(-1)), merged
    return Part(out, lse)

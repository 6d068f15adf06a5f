"""Parts of attention and their merge: the monoid that everything else is built on.

Owns the type `Part` and the rules that join parts over disjoint keys, one after another or in a
fixed tree; knows no keys, no selection and no ranks. The maths is in `docs/maths.md`, section 1.

A part over a key set S is `lse = log sum_{i in S} exp(s_i)` and `out = sum_{i in S} exp(s_i - lse)
v_i`. Merging is associative and order-free up to rounding; the empty part `(0, -inf)` is its
neutral element, exactly. The bits of a merged row depend on that row alone: only operators that
round every element alike are used here, which `torch.logaddexp` and `torch.lerp` do not (their
vectors and their remainders are different code).
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


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), either may be -inf; a NaN stays one."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return high + torch.log1p(torch.exp(low - high.clamp(min=LOWEST)))


def merge_parts(parts: Sequence[Part]) -> Part:
    """Attention over the union of disjoint key sets, from the part over each, one after another.

    parts: at least one; all `out` [T, H, D] and `lse` [T, H] of one shape. Changes nothing.
    A row whose every `lse` is -inf gives out = 0 and lse = -inf.
    """
    merged = parts[0]
    for part in parts[1:]:
        merged = _merge_pair(merged, part)
    return merged


def merge_tree(outs: Tensor, lses: Tensor) -> Part:
    """`merge_parts` in a fixed tree: i with i + half, then half of those, to the last.

    outs: [n, T, H, D]; lses: [n, T, H], n >= 1; as if padded to a power of two with empty parts.
    """
    part = Part(outs, lses)
    while part.lse.shape[0] > 1:
        half = _half(part.lse.shape[0])
        pairs = part.lse.shape[0] - half
        merged = _merge_pair(Part(part.out[:pairs], part.lse[:pairs]), Part(*_after(part, half)))
        if pairs < half:
            rest = (x[pairs:half] for x in part)
            merged = Part(*map(torch.cat, zip(merged, rest, strict=True)))
        part = merged
    return Part(part.out[0], part.lse[0])


def merge_tree_lse(lses: Tensor) -> Tensor:
    """The `lse` of `merge_tree`, [T, H], from lses [n, T, H] alone."""
    while lses.shape[0] > 1:
        half = _half(lses.shape[0])
        pairs = lses.shape[0] - half
        lses = torch.cat([log_add(lses[:pairs], lses[half:]), lses[pairs:half]])
    return lses[0]


def _half(n: int) -> int:
    """Half of the power of two that n is filled up to."""
    return 1 << (n - 1).bit_length() - 1


def _after(part: Part, first: int) -> tuple[Tensor, Tensor]:
    return part.out[first:], part.lse[first:]


def _merge_pair(a: Part, b: Part) -> Part:
    lse = log_add(a.lse, b.lse)
    # exp(-inf - -inf) would be NaN: a row that saw no key on either side keeps a weight of 0.
    base = lse.clamp(min=LOWEST)
    out = a.out * torch.exp(a.lse - base).unsqueeze(-1)
    out += b.out * torch.exp(b.lse - base).unsqueeze(-1)
    out = torch.where((b.lse == -math.inf).unsqueeze(-1), a.out, out)
    return Part(torch.where((a.lse == -math.inf).unsqueeze(-1), b.out, out), lse)

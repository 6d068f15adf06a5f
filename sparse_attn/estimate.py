"""How much attention the unread keys hold: a sampled estimate with its variance, and a bound.

Owns the statistics of one query's recall; knows no selector and no files. A unit's estimated mass
is only used to decide where to sample: the estimate is unbiased whatever that guess is worth
(Horvitz and Thompson 1952; stratified two draws a stratum as in Cochran 1977, section 5A).
`docs/maths.md`, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn.select.base import Tail
from sparse_attn.state import log_add
from sparse_attn.torch_backend import fold_rows, gather_rows, log_sum_exp, unfold_rows

# Share of the draws that ignores the estimated masses: no unread key is ever out of reach.
UNIFORM_SHARE = 0.2
# Largest log ratio of one sampled key to everything that was read; beyond it float32 overflows.
MAX_LOG_RATIO = 60.0


class Missed(NamedTuple):
    """What the queries of a tile missed among the keys of one caller, or of several together.

    mean: [T, H] float32, estimated mass of the unread keys as a multiple of what was read;
    variance: [T, H], of that estimate; log_most: [T, H], natural log of the greatest mass that the
    unread keys can have, -inf where there are none.
    """

    mean: Tensor
    variance: Tensor
    log_most: Tensor


def sample_missed(
    q: Tensor,
    k: Tensor,
    tail: Tail,
    lse_read: Tensor,
    *,
    scale: float,
    num_strata: int,
    generator: torch.Generator,
    scales: Tensor | None = None,
) -> Missed:
    """Estimate the mass that was not read, from 2 * num_strata unread keys a query and head.

    q: [T, H, D]; k: [N, D]; scales: [G, 2] where k is in e4m3; lse_read: [T, H], natural log of
    all that was read, by any caller.
    Draws from `generator` (a CPU generator); reads T * H * 2 * num_strata keys.
    """
    num_kv_heads = tail.sizes.shape[0]
    if tail.sizes.shape[1] == 0 or k.shape[0] == 0:
        nothing = torch.zeros_like(lse_read)
        return Missed(nothing, nothing, torch.full_like(lse_read, -math.inf))
    log_mass = fold_rows(tail.log_mass, num_kv_heads)
    probabilities, has_unread = _draw_probabilities(log_mass, tail.sizes)
    slots, weights = _draw(probabilities, tail, num_strata, generator)
    scores = _scores_at(fold_rows(q, num_kv_heads), k, slots).mul_(scale)
    if scales is not None:
        scores *= scales[:, 0, None, None]
    log_read = fold_rows(lse_read.unsqueeze(-1), num_kv_heads)
    ratio = weights * torch.exp((scores - log_read).clamp_(max=MAX_LOG_RATIO))
    ratio = ratio.masked_fill_(~has_unread.unsqueeze(-1), 0.0)
    pairs = ratio.view(*ratio.shape[:2], num_strata, 2)
    variance = (pairs[..., 0] - pairs[..., 1]).square().sum(dim=2) / (4 * num_strata**2)
    mean, variance = (
        unfold_rows(x.unsqueeze(-1), q.shape[0]).squeeze(-1)
        for x in (pairs.mean(dim=(2, 3)), variance)
    )
    return Missed(mean, variance, log_most(q, tail, scale=scale))


def log_most(q: Tensor, tail: Tail, *, scale: float) -> Tensor:
    """Natural log of the greatest mass that the unread keys can have, [T, H]: the radius bound.

    q: [T, H, D]. By Cauchy-Schwarz no key of a unit scores above s (q.c + |q| r). It is often
    vacuous on real keys and is never an estimate.
    """
    per_group = q.shape[1] // tail.radii.shape[0]
    radii = tail.radii.repeat_interleave(per_group, dim=0)
    reach = q.float().norm(dim=-1, keepdim=True) * scale * radii
    return log_sum_exp(
        torch.where(tail.log_mass > -math.inf, tail.log_mass_linear + reach, -math.inf)
    )


def add_missed(parts: Sequence[Missed]) -> Missed:
    """What callers missed together: their samples are independent."""
    mean, variance, most = parts[0]
    for part in parts[1:]:
        mean, variance = mean + part.mean, variance + part.variance
        most = log_add(most, part.log_most)
    return Missed(mean, variance, most)


def recall_of(mean: Tensor, variance: Tensor) -> Tensor:
    """Share of attention that was read, 1 / (1 + missed), of the mean and variance of `Missed`.

    The mean is unbiased; its reciprocal is not, so the second-order term of that bias (variance
    times half the second derivative) is taken off. 1 where no key is unread.
    """
    recall = 1.0 / (1.0 + mean)
    return (recall - recall.pow(3) * variance).clamp_(0.0, 1.0)


def bound_of(log_most: Tensor, lse_read: Tensor) -> Tensor:
    """Greatest share of attention that the unread keys can hold, [T, H] float32."""
    return torch.sigmoid(log_most - lse_read)


def _draw_probabilities(log_mass: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of each unit [G, R, U] for each row, and whether the row has any unread key [G,
    R].
    """
    is_unread = log_mass > -math.inf
    has_unread = is_unread.any(dim=-1)
    by_mass = torch.softmax(log_mass.masked_fill(~has_unread.unsqueeze(-1), 0.0), dim=-1)
    keys = sizes.unsqueeze(1) * is_unread
    by_size = keys / keys.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.lerp(by_mass, by_size, UNIFORM_SHARE), has_unread


def _draw(
    probabilities: Tensor, tail: Tail, num_strata: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Slots [G, R, 2 * num_strata] and the inverse of each draw's density, size / probability."""
    shape = (*probabilities.shape[:2], num_strata, 2)
    uniform = torch.rand((2, *shape), generator=generator).to(probabilities.device)
    stratum = torch.arange(num_strata, device=probabilities.device).unsqueeze(1)
    position = ((uniform[0] + stratum) / num_strata).flatten(2)
    cumulative = probabilities.cumsum(dim=-1)
    unit = torch.searchsorted(cumulative, position * cumulative[..., -1:], right=True)
    # Rounding may reach the very end, where the last units may be ones that cannot be drawn.
    num_after = (probabilities.flip(-1) > 0).to(torch.int8).argmax(dim=-1, keepdim=True)
    unit = torch.minimum(unit, probabilities.shape[-1] - 1 - num_after)
    size = tail.sizes.unsqueeze(1).expand_as(probabilities).gather(2, unit)
    start = tail.starts.unsqueeze(1).expand_as(probabilities).gather(2, unit)
    slots = start + (uniform[1].flatten(2) * size).long().clamp_(max=size - 1)
    return slots, size / probabilities.gather(2, unit).clamp(min=1e-30)


def _scores_at(rows: Tensor, k: Tensor, slots: Tensor) -> Tensor:
    """Products of rows [G, R, D] with the keys at slots [G, R, n] of k [N, D], float32."""
    keys = gather_rows(k, slots.flatten().clamp(min=0)).view(*slots.shape, k.shape[1])
    return torch.matmul(keys.float(), rows.float().unsqueeze(-1)).squeeze(-1)

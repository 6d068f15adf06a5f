"""The definition, in float32 with loops: what every backend and kernel is tested against.

Imports nothing from the rest of the package but the type `Part`, so that a mistake there cannot
hide here. Never used in production; `--backend reference` exists so that a doubt can be settled on
real data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn.state import Part


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Part:
    """Softmax attention of every query over every key, one query and head at a time.

    q: [T, H, D]; k, v: [G, S, D]; mask: [T, S] bool, True where the key may be seen.
    Query head h reads KV head h // (H // G). Rows that see no key give the empty part.
    """
    num_tokens, num_heads, head_dim = q.shape
    per_group = num_heads // k.shape[0]
    out = torch.zeros(num_tokens, num_heads, head_dim, device=q.device)
    lse = torch.full((num_tokens, num_heads), -math.inf, device=q.device)
    for t in range(num_tokens):
        seen = slice(None) if mask is None else mask[t]
        for h in range(num_heads):
            keys = k[h // per_group][seen].float()
            if keys.shape[0] == 0:
                continue
            scores = keys @ q[t, h].float() * scale
            lse[t, h] = torch.logsumexp(scores, dim=0)
            out[t, h] = torch.exp(scores - lse[t, h]) @ v[h // per_group][seen].float()
    return Part(out, lse)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part:
    """Attention of a chunk over itself: token t of q [T, H, D] sees keys 0 to t of k, v [G, T,
    D].
    """
    order = torch.arange(q.shape[0], device=q.device)
    return attend(q, k, v, scale=scale, mask=order.unsqueeze(0) <= order.unsqueeze(1))


def attend_scored(
    q: Tensor, k: Tensor, v: Tensor, *, visible: Tensor | None, scale: float
) -> tuple[Part, Tensor]:
    """Attention of the heads of one group over their keys, and the scores.

    q: [T, P, D]; k, v: [S, D]; visible: [T, S] bool, which keys each query attends to, None for
    all. Returns the part and the scores [T, P, S] float32.
    """
    part = attend(q, k.unsqueeze(0), v.unsqueeze(0), scale=scale, mask=visible)
    return part, score_keys(q, k, scale=scale)


def score_keys(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """Scores [T, P, S] float32 of q [T, P, D] over the keys k [S, D] of its group."""
    return torch.stack([k.float() @ row.float() * scale for row in q.flatten(0, 1)]).view(
        *q.shape[:2], k.shape[0]
    )


def score_units(
    q: Tensor,
    centroids: Tensor,
    variances: Tensor,
    log_sizes: Tensor,
    critical: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Estimated log mass of each unit for each query of a group, and without its spread: [T, P, U].

    q: [T, P, D]; centroids, variances: [U, D]; log_sizes, critical: [U] float32. See
    `select/centroid.py` for the formula.
    """
    linear = torch.empty(*q.shape[:2], centroids.shape[0], device=q.device)
    log_mass = torch.empty_like(linear)
    for t in range(q.shape[0]):
        for p in range(q.shape[1]):
            row = q[t, p].float() * scale
            for u in range(centroids.shape[0]):
                sigma = float((row.square() * variances[u].float()).sum()) ** 0.5
                m = min(sigma, float(critical[u]))
                linear[t, p, u] = log_sizes[u] + (row * centroids[u].float()).sum()
                log_mass[t, p, u] = linear[t, p, u] + m * (sigma - m / 2)
    return log_mass, linear


def attend_estimated(log_mass: Tensor, value_sums: Tensor, sizes: Tensor) -> Part:
    """The part of keys of one KV head that were not read, each unit standing for its keys.

    log_mass: [T, P, U], estimated log of sum exp(score) over the unit's keys, -inf where the unit
    does not count; value_sums: [U, D]; sizes: [U] keys of each unit, 0 at padding.
    """
    mean_values = value_sums.float() / sizes.clamp(min=1).unsqueeze(-1)
    out = torch.zeros(*log_mass.shape[:2], mean_values.shape[1], device=log_mass.device)
    lse = log_sum_exp(log_mass)
    for t in range(log_mass.shape[0]):
        for p in range(log_mass.shape[1]):
            if lse[t, p] > -math.inf:
                out[t, p] = torch.exp(log_mass[t, p] - lse[t, p]) @ mean_values
    return Part(out, lse)


def log_sum_exp(x: Tensor) -> Tensor:
    """Natural log of the sum of exp over the last dimension, -inf where every number is."""
    return torch.logsumexp(x, dim=-1)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [n, D] of x [N, D]."""
    return torch.stack([x[row] for row in rows.tolist()])

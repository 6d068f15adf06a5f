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


def attend_shared(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Part, Tensor]:
    """`attend` without a mask, and each key's share of its part's mass, [T, H, S] float32."""
    per_group = q.shape[1] // k.shape[0]
    scores = [q[:, h].float() @ k[h // per_group].float().T * scale for h in range(q.shape[1])]
    return attend(q, k, v, scale=scale), torch.softmax(torch.stack(scores, dim=1), dim=-1)


def key_mass(q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> Tensor:
    """exp(score - lse) of every key, [T, H, S] float32; lse: [T, H], natural log of the whole."""
    per_group = q.shape[1] // k.shape[0]
    scores = [q[:, h].float() @ k[h // per_group].float().T * scale for h in range(q.shape[1])]
    return torch.exp(torch.stack(scores, dim=1) - lse.unsqueeze(-1))


def attend_slots(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, *, visible: Tensor | None, scale: float
) -> tuple[Part, Tensor]:
    """Attention over chosen slots, and the score of each.

    q: [T, H, D]; k, v: [G, S, D]; slots: [G, B] int64, -1 where padded; visible: [G, T, B] bool,
    which slots each query attends to, None for all. Returns the part and each slot's share of its
    mass, [T, H, B] float32, 0 where a query does not attend.
    """
    num_tokens, num_heads, head_dim = q.shape
    per_group = num_heads // slots.shape[0]
    out = torch.zeros(num_tokens, num_heads, head_dim, device=q.device)
    lse = torch.full((num_tokens, num_heads), -math.inf, device=q.device)
    shares = torch.zeros(num_tokens, num_heads, slots.shape[1], device=q.device)
    for t in range(num_tokens):
        for h in range(num_heads):
            g = h // per_group
            seen = slots[g] >= 0 if visible is None else (slots[g] >= 0) & visible[g, t]
            chosen = slots[g][seen]
            part = attend(
                q[t : t + 1, h : h + 1], k[g : g + 1, chosen], v[g : g + 1, chosen], scale=scale
            )
            out[t, h], lse[t, h] = part.out[0, 0], part.lse[0, 0]
            scores = k[g, chosen].float() @ q[t, h].float() * scale
            shares[t, h, seen] = torch.softmax(scores, dim=0)
    return Part(out, lse), shares


def attend_estimated(log_mass: Tensor, value_sums: Tensor, sizes: Tensor) -> Part:
    """The part of keys that were not read, each unit standing for its keys.

    log_mass: [T, H, U], estimated log of sum exp(score) over the unit's keys, -inf where the unit
    does not count; value_sums: [G, U, D]; sizes: [G, U] keys of each unit, 0 at padding.
    """
    mean_values = value_sums.float() / sizes.clamp(min=1).unsqueeze(-1)
    num_tokens, num_heads, _ = log_mass.shape
    per_group = num_heads // mean_values.shape[0]
    out = torch.zeros(num_tokens, num_heads, mean_values.shape[2], device=log_mass.device)
    lse = torch.full((num_tokens, num_heads), -math.inf, device=log_mass.device)
    for t in range(num_tokens):
        for h in range(num_heads):
            lse[t, h] = torch.logsumexp(log_mass[t, h], dim=0)
            if lse[t, h] > -math.inf:
                out[t, h] = torch.exp(log_mass[t, h] - lse[t, h]) @ mean_values[h // per_group]
    return Part(out, lse)

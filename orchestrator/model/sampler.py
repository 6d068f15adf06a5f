"""Choosing the next token: greedy, or temperature and top-p from a seeded generator.

Owns the choice alone. Pure functions of logits, on the CPU whatever computed them, so that a seed
gives the same tokens on every device. Refuses to know tokenizers and stop rules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.types import Sampling


def make_generator(sampling: Sampling) -> torch.Generator:
    """Return the generator of one answer."""
    return torch.Generator("cpu").manual_seed(sampling.seed)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token id for `logits` [V]; ties break by the lowest id."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    logits = logits.float().cpu()
    # The maximum goes first: a tiny temperature must not overflow.
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, -1)
    kept, ids = _nucleus(probabilities, sampling.top_p)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens that together reach `top_p`, at least one: weights and ids."""
    ordered, ids = torch.sort(probabilities, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    kept[0] = ordered[0]
    return kept, ids

"""Choosing the next token: greedy, or temperature and top-p from a seeded generator.

Owns the choice alone. Pure functions of logits, on the CPU whatever computed them, so that a seed
gives the same tokens on every device. Refuses to know tokenizers and stop rules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orchestrator.errors import NotFinite
from orchestrator.types import Sampling

# Logits of a part that is searched by itself, a power of two: usual vocabularies are multiples.
_MOST_AT_ONCE = 256


def make_generator(sampling: Sampling) -> torch.Generator:
    """Return the generator of one answer."""
    return torch.Generator("cpu").manual_seed(sampling.seed)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token id for `logits` [V]; ties break by the lowest id.

    Raises NotFinite where they choose nothing.
    """
    if sampling.temperature == 0.0:
        greatest, best = torch.stack([x.double() for x in find_greatest(logits)]).tolist()
        _check_finite(greatest)
        return int(best)
    logits = logits.float().cpu()
    _check_finite(float(logits.max()))
    # The maximum goes first: a tiny temperature must not overflow.
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, -1)
    kept, ids = _nucleus(probabilities, sampling.top_p)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def find_greatest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of `logits` [..., V] and its id, the lowest of equals, [...] each. First among
    few, then among those: a GPU goes through all V in one block otherwise.
    """
    vocab = logits.shape[-1]
    width = min(vocab & -vocab, _MOST_AT_ONCE)
    values, columns = logits.view(*logits.shape[:-1], -1, width).max(dim=-1)
    value, row = values.max(dim=-1)
    column = columns.gather(-1, row.unsqueeze(-1)).squeeze(-1)
    return value, torch.add(column, row, alpha=width)


def _check_finite(greatest: float) -> None:
    """NaN is the greatest of what it is among."""
    if not math.isfinite(greatest):
        raise NotFinite(
            f"greatest logit {greatest}; limit a finite number; the model's numbers leave their "
            "type's range, or weights are damaged: try --dtype float32, and longspan docs verify"
        )


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens that together reach `top_p`, at least one: weights and ids."""
    ordered, ids = torch.sort(probabilities, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    kept[0] = ordered[0]
    return kept, ids

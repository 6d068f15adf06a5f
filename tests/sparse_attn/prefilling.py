"""What the tests of the prefill kernels share: where they run, and what they are given."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparse_attn.blocks import BlockSelection

BLOCK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Where the kernels run; the greatest error, absolute and relative to the greatest value."""

    device: str
    dtype: torch.dtype
    tolerance: float

    @property
    def is_exact(self) -> bool:
        """Whether scores are those of the twin but for the order of sums."""
        return self.dtype == torch.float32


KINDS = [
    pytest.param(Kind(device="cpu", dtype=torch.float32, tolerance=2e-5), id="interpreter"),
    pytest.param(
        Kind(device="cuda", dtype=torch.bfloat16, tolerance=2e-2), id="gpu", marks=pytest.mark.gpu
    ),
]


def make(
    kind: Kind,
    num_tokens: int,
    num_slots: int,
    *,
    heads: tuple[int, int] = (4, 1),
    head_dim: int = 64,
    spread: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D], k and v [G, S, D]; heads: H and G."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_tokens, heads[0], head_dim, generator=generator) * spread
    k, v = torch.randn(2, heads[1], num_slots, head_dim, generator=generator)
    q, k, v = (x.to(kind.device, kind.dtype) for x in (q, k, v))
    return q, k, v


def lists(
    kind: Kind, rows: list[list[list[int]]], tile_tokens: int, block: int = BLOCK
) -> BlockSelection:
    """A selection from lists of blocks by query tile and KV head."""
    width = max(len(blocks) for row in rows for blocks in row)
    padded = [[blocks + [-1] * (width - len(blocks)) for blocks in row] for row in rows]
    table = torch.tensor(padded, dtype=torch.int64, device=kind.device)
    return BlockSelection.of(
        table.view(len(rows), len(rows[0]), width), block=block, tile_tokens=tile_tokens
    )

"""Row B3, merging: any ranks, any placement, any selection, over threads: merge equals dense.

A seeded run of many more cases than the test of the same name makes, on every backend.
"""

from __future__ import annotations

import random
import sys

import torch

from benchmarks.harness import note, print_row
from collectives import Group, run_threads
from orchestrator.model.attention import merge_over
from sparse_attn.api import Backend, find_backend
from sparse_attn.folds import NUM_FOLDS
from sparse_attn.state import Part
from tests.distributed.test_parts import (
    HEAD_DIM,
    NUM_KV_HEADS,
    PER_GROUP,
    SCALE,
    Run,
    dense,
    own_shard,
)

BAR = "merge equals dense within 1e-5, float32; the same bits on every rank"
LIMIT, NUM_CASES = 1e-5, 400
BACKENDS = ("native", "torch", "reference")


def main() -> int:
    """Measure the row."""
    largest, most_ranks, num_empty, is_same = 0.0, 0, 0, True
    for seed in range(NUM_CASES):
        rng = random.Random(seed)
        num_ranks, num_runs = rng.randint(1, 8), rng.randint(1, 24)
        lengths = [rng.choice((0, 1, 3, 16, 63, 64, 65, 200)) for _ in range(num_runs)]
        share = rng.choice((0.0, 0.2, 0.7, 1.0))
        placed = [
            [
                (rng.randrange(num_ranks), rng.randrange(NUM_FOLDS), rng.random() < share)
                for _ in lengths
            ]
            for _ in range(NUM_KV_HEADS)
        ]
        generator = torch.Generator().manual_seed(seed)
        num_tokens = rng.choice((1, 2, 5, 17))
        q = torch.randn(num_tokens, NUM_KV_HEADS * PER_GROUP, HEAD_DIM, generator=generator)
        k, v = torch.randn(2, NUM_KV_HEADS, sum(lengths), HEAD_DIM, generator=generator)
        wanted = dense(q, k, v, lengths, placed)
        for name in BACKENDS:
            parts = _merge(find_backend(name), num_ranks, q, k, v, lengths, placed)
            is_same &= all(torch.equal(part.out, parts[0].out) for part in parts)
            largest = max(largest, _difference(parts[0], wanted))
        most_ranks = max(most_ranks, num_ranks)
        num_empty += bool((wanted.lse == -torch.inf).any())
    note(f"largest difference {largest:.2e}")
    measured = {
        "largest_difference": largest,
        "same_bits_on_every_rank": is_same,
        "num_cases": NUM_CASES * len(BACKENDS),
        "num_cases_with_an_empty_row": num_empty,
        "most_ranks": most_ranks,
        "backends": list(BACKENDS),
    }
    holds = largest <= LIMIT and is_same and num_empty > 0
    return print_row(row="B3", measured=measured, bar=BAR, holds=holds)


def _merge(
    backend: Backend,
    num_ranks: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    placed: list[list[Run]],
) -> list[Part]:
    """The merged part, as each rank has it."""

    def work(group: Group) -> Part:
        own_k, own_v, runs = own_shard(k, v, lengths, placed, group.rank)
        part, _ = backend.attend_runs(q, own_k, own_v, runs, scale=SCALE, keeps=False)
        return merge_over(group, part, backend)

    return run_threads(num_ranks, work)


def _difference(ours: Part, theirs: Part) -> float:
    """Largest of outputs and log-masses; infinite where one is empty and the other is not."""
    is_empty = theirs.lse == -torch.inf
    if not torch.equal(is_empty, ours.lse == -torch.inf):
        return float("inf")
    lse = (ours.lse - theirs.lse).masked_fill(is_empty, 0.0).abs()
    scale = theirs.lse.masked_fill(is_empty, 0.0).abs().clamp(min=1.0)
    return max(float((lse / scale).max()), float((ours.out - theirs.out).abs().max()))


if __name__ == "__main__":
    sys.exit(main())

"""Merging over ranks is merging over keys: any ranks, any placement, any selection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectives import Group, run_threads
from orchestrator.model.attention import merge_over
from sparse_attn.api import find_backend
from sparse_attn.folds import NUM_FOLDS, Runs
from sparse_attn.reference import attend
from sparse_attn.state import Part

NUM_KV_HEADS, PER_GROUP, HEAD_DIM, SCALE = 2, 3, 16, 0.25
# One run of keys: which rank holds it, in which fold, and whether it is selected.
Run = tuple[int, int, bool]


@given(
    num_ranks=st.integers(1, 6),
    num_tokens=st.integers(1, 5),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
@pytest.mark.parametrize("name", ["native", "torch", "reference"])
def test_merged_parts_equal_dense_attention(
    name: str,
    num_ranks: int,
    num_tokens: int,
    lengths: list[int],
    seed: int,
    data: st.DataObject,
) -> None:
    run = st.tuples(st.integers(0, num_ranks - 1), st.integers(0, NUM_FOLDS - 1), st.booleans())
    placed = [
        data.draw(st.lists(run, min_size=len(lengths), max_size=len(lengths)))
        for _ in range(NUM_KV_HEADS)
    ]
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_tokens, NUM_KV_HEADS * PER_GROUP, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, NUM_KV_HEADS, sum(lengths), HEAD_DIM, generator=generator)
    backend = find_backend(name)

    def work(group: Group) -> Part:
        own_k, own_v, runs = own_shard(k, v, lengths, placed, group.rank)
        part, _ = backend.attend_runs(q, own_k, own_v, runs, scale=SCALE, keeps=False)
        return merge_over(group, part, backend)

    parts = run_threads(num_ranks, work)
    wanted = dense(q, k, v, lengths, placed)
    for part in parts:
        assert torch.equal(part.out, parts[0].out)
        torch.testing.assert_close(part.lse, wanted.lse, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part.out, wanted.out, atol=1e-5, rtol=1e-5)


def own_shard(
    k: torch.Tensor, v: torch.Tensor, lengths: list[int], placed: list[list[Run]], rank: int
) -> tuple[torch.Tensor, torch.Tensor, Runs]:
    """The selected runs that a rank holds, flat, by KV head and fold."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    first: list[int] = []
    count: list[int] = []
    bounds: list[list[int]] = []
    place = 0
    for head in range(NUM_KV_HEADS):
        own = sorted(
            (fold, i)
            for i, (owner, fold, chosen) in enumerate(placed[head])
            if owner == rank and chosen
        )
        bounds.append(
            [len(first) + sum(fold < edge for fold, _ in own) for edge in range(NUM_FOLDS + 1)]
        )
        for _, i in own:
            span = slice(starts[i], starts[i] + lengths[i])
            keys.append(k[head, span])
            values.append(v[head, span])
            first.append(place)
            count.append(lengths[i])
            place += lengths[i]
    nothing = k[0, :0]
    runs = Runs(
        first=torch.tensor(first, dtype=torch.int64),
        count=torch.tensor(count, dtype=torch.int64),
        bounds=torch.tensor(bounds, dtype=torch.int64),
    )
    return torch.cat([nothing, *keys]), torch.cat([nothing, *values]), runs


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    placed: list[list[Run]],
) -> Part:
    """The definition over every selected key, one KV head at a time."""
    outs, lses = [], []
    for head in range(NUM_KV_HEADS):
        chosen = [is_chosen for _, _, is_chosen in placed[head]]
        seen = torch.repeat_interleave(torch.tensor(chosen), torch.tensor(lengths))
        rows = q[:, head * PER_GROUP : (head + 1) * PER_GROUP]
        part = attend(rows, k[head : head + 1, seen], v[head : head + 1, seen], scale=SCALE)
        outs.append(part.out)
        lses.append(part.lse)
    return Part(torch.cat(outs, dim=1), torch.cat(lses, dim=1))

"""The sample of the unread keys by kernels: unbiased, its bound that of `estimate.py`."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.api import find_backend
from sparse_attn.errors import ShapeMismatch
from sparse_attn.estimate import Missed, sample_missed
from sparse_attn.kernels.decode import DecodeDocument, Heads
from sparse_attn.kernels.sample import random_pair
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.base import Limit
from tests.sparse_attn.inputs import SCALE, Layer, hold, make_layer
from tests.sparse_attn.reading import Read

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 16


def make_plan(*layers: Layer, levels: int, keys: int) -> CentroidDecode:
    heads = Heads(
        num_documents=len(layers),
        num_queries=1,
        num_kv_heads=NUM_KV_HEADS,
        per_group=NUM_HEADS // NUM_KV_HEADS,
        head_dim=HEAD_DIM,
    )
    documents = [
        DecodeDocument(
            runs=layer.runs,
            k=[layer.k],
            v=[layer.v],
            steady_k=[layer.steady_k.contiguous()],
            steady_v=[layer.steady_v.contiguous()],
            indexes=[layer.index],
        )
        for layer in layers
    ]
    visible = torch.tensor([layer.steady_k.shape[1] for layer in layers])
    limit = Limit(keys=keys)
    return CentroidDecode(heads, documents, visible, limit=limit, levels=levels, scale=SCALE)


def missed_truly(layer: Layer, q: Tensor, lse_read: Tensor) -> Tensor:
    """Mass of every key that was not read, as a multiple of what was."""
    torch_backend = find_backend("torch")
    body, _ = torch_backend.attend_runs(q, layer.k, layer.v, layer.runs, scale=SCALE, keeps=False)
    steady = torch_backend.attend(q, layer.steady_k, layer.steady_v, scale=SCALE)
    return torch.expm1(torch.logaddexp(steady.lse, body.lse) - lse_read)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_sample_is_unbiased_and_knows_its_variance(levels: int) -> None:
    layer = hold(make_layer([96, 33, 65], head_dim=HEAD_DIM, num_kv_heads=NUM_KV_HEADS))
    q = torch.randn(1, NUM_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    plan = make_plan(layer, levels=levels, keys=24)
    lse_read = plan.run(0, q.unsqueeze(0)).lse_read[0].clone()
    samples = [plan.sample(0, q, seeds=torch.tensor([i]), num_strata=32) for i in range(8)]
    means = torch.stack([sample.mean for sample in samples])
    error = torch.stack([sample.variance for sample in samples]).mean(dim=0).div(8).sqrt()
    truth = missed_truly(layer, q, lse_read)
    assert ((means.mean(dim=0) - truth).abs() < 4 * error).all()
    assert (error < 0.2 * truth).all()
    # As many draws of one seed spread as their own variance says, within a factor.
    spread = means.std(dim=0).mean() / error.mul(8**0.5).mean()
    assert 0.5 < float(spread) < 2.0


@pytest.mark.parametrize("levels", [1, 2])
def test_the_bound_is_that_of_the_definition(levels: int) -> None:
    layer = hold(make_layer([96, 33], head_dim=HEAD_DIM, num_kv_heads=NUM_KV_HEADS))
    q = torch.randn(1, NUM_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    plan = make_plan(layer, levels=levels, keys=24)
    lse_read = plan.run(0, q.unsqueeze(0)).lse_read[0]
    generator = torch.Generator().manual_seed(0)
    ours = plan.sample(0, q, seeds=torch.tensor([0]), num_strata=2)
    read = Read(find_backend("torch"), [layer], q, Limit(keys=24), levels=levels).reads[0]
    theirs = sample_missed(
        q, layer.k, read.tail, lse_read, scale=SCALE, num_strata=2, generator=generator
    )
    torch.testing.assert_close(ours.log_most, theirs.log_most, atol=1e-4, rtol=0)


def test_nothing_is_missed_where_everything_was_read() -> None:
    layer = hold(make_layer([96], head_dim=HEAD_DIM, num_kv_heads=NUM_KV_HEADS))
    q = torch.randn(1, NUM_HEADS, HEAD_DIM)
    plan = make_plan(layer, levels=1, keys=1000)
    plan.run(0, q.unsqueeze(0))
    missed = plan.sample(0, q, seeds=torch.tensor([0]), num_strata=2)
    assert missed.mean.eq(0).all()
    assert missed.variance.eq(0).all()
    assert missed.log_most.eq(-float("inf")).all()


@pytest.mark.parametrize("levels", [1, 2])
def test_queries_on_several_documents_are_sampled_as_each_alone(levels: int) -> None:
    """And a query that was not chosen keeps what was there."""
    layers = [
        hold(make_layer(lengths, head_dim=HEAD_DIM, num_kv_heads=NUM_KV_HEADS, seed=i))
        for i, lengths in enumerate(([96, 33], [40], [65, 70]))
    ]
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(3, NUM_HEADS, HEAD_DIM, generator=generator)
    seeds = torch.tensor([3, 5, 1 << 40])
    plan = make_plan(*layers, levels=levels, keys=24)
    plan.run(0, q.unsqueeze(1))
    kept = Missed(*(torch.full((3, NUM_HEADS), 7.0) for _ in range(3)))
    chosen = torch.tensor([1, 0, 1], dtype=torch.int32)
    together = plan.sample(0, q, seeds=seeds, num_strata=8, chosen=chosen, out=kept)
    for b, layer in enumerate(layers):
        alone = make_plan(layer, levels=levels, keys=24)
        alone.run(0, q[b : b + 1].unsqueeze(1))
        wanted = alone.sample(0, q[b : b + 1], seeds=seeds[b : b + 1], num_strata=8)
        for own, each in zip(together, wanted, strict=True):
            if chosen[b]:
                assert torch.equal(own[b], each[0])
            else:
                assert own[b].eq(7.0).all()
    with pytest.raises(ShapeMismatch, match="seeds"):
        plan.sample(0, q, seeds=seeds[:1], num_strata=8)


def test_random_numbers_are_even_and_of_their_own() -> None:
    """For each seed, query, layer and head; the same again where all of them are the same."""

    def drawn(seed: int, query: int, layer: int, head: int) -> Tensor:
        out = torch.empty(2, 1024)
        at = torch.tensor([seed, query, layer, head])
        draw_kernel[(1,)](at, out, 1024)
        return out

    first = drawn(7, 100, 2, 1)
    assert torch.equal(first, drawn(7, 100, 2, 1))
    assert 0.0 <= float(first.min()) < 0.01
    assert 0.99 < float(first.max()) < 1.0
    assert (first.mean(dim=1) - 0.5).abs().max() < 4 * (1 / 12 / 1024) ** 0.5
    others = [drawn(*at) for at in ((8, 100, 2, 1), (7, 101, 2, 1), (7, 100, 3, 1), (7, 100, 2, 2))]
    numbers = torch.cat([first, *others])
    apart = torch.corrcoef(numbers) - torch.eye(len(numbers))
    assert apart.abs().max() < 5 / 1024**0.5


@triton.jit
def draw_kernel(at: Tensor, out: Tensor, DRAWS: tl.constexpr) -> None:
    layer = tl.load(at + 2).to(tl.int32)
    a, b = random_pair(tl.load(at), tl.load(at + 1), layer, tl.load(at + 3), DRAWS)
    draw = tl.arange(0, DRAWS)
    tl.store(out + draw, a)
    tl.store(out + DRAWS + draw, b)

"""Sparse prefill in torch, and by every backend, against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attn import reference, torch_prefill
from sparse_attn import reference_prefill as twin
from sparse_attn.api import find_backend
from sparse_attn.blocks import BlockSelection, block_units
from sparse_attn.kernels import prefill
from sparse_attn.kernels.backend import TritonBackend
from sparse_attn.state import Part

BLOCK, SCALE = 64, 0.125
# Tokens, slots, query and KV heads.
SHAPES = [(1, 1, (1, 1)), (17, 256, (4, 2)), (65, 193, (7, 1)), (33, 130, (6, 3))]


def make(num_tokens: int, num_slots: int, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_slots)
    q = 2.0 * torch.randn(num_tokens, heads[0], 64, generator=generator)
    k, v = torch.randn(2, heads[1], num_slots, 64, generator=generator)
    return q, k, v


def random_selection(
    num_tokens: int, num_kv_heads: int, num_slots: int, tile_tokens: int
) -> BlockSelection:
    """Each block in about half of the lists; the first list is empty."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (-(-num_tokens // tile_tokens), num_kv_heads, -(-num_slots // BLOCK))
    blocks = torch.arange(shape[2]).expand(shape).clone()
    blocks[torch.rand(shape, generator=generator) < 0.5] = -1
    blocks[0, 0] = -1
    return BlockSelection.of(blocks, block=BLOCK, tile_tokens=tile_tokens)


def assert_same(found: Part, expected: Part) -> None:
    torch.testing.assert_close(found.out, expected.out, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.lse, expected.lse, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("tile_tokens", [1, 16, 64])
@pytest.mark.parametrize(("num_tokens", "num_slots", "heads"), SHAPES)
def test_attention_to_blocks(
    num_tokens: int, num_slots: int, heads: tuple[int, int], tile_tokens: int, has_tail: bool
) -> None:
    q, k, v = make(num_tokens, num_slots, heads)
    chosen = random_selection(num_tokens, heads[1], num_slots, tile_tokens)
    tail = block_units(k, v, block=BLOCK) if has_tail else None
    found, expected = (
        module.attend_blocks(q, k, v, chosen, scale=SCALE, tail=tail)
        for module in (torch_prefill, twin)
    )
    assert_same(found, expected)


def test_batches_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make(65, 193, (6, 3))
    chosen, tail = random_selection(65, 3, 193, 16), block_units(k, v, block=BLOCK)
    whole = torch_prefill.attend_blocks(q, k, v, chosen, scale=SCALE, tail=tail)
    monkeypatch.setattr(torch_prefill, "_BATCH_BYTES", 1)
    assert_same(torch_prefill.attend_blocks(q, k, v, chosen, scale=SCALE, tail=tail), whole)


@pytest.mark.parametrize("num_always", [0, 1, 3])
@pytest.mark.parametrize("budget", [0, 64, 130, 200, 10**6])
@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_selection(backend: str, budget: int, num_always: int) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("float32 is for the interpreter")
    q, k, v = make(65, 330, (4, 2))
    units = block_units(k, v, block=BLOCK)
    found, expected = (
        find_backend(name).blocks.select_blocks(
            q, units, budget_keys=budget, tile_tokens=16, scale=SCALE, num_always=num_always
        )
        for name in (backend, "reference")
    )
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.blocks[..., : expected.blocks.shape[2]], expected.blocks)
    first = min(num_always, budget // BLOCK)
    assert torch.equal(found.blocks[..., :first], torch.arange(first).expand(5, 2, first).int())


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 is for the interpreter")
def test_dense_attention_by_kernels_is_a_choice_of_the_triton_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = make(65, 193, (4, 2))
    backend = TritonBackend()
    by_torch = backend.attend(q, k, v, scale=SCALE)
    calls: list[int] = []
    monkeypatch.setattr(backend, "dense_kernels", True)
    monkeypatch.setattr(prefill, "_attend_dense", counted(prefill._attend_dense, calls))
    assert_same(backend.attend(q, k, v, scale=SCALE), by_torch)
    own = k[:, :65], v[:, :65]
    assert_same(
        backend.attend_causal(q, *own, scale=SCALE), reference.attend_causal(q, *own, scale=SCALE)
    )
    assert len(calls) == 2


def counted(function: Callable[..., Part], calls: list[int]) -> Callable[..., Part]:
    """The function, with a note of each call."""

    def call(*args: Any, **options: Any) -> Part:
        calls.append(len(args))
        return function(*args, **options)

    return call


def test_no_query_is_no_part() -> None:
    q, k, v = make(0, 100, (4, 2))
    units = block_units(k, v, block=BLOCK)
    for name in ("torch", "reference"):
        blocks = find_backend(name).blocks
        chosen = blocks.select_blocks(q, units, budget_keys=64, tile_tokens=16, scale=SCALE)
        part = blocks.attend_blocks(q, k, v, chosen, scale=SCALE, tail=units)
        assert part.out.shape == (0, 4, 64)


def test_statistics_of_two_runs_are_those_of_the_whole() -> None:
    _, k, v = make(1, 330, (4, 2))
    whole = block_units(k, v, block=BLOCK)
    both = block_units(k[:, :128], v[:, :128], block=BLOCK).followed_by(
        block_units(k[:, 128:], v[:, 128:], block=BLOCK)
    )
    assert both.num_slots == whole.num_slots
    for name in ("keys", "variances", "values"):
        torch.testing.assert_close(getattr(both, name), getattr(whole, name))
    assert whole.sizes().tolist() == [64.0] * 5 + [10.0]


def test_reading_everything_is_dense_attention() -> None:
    q, k, v = make(33, 130, (6, 3))
    units = block_units(k, v, block=BLOCK)
    chosen = torch_prefill.select_blocks(
        q, units, budget_keys=130, tile_tokens=16, scale=SCALE, num_always=1
    )
    found = torch_prefill.attend_blocks(q, k, v, chosen, scale=SCALE, tail=units)
    assert_same(found, reference.attend(q, k, v, scale=SCALE))

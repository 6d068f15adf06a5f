"""Prefill kernels against their twins: float32 in the interpreter, bfloat16 on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from sparse_attn import reference_prefill as twin
from sparse_attn.blocks import (
    BlockSelection,
    BlockUnits,
    block_units,
)
from sparse_attn.errors import AttentionError, InvalidBudget, ShapeMismatch
from sparse_attn.kernels import prefill
from sparse_attn.state import Part, merge_parts
from tests.sparse_attn.prefilling import BLOCK, KINDS, Kind, lists, make

ORDERS: tuple[Literal["queries", "keys"], ...] = ("queries", "keys")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    if found.is_exact and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    return found


def random_lists(
    kind: Kind, num_tokens: int, num_kv_heads: int, num_slots: int, tile_tokens: int
) -> BlockSelection:
    """Each block in about half of the lists, some of which are empty."""
    generator = torch.Generator().manual_seed(num_tokens + tile_tokens)
    num_units = -(-num_slots // BLOCK)
    taken = torch.rand(-(-num_tokens // tile_tokens), num_kv_heads, num_units, generator=generator)
    rows = [[torch.nonzero(x < 0.5).flatten().tolist() for x in row] for row in taken]
    rows[0][0] = []
    return lists(kind, rows, tile_tokens)


def assert_same(found: Part, expected: Part, kind: Kind) -> None:
    assert torch.equal(torch.isinf(found.lse), torch.isinf(expected.lse))
    for a, b in zip(found, expected, strict=True):
        finite = b[torch.isfinite(b)]
        limit = kind.tolerance * max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)
        torch.testing.assert_close(a, b, atol=limit, rtol=0)


def assert_twin(kind: Kind, name: str, *tensors: object, scale: float) -> None:
    found, expected = (getattr(x, name)(*tensors, scale=scale) for x in (prefill, twin))
    assert_same(found, expected, kind)


SHAPES = [
    (1, 1, (1, 1), 64),
    (63, 65, (4, 1), 64),
    (65, 193, (7, 1), 64),
    (9, 64, (4, 2), 128),
    (3, 70, (2, 2), 256),
]


@pytest.mark.parametrize(("num_tokens", "num_slots", "heads", "head_dim"), SHAPES)
def test_dense_and_causal(
    kind: Kind, num_tokens: int, num_slots: int, heads: tuple[int, int], head_dim: int
) -> None:
    q, k, v = make(kind, num_tokens, num_slots, heads=heads, head_dim=head_dim)
    scale = head_dim**-0.5
    assert_twin(kind, "attend_dense", q, k, v, scale=scale)
    for past in {0, num_slots - num_tokens}:
        own = k[:, : num_tokens + past], v[:, : num_tokens + past]
        assert_twin(kind, "attend_causal", q, *own, scale=scale)


@pytest.mark.parametrize("tile_tokens", [1, 16, 64])
@pytest.mark.parametrize(
    ("num_tokens", "num_slots", "heads"),
    [(1, 1, (1, 1)), (17, 256, (4, 2)), (65, 193, (7, 1)), (33, 130, (1, 1))],
)
def test_lists_in_both_orders(
    kind: Kind, num_tokens: int, num_slots: int, heads: tuple[int, int], tile_tokens: int
) -> None:
    q, k, v = make(kind, num_tokens, num_slots, heads=heads)
    chosen = random_lists(kind, num_tokens, heads[1], num_slots, tile_tokens)
    units = block_units(k, v, block=BLOCK)
    for tail in (None, units):
        expected = twin.attend_blocks(q, k, v, chosen, scale=0.125, tail=tail)
        for order in ORDERS:
            found = prefill.attend_blocks(q, k, v, chosen, scale=0.125, tail=tail, order=order)
            assert_same(found, expected, kind)
    assert_twin(kind, "attend_unread", q, units, chosen, scale=0.125)


@pytest.mark.parametrize("order", ORDERS)
def test_everything_selected_is_dense(kind: Kind, order: Literal["queries", "keys"]) -> None:
    q, k, v = make(kind, 70, 300, heads=(8, 2), head_dim=128)
    everything = lists(kind, [[[4, 2, 0, 1, 3]] * 2] * 2, 64)
    found = prefill.attend_blocks(
        q, k, v, everything, scale=0.1, tail=block_units(k, v, block=BLOCK), order=order
    )
    assert_same(found, twin.attend_dense(q, k, v, scale=0.1), kind)


def test_blocks_of_several_steps_that_many_tiles_chose(kind: Kind) -> None:
    q, k, v = make(kind, 70, 300, heads=(16, 1))
    chosen = lists(kind, [[[0, 2]], [[0, 1, 2]]], 64, block=128)
    tail = block_units(k, v, block=128)
    expected = twin.attend_blocks(q, k, v, chosen, scale=0.125, tail=tail)
    for order in ORDERS:
        found = prefill.attend_blocks(q, k, v, chosen, scale=0.125, tail=tail, order=order)
        assert_same(found, expected, kind)


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_selected_is_the_empty_part(kind: Kind, order: Literal["queries", "keys"]) -> None:
    q, k, v = make(kind, 20, 130)
    for nothing in (lists(kind, [[[]]] * 2, 16), lists(kind, [[[-1, -1]]] * 2, 16)):
        part = prefill.attend_blocks(q, k, v, nothing, scale=0.1, order=order)
        assert bool((part.lse == -torch.inf).all())
        assert not part.out.any()


def test_no_keys_and_no_tokens(kind: Kind) -> None:
    q, k, v = make(kind, 20, 130)
    none = prefill.select_blocks(
        q, block_units(k[:, :0], v[:, :0], block=BLOCK), budget_keys=9, tile_tokens=16, scale=0.1
    )
    for part in (
        prefill.attend_dense(q, k[:, :0], v[:, :0], scale=0.1),
        *(prefill.attend_blocks(q, k[:, :0], v[:, :0], none, scale=0.1, order=o) for o in ORDERS),
    ):
        assert bool((part.lse == -torch.inf).all())
        assert not part.out.any()
    units = block_units(k, v, block=BLOCK)
    empty = prefill.select_blocks(q[:0], units, budget_keys=64, tile_tokens=16, scale=0.1)
    for order in ORDERS:
        part = prefill.attend_blocks(q[:0], k, v, empty, scale=0.1, tail=units, order=order)
        assert part.out.shape == (0, 4, 64)


def test_read_and_unread_keys_add_up(kind: Kind) -> None:
    q, k, v = make(kind, 17, 200)
    q, v = torch.zeros_like(q), torch.ones_like(v)
    units, chosen = block_units(k, v, block=BLOCK), lists(kind, [[[1]], [[0, 3]]], 16)
    parts = [
        prefill.attend_blocks(q, k, v, chosen, scale=0.1),
        prefill.attend_unread(q, units, chosen, scale=0.1),
    ]
    together = prefill.attend_blocks(q, k, v, chosen, scale=0.1, tail=units)
    num_read = torch.tensor([64.0] * 16 + [72.0], device=kind.device).unsqueeze(1).expand(17, 4)
    torch.testing.assert_close(parts[0].lse.exp(), num_read, rtol=1e-4, atol=0)
    for part in (merge_parts(parts), together):
        torch.testing.assert_close(
            part.lse.exp(), torch.full_like(part.lse, 200.0), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(part.out, torch.ones_like(part.out), rtol=1e-2, atol=0)


def test_units_are_those_of_the_twin(kind: Kind) -> None:
    _, k, v = make(kind, 1, 150, heads=(2, 2))
    found, expected = block_units(k, v, block=BLOCK), twin.block_units(k, v, block=BLOCK)
    for name in ("keys", "variances", "values"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), atol=1e-2, rtol=kind.tolerance
        )


@pytest.mark.parametrize("order", ORDERS)
def test_one_hot_attention_finds_its_key(kind: Kind, order: Literal["queries", "keys"]) -> None:
    q, k, v = make(kind, 6, 256, heads=(2, 2))
    wanted = [3, 64, 127, 128, 200, 255]
    for t, slot in enumerate(wanted):
        q[t] = 64.0 * k[:, slot]
    chosen = prefill.select_blocks(
        q, block_units(k, v, block=BLOCK), budget_keys=4 * BLOCK, tile_tokens=1, scale=0.125
    )
    part = prefill.attend_blocks(q, k, v, chosen, scale=0.125, order=order)
    torch.testing.assert_close(
        part.out, v[:, wanted].transpose(0, 1).float(), atol=kind.tolerance, rtol=0
    )


def test_large_logits_stay_finite(kind: Kind) -> None:
    q, k, v = make(kind, 17, 130, spread=3000.0)
    units, chosen = block_units(k, v, block=BLOCK), lists(kind, [[[0, 2]], [[1]]], 16)
    for order in ORDERS:
        found = prefill.attend_blocks(q, k, v, chosen, scale=0.125, tail=units, order=order)
        assert all(bool(x.isfinite().all()) for x in found)
        if kind.is_exact:
            expected = twin.attend_blocks(q, k, v, chosen, scale=0.125, tail=units)
            assert_same(found, expected, replace(kind, tolerance=1e-3))


def test_scratch_changes_no_bit(kind: Kind) -> None:
    q, k, v = make(kind, 37, 200)
    units = block_units(k, v, block=BLOCK)
    chosen = prefill.select_blocks(q, units, budget_keys=128, tile_tokens=1, scale=0.125)
    again = prefill.select_blocks(
        q, units, budget_keys=128, tile_tokens=1, scale=0.125, max_scratch_bytes=200
    )
    assert torch.equal(chosen.blocks, again.blocks)
    found, small = (
        prefill.attend_blocks(
            q, k, v, chosen, scale=0.125, order="keys", max_scratch_bytes=num_bytes
        )
        for num_bytes in (1 << 30, 20_000)
    )
    assert torch.equal(found.out, small.out)
    assert torch.equal(found.lse, small.lse)


def test_keys_may_be_a_view_of_a_longer_buffer(kind: Kind) -> None:
    q, k, v = make(kind, 5, 200, heads=(4, 2))
    own = k[:, :130], v[:, :130]
    chosen = lists(kind, [[[0, 2], [1]]], 16)
    for order in ORDERS:
        assert_same(
            prefill.attend_blocks(q, *own, chosen, scale=0.125, order=order),
            twin.attend_blocks(q, *own, chosen, scale=0.125),
            kind,
        )
    assert_twin(kind, "attend_dense", q[:, 2:], *(x[1:] for x in own), scale=0.125)


def test_faults_name_value_limit_and_remedy(kind: Kind) -> None:
    q, k, v = make(kind, 20, 130)
    units: BlockUnits = block_units(k, v, block=BLOCK)
    chosen = lists(kind, [[[0]]], 16)
    with pytest.raises(ShapeMismatch, match="head dim: 32"):
        prefill.attend_dense(q[..., :32], k[..., :32], v[..., :32], scale=1.0)
    with pytest.raises(ShapeMismatch, match="query heads per KV head"):
        prefill.attend_dense(q[:, :0], k, v, scale=1.0)
    with pytest.raises(ShapeMismatch, match="causal chunk: 3"):
        prefill.attend_causal(q, k[:, :3], v[:, :3], scale=1.0)
    with pytest.raises(ShapeMismatch, match="strides"):
        prefill.attend_dense(q, k.transpose(1, 2).contiguous().transpose(1, 2), v, scale=1.0)
    with pytest.raises(ShapeMismatch, match="lists of blocks"):
        prefill.attend_blocks(q, k, v, chosen, scale=1.0)
    other = replace(units, num_slots=129)
    other = replace(units, num_slots=129)
    with pytest.raises(ShapeMismatch, match="slots and block of the tail"):
        prefill.attend_blocks(q[:16], k, v, chosen, scale=1.0, tail=other)
    with pytest.raises(AttentionError, match="scale: 0"):
        prefill.attend_dense(q, k, v, scale=0.0)
    with pytest.raises(AttentionError, match="float64"):
        prefill.attend_dense(q.double(), k.double(), v.double(), scale=1.0)
    with pytest.raises(InvalidBudget, match="-1 keys"):
        prefill.select_blocks(q, units, budget_keys=-1, tile_tokens=16, scale=1.0)

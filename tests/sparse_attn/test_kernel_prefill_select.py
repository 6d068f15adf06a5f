"""Which blocks the prefill kernels choose, against their twin and against sorting."""

from __future__ import annotations

import pytest
import torch

from sparse_attn import reference_prefill as twin
from sparse_attn.blocks import BlockSelection, BlockUnits, block_units, take_best
from sparse_attn.kernels import prefill
from sparse_attn.kernels.prefill_choose import take_best_kernel
from tests.sparse_attn.prefilling import BLOCK, KINDS, Kind, make


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    if found.is_exact and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    return found


@pytest.mark.parametrize("tile_tokens", [1, 16, 64])
@pytest.mark.parametrize(("heads", "budget"), [((4, 2), 200), ((7, 1), 63), ((1, 1), 10**6)])
def test_selection(kind: Kind, heads: tuple[int, int], budget: int, tile_tokens: int) -> None:
    q, k, v = make(kind, 65, 330, heads=heads, spread=2.0)
    units = block_units(k, v, block=BLOCK)
    found, expected = (
        backend.select_blocks(q, units, budget_keys=budget, tile_tokens=tile_tokens, scale=0.125)
        for backend in (prefill, twin)
    )
    sizes = torch.tensor([64] * 5 + [10, 0], device=kind.device)
    assert int(sizes[found.blocks.long()].sum(dim=2).max()) <= budget
    if kind.is_exact:
        assert torch.equal(found.counts, expected.counts)
        assert torch.equal(found.blocks[..., : expected.blocks.shape[2]], expected.blocks)
    else:  # rounded statistics swap blocks of nearly equal scores
        same = found.flags(6) == expected.flags(6)
        assert float(same.float().mean()) > 0.9


@pytest.mark.parametrize(("num_units", "tile_tokens"), [(128, 1), (259, 16)])
def test_selection_among_more_blocks_than_a_step_scores(
    kind: Kind, num_units: int, tile_tokens: int
) -> None:
    q, k, v = make(kind, 21, num_units * BLOCK - 50 * (num_units % 2), heads=(2, 1), spread=2.0)
    units = block_units(k, v, block=BLOCK)
    found, expected = (
        backend.select_blocks(q, units, budget_keys=999, tile_tokens=tile_tokens, scale=0.125)
        for backend in (prefill, twin)
    )
    is_same = found.flags(num_units) == expected.flags(num_units)
    assert float(is_same.float().mean()) >= (1.0 if kind.is_exact else 0.9)


@pytest.mark.parametrize(("num_units", "chunk", "runs"), [(1, 1, 1), (9, 16, 3), (19, 8, 1)])
@pytest.mark.parametrize("last", [BLOCK, 40])
def test_the_search_takes_what_sorting_takes(
    kind: Kind, num_units: int, chunk: int, runs: int, last: int
) -> None:
    """Many equal scores and some that are -inf, every budget about a block, and all that fit."""
    generator = torch.Generator().manual_seed(num_units + last)
    shares = torch.randint(-6, 6, (2, runs, 2, num_units), generator=generator).float()
    shares[shares == -6] = -torch.inf
    shares = shares.to(kind.device)
    num_slots = (num_units - 1) * BLOCK + last
    none = torch.zeros(2, num_units, 64, device=kind.device)
    units = BlockUnits(keys=none, variances=none, values=none, block=BLOCK, num_slots=num_slots)
    half = num_units // 2 * BLOCK
    for budget in {0, last, 63, half, half + last, num_slots}:
        for num_always in (0, 2):
            best = take_best(
                shares.amax(dim=1), budget_keys=budget, units=units, num_always=num_always
            )
            expected = BlockSelection.of(best, block=BLOCK, tile_tokens=1)
            blocks, counts = torch.empty_like(expected.blocks), torch.empty_like(expected.counts)
            take_best_kernel[2, 2](
                shares, blocks, counts, num_slots, num_units, budget, blocks.shape[2], num_always,
                BLOCK=BLOCK, RUNS=runs, CHUNK=chunk,
            )  # fmt: skip
            assert torch.equal(counts, expected.counts)
            assert torch.equal(blocks, expected.blocks)


def test_equal_scores_are_taken_by_lowest_block(kind: Kind) -> None:
    q, k, v = make(kind, 20, 64 * 7 + 5)
    units = block_units(k, v, block=BLOCK)
    for budget, expected in ((3 * 64, [0, 1, 2]), (3 * 64 + 63, [0, 1, 2]), (63, [])):
        chosen = prefill.select_blocks(
            torch.zeros_like(q), units, budget_keys=budget, tile_tokens=16, scale=0.1
        )
        assert set(chosen.counts.flatten().tolist()) == {len(expected)}
        assert chosen.blocks[1, 0, : len(expected)].tolist() == expected


def test_a_tile_selects_by_its_greatest_share_not_by_the_mean(kind: Kind) -> None:
    """One token of sixteen needs block 2; all others like block 0 a little better than block 1."""
    q, k, v = make(kind, 16, 4 * BLOCK, heads=(1, 1))
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    k[0, :BLOCK, 0], k[0, 2 * BLOCK : 3 * BLOCK, 1] = 1.0, 1.0
    q[:, 0, 0], q[11, 0, 0], q[11, 0, 1] = 2.0, 0.0, 40.0
    units = block_units(k, v, block=BLOCK)
    chosen = prefill.select_blocks(q, units, budget_keys=BLOCK, tile_tokens=16, scale=1.0)
    assert chosen.blocks[0, 0, 0] == 2

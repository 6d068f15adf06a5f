"""The sample of what was missed, as the native kernels and as torch operators draw it."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_attn.api import Backend, find_backend
from sparse_attn.estimate import bound_of, recall_of
from sparse_attn.select.base import Limit, Tail
from tests.sparse_attn.inputs import SCALE, clustered_layer, hold, make_layer, random_qkv
from tests.sparse_attn.reading import Read

NATIVE, TORCH = (find_backend(name) for name in ("native", "torch"))
NUM_KEYS = 700


@pytest.mark.parametrize("levels", [1, 2])
def test_sampled_recall_and_bound(levels: int) -> None:
    """Many samples agree with the audited recall, as those of the composed backend do."""
    layer = clustered_layer(NUM_KEYS, seed=15)
    q, _, _ = random_qkv(2, 1, seed=16, spread=2.0)
    read = Read(NATIVE, [layer], q, Limit(keys=90), levels=levels)
    lse_read = NATIVE.merge_tree_lse(torch.stack([read.lse_steady, read.lse_read]))
    rest, _ = TORCH.attend_runs(q, layer.k, layer.v, layer.runs, scale=SCALE, keeps=False)
    true = torch.exp(lse_read - TORCH.merge_tree_lse(torch.stack([read.lse_steady, rest.lse])))
    generator = torch.Generator().manual_seed(0)
    reports = []
    for backend in (NATIVE, TORCH):
        samples = [
            backend.sample_missed(
                q,
                layer.k,
                read.reads[0].tail,
                lse_read,
                scale=SCALE,
                num_strata=256,
                generator=generator,
            )
            for _ in range(100)
        ]
        reports.append(torch.stack([recall_of(x.mean, x.variance) for x in samples]))
        assert bool((1.0 - true <= bound_of(samples[0].log_most, lse_read) + 1e-5).all())
    for recalls in reports:
        error = recalls.std(dim=0) / math.sqrt(100)
        assert bool(((recalls.mean(dim=0) - true).abs() < 4 * error + 0.004).all())
    torch.testing.assert_close(reports[0].std(dim=0), reports[1].std(dim=0), rtol=0.5, atol=1e-4)


@pytest.mark.parametrize("backend", [NATIVE, TORCH], ids=["native", "torch"])
def test_the_same_draws_give_the_same_sample_whoever_computes_it(backend: Backend) -> None:
    layer = clustered_layer(NUM_KEYS, seed=17)
    q, _, _ = random_qkv(2, 1, seed=18, spread=2.0)
    read = Read(TORCH, [layer], q, Limit(keys=90))
    found = backend.sample_missed(
        q,
        layer.k,
        read.reads[0].tail,
        read.lse_read,
        scale=SCALE,
        num_strata=64,
        generator=torch.Generator().manual_seed(0),
    )
    # Rows are drawn in another order; the mean over all of them is the same to its error.
    expected = TORCH.sample_missed(
        q,
        layer.k,
        read.reads[0].tail,
        read.lse_read,
        scale=SCALE,
        num_strata=64,
        generator=torch.Generator().manual_seed(1),
    )
    error = (found.variance + expected.variance).sqrt()
    assert bool(((found.mean - expected.mean).abs() < 6 * error).all())
    ratio = found.variance.mean() / expected.variance.mean()
    assert 0.3 < float(ratio) < 3.0
    torch.testing.assert_close(found.log_most, expected.log_most, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [NATIVE, TORCH], ids=["native", "torch"])
@pytest.mark.parametrize("num_callers", [1, 8])
def test_nothing_is_missed_where_nothing_is_unread(backend: Backend, num_callers: int) -> None:
    """By a query that read everything, and by a caller who holds nothing."""
    layer = hold(make_layer([70], seed=17), num_callers - 1, num_callers)
    q, _, _ = random_qkv(1, 1, seed=18)
    read = Read(backend, [layer], q, Limit(keys=NUM_KEYS))
    missed = backend.sample_missed(
        q,
        layer.k,
        read.reads[0].tail,
        read.lse_read,
        scale=SCALE,
        num_strata=4,
        generator=torch.Generator().manual_seed(0),
    )
    assert missed.mean.tolist() == missed.variance.tolist() == [[0.0] * 6]
    assert missed.log_most.tolist() == [[-math.inf] * 6]
    assert recall_of(missed.mean, missed.variance).tolist() == [[1.0] * 6]
    assert bound_of(missed.log_most, torch.zeros(1, 6)).tolist() == [[0.0] * 6]


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-24])
@pytest.mark.parametrize("backend", [NATIVE, TORCH])
def test_the_ends_of_the_sample_are_units_that_can_be_drawn(
    backend: Backend, draw: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding may carry a draw to the very end, where units are read or padding."""
    _, k, _ = random_qkv(1, 40)
    q, _, _ = random_qkv(1, 1)
    log_mass = torch.full((1, 6, 5), -math.inf)
    log_mass[:, :, 1:3] = 0.0
    tail = Tail(
        log_mass=log_mass,
        log_mass_linear=torch.zeros(1, 6, 5),
        radii=torch.ones(2, 5),
        starts=torch.tensor([[0, 10, 20, 30, 0]]).repeat(2, 1),
        sizes=torch.tensor([[10, 10, 10, 10, 0]]).repeat(2, 1),
    )
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.full(shape, draw))
    lse = torch.zeros(1, 6)
    missed = backend.sample_missed(
        q, k[0], tail, lse, scale=SCALE, num_strata=8, generator=torch.Generator()
    )
    recall = recall_of(missed.mean, missed.variance)
    assert bool(((recall > 0.0) & (recall < 1.0)).all())

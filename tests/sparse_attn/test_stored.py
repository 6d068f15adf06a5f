"""Bodies in e4m3 on every backend without plans: exactly what the numbers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attn.api import Backend, find_backend
from sparse_attn.errors import AttentionError, ShapeMismatch
from sparse_attn.select.base import Limit
from sparse_attn.state import Part
from sparse_attn.step import UnitsRead
from sparse_attn.stored import FP8, widen
from tests.sparse_attn.inputs import SCALE, Layer, hold, make_layer
from tests.sparse_attn.rounding import round_layer

LENGTHS = (70, 5, 64, 33)
BACKENDS = ("reference", "torch", "native")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return find_backend(request.param)


@pytest.fixture(scope="module", params=[16, 20], ids=str)
def stored(request: pytest.FixtureRequest) -> tuple[Layer, Tensor, Tensor, Tensor]:
    return round_layer(hold(make_layer(LENGTHS, head_dim=request.param)))


def queries(layer: Layer, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, 6, layer.k.shape[1], generator=generator) * 2.0


def assert_same(ours: Part, theirs: Part) -> None:
    assert torch.equal(ours.out, theirs.out)
    assert torch.equal(ours.lse, theirs.lse)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_everything(
    backend: Backend, stored: tuple[Layer, Tensor, Tensor, Tensor], num_tokens: int
) -> None:
    layer, k, v, scales = stored
    q = queries(layer, num_tokens)
    found, kept = backend.attend_runs(q, k, v, layer.runs, scale=SCALE, keeps=True, scales=scales)
    expected, scores = backend.attend_runs(q, layer.k, layer.v, layer.runs, scale=SCALE, keeps=True)
    assert_same(found, expected)
    assert kept is not None
    assert scores is not None
    assert torch.equal(kept.scores, scores.scores)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_selection_and_what_it_missed(
    backend: Backend, stored: tuple[Layer, Tensor, Tensor, Tensor], num_tokens: int
) -> None:
    layer, k, v, scales = stored
    q = queries(layer, num_tokens)
    found, expected = (
        read(backend, layer, q, rows) for rows in ((k, v, scales), (layer.k, layer.v, None))
    )
    assert_same(found[0].part, expected[0].part)
    assert torch.equal(found[0].lse_read, expected[0].lse_read)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)
    assert float(found[1].min()) > 0


def read(
    backend: Backend, layer: Layer, q: Tensor, rows: tuple[Tensor, Tensor, Tensor | None]
) -> tuple[UnitsRead, Tensor]:
    """A step over the clusters, and the sampled mass that it missed."""
    units, lse_steady = layer.index.clusters, torch.zeros(q.shape[:2])
    scores = backend.score_units(q, units, scale=SCALE)
    total = torch.logaddexp(lse_steady, scores.lse)
    taken = backend.take_units(
        scores, units, total=total, lse_steady=lse_steady, limit=Limit(keys=40)
    )
    k, v, scales = rows
    step = backend.attend_units(
        q, k, v, units, scores, taken, scale=SCALE, is_estimating=True, keeps=True, scales=scales
    )
    missed = backend.sample_missed(
        q,
        k,
        step.tail,
        step.lse_read,
        scale=SCALE,
        num_strata=8,
        generator=torch.Generator().manual_seed(2),
        scales=scales,
    )
    return step, missed.mean


def test_every_number_of_eight_bits_is_widened_exactly(backend: Backend) -> None:
    """One key and value for each finite byte: attention to one key alone gives its value."""
    every = torch.tensor([x for x in range(256) if x & 0x7F != 0x7F], dtype=torch.uint8).view(FP8)
    numbers = widen(every, torch.tensor([[0.5, 2.0**-9]]), 0, 1, torch.float32)
    assert float(numbers.abs().max()) == 448 * 2.0**-9
    assert float(numbers[1]) == 2.0**-18
    layer = hold(make_layer([len(every)], num_kv_heads=1, num_sinks=0, num_window=0))
    values = every.unsqueeze(1).expand(-1, 16).contiguous()
    k = torch.zeros_like(values, dtype=torch.float32).to(FP8)
    scales = torch.tensor([[0.5, 2.0**-9]])
    part, _ = backend.attend_runs(
        torch.zeros(1, 2, 16), k, values, layer.runs, scale=SCALE, keeps=False, scales=scales
    )
    torch.testing.assert_close(part.out[0, 0, 0], numbers.mean(), atol=1e-7, rtol=1e-5)
    ones = torch.full((1, 2, 16), 1.0)
    _, kept = backend.attend_runs(
        ones, values, k, layer.runs, scale=SCALE, keeps=True, scales=scales
    )
    assert kept is not None
    assert torch.equal(kept.scores[0], every.float() * 0.5 * 16 * SCALE)


@pytest.mark.parametrize(
    ("scales", "error", "said"),
    [
        (None, AttentionError, r"keys torch.float8_e4m3fn, scales none; limit scales \[G, 2\]"),
        (torch.ones(2, 3), AttentionError, r"scales \(2, 3\).*limit \[G, 2\]"),
        (torch.ones(2, 2).double(), AttentionError, "torch.float64.*limit"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    backend: Backend,
    stored: tuple[Layer, Tensor, Tensor, Tensor],
    scales: Tensor | None,
    error: type[Exception],
    said: str,
) -> None:
    layer, k, v, _ = stored
    options: dict[str, Any] = {"scale": SCALE, "keeps": False, "scales": scales}
    with pytest.raises(error, match=said):
        backend.attend_runs(queries(layer, 1), k, v, layer.runs, **options)
    options["scales"] = torch.ones(2, 2)
    with pytest.raises(AttentionError, match=r"keys torch\.float32, scales"):
        backend.attend_runs(queries(layer, 1), layer.k, layer.v, layer.runs, **options)


def test_scales_of_another_number_of_heads_are_refused(
    stored: tuple[Layer, Tensor, Tensor, Tensor],
) -> None:
    layer, k, v, scales = stored
    with pytest.raises(ShapeMismatch, match="scales of 1 KV heads; limit 2"):
        find_backend("native").attend_runs(
            queries(layer, 1), k, v, layer.runs, scale=SCALE, keeps=False, scales=scales[:1]
        )

"""The torch backend against the definition, at lengths where indexing goes wrong."""

from __future__ import annotations

import pytest
import torch

from sparse_attn import reference, torch_backend
from sparse_attn.api import BACKENDS, find_backend
from sparse_attn.errors import BackendUnknown
from sparse_attn.state import Part
from tests.sparse_attn.inputs import SCALE, random_qkv

LENGTHS = (1, 63, 65, 255, 257)
GROUPS = ((1, 1), (4, 4), (6, 2), (7, 1), (16, 1))


def assert_same(a: Part, b: Part) -> None:
    torch.testing.assert_close(a.out, b.out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(a.lse, b.lse, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_slots", LENGTHS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPS)
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_attend(num_slots: int, num_heads: int, num_kv_heads: int, num_tokens: int) -> None:
    q, k, v = random_qkv(num_tokens, num_slots, num_heads=num_heads, num_kv_heads=num_kv_heads)
    assert_same(torch_backend.attend(q, k, v, scale=SCALE), reference.attend(q, k, v, scale=SCALE))


def test_attend_with_a_mask_and_a_row_that_sees_nothing() -> None:
    q, k, v = random_qkv(5, 12)
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[2] = False
    ours = torch_backend.attend(q, k, v, scale=SCALE, mask=mask)
    assert_same(ours, reference.attend(q, k, v, scale=SCALE, mask=mask))
    assert torch.equal(ours.out[2], torch.zeros(6, 16))


def test_attend_splits_rows_without_changing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(9, 31)
    mask = torch.tril(torch.ones(9, 31, dtype=torch.bool), diagonal=20)
    whole = torch_backend.attend(q, k, v, scale=SCALE, mask=mask)
    monkeypatch.setattr(torch_backend, "_ROWS_AT_ONCE", 4)
    assert_same(torch_backend.attend(q, k, v, scale=SCALE, mask=mask), whole)


@pytest.mark.parametrize("num_tokens", [1, 5, 8, 65])
def test_attend_causal(num_tokens: int) -> None:
    q, k, v = random_qkv(num_tokens, num_tokens)
    assert_same(
        torch_backend.attend_causal(q, k, v, scale=SCALE),
        reference.attend_causal(q, k, v, scale=SCALE),
    )


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_attend_over_no_key_is_empty(num_tokens: int) -> None:
    q, k, v = random_qkv(num_tokens, 0)
    assert_same(torch_backend.attend(q, k, v, scale=SCALE), reference.attend(q, k, v, scale=SCALE))


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("is_masked", [False, True])
def test_attend_scored(num_tokens: int, is_masked: bool) -> None:
    q, k, v = random_qkv(num_tokens, 33, num_heads=3, num_kv_heads=1)
    visible = None
    if is_masked:
        visible = torch.rand(num_tokens, 33, generator=torch.Generator().manual_seed(2)) < 0.6
        visible[0] = False
    part, scores = torch_backend.attend_scored(q, k[0], v[0], visible=visible, scale=SCALE)
    assert_same(part, reference.attend(q, k, v, scale=SCALE, mask=visible))
    expected = reference.score_keys(q, k[0], scale=SCALE)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    _, own = reference.attend_scored(q, k[0], v[0], visible=visible, scale=SCALE)
    torch.testing.assert_close(own, expected, atol=0, rtol=0)


def test_score_keys() -> None:
    q, k, _ = random_qkv(3, 33, num_heads=3, num_kv_heads=1)
    ours = torch_backend.score_keys(q, k[0], scale=SCALE)
    expected = torch.einsum("thd,sd->ths", q, k[0]) * SCALE
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(reference.score_keys(q, k[0], scale=SCALE), expected)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_score_units(num_tokens: int) -> None:
    q, centroids, _ = random_qkv(num_tokens, 21, num_heads=3, num_kv_heads=1, spread=3.0)
    variances = torch.rand(21, 16, generator=torch.Generator().manual_seed(5)) * 2
    sizes = torch.arange(21)
    log_sizes = torch.log(sizes.float())
    critical = (2 * log_sizes.clamp(min=0.0)).sqrt()
    units = (centroids[0].half(), variances.half(), log_sizes, critical)
    for ours, expected in zip(
        torch_backend.score_units(q, *units, scale=SCALE),
        reference.score_units(q, *units, scale=SCALE),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_attend_estimated_with_a_row_without_units() -> None:
    generator = torch.Generator().manual_seed(3)
    log_mass = torch.randn(2, 3, 9, generator=generator)
    log_mass[0, 0] = -torch.inf
    value_sums = torch.randn(9, 16, generator=generator)
    sizes = torch.arange(1, 10)
    assert_same(
        torch_backend.attend_estimated(log_mass, value_sums, sizes),
        reference.attend_estimated(log_mass, value_sums, sizes),
    )
    assert torch.equal(
        torch_backend.log_sum_exp(log_mass)[0, 0], reference.log_sum_exp(log_mass)[0, 0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 5])
def test_gather_rows(dtype: torch.dtype, head_dim: int) -> None:
    x = torch.randn(9, head_dim, generator=torch.Generator().manual_seed(4)).to(dtype)
    rows = torch.tensor([8, 0, 3, 3])
    assert torch.equal(torch_backend.gather_rows(x, rows), x[rows])
    assert torch.equal(reference.gather_rows(x, rows), x[rows])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_split(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    """A piece of the columns has the bits that it has wherever it lies, at widths of every kind."""
    backend = find_backend(name)
    generator = torch.Generator().manual_seed(6)
    for width in (16, 50, 576):
        x = torch.randn(num_tokens, width, generator=generator).to(dtype)
        weight = torch.randn(61, width, generator=generator).to(dtype)
        bias = torch.randn(61, generator=generator).to(dtype)
        bounds = (0, 7, 7, 24, 37, 61)
        whole = backend.linear_split(x, weight, bias, bounds)
        exact = x.double() @ weight.double().T + bias.double()
        tolerance = 1e-4 if dtype == torch.float32 else 0.3
        torch.testing.assert_close(whole.double(), exact, atol=tolerance, rtol=2e-2)
        for first, last in ((0, 1), (1, 3), (2, 5), (3, 4), (1, 2)):
            start, stop = bounds[first], bounds[last]
            own = tuple(bound - start for bound in bounds[first : last + 1])
            rows = slice(start, stop)
            alone = backend.linear_split(x, weight[rows].clone(), bias[rows], own)
            assert torch.equal(alone, whole[:, rows])
    assert backend.linear_split(x, weight[:0], None, (0,)).shape == (num_tokens, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_close(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in random_qkv(4, 65))
    ours = torch_backend.attend(q, k, v, scale=SCALE)
    expected = reference.attend(q, k, v, scale=SCALE)
    torch.testing.assert_close(ours.out, expected.out, atol=2e-2, rtol=0)
    assert ours.out.dtype == ours.lse.dtype == torch.float32


def test_query_heads_share_kv_heads_in_runs() -> None:
    """Head h belongs to KV head h // (H // G): the map that a public selector got wrong."""
    q, k, v = random_qkv(1, 5, num_heads=4, num_kv_heads=2)
    part = torch_backend.attend(q, k, v, scale=SCALE)
    for head, kv_head in enumerate((0, 0, 1, 1)):
        alone = torch_backend.attend(
            q[:, head : head + 1], k[kv_head : kv_head + 1], v[kv_head : kv_head + 1], scale=SCALE
        )
        torch.testing.assert_close(part.out[:, head], alone.out[:, 0])


def test_backends_are_found_by_name_and_never_substituted() -> None:
    assert BACKENDS == ("reference", "torch", "native", "triton")
    with pytest.raises(BackendUnknown, match=r"cuda.*reference, torch, native, triton"):
        find_backend("cuda")


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnknown, match="'triton' found no GPU"):
        find_backend("triton")

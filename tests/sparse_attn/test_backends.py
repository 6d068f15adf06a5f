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
    part, shares = torch_backend.attend_shared(q, k, v, scale=SCALE)
    assert_same(part, reference.attend(q, k, v, scale=SCALE))
    assert shares.shape == (num_tokens, 6, 0)
    assert_same(torch_backend.attend(q, k, v, scale=SCALE), reference.attend(q, k, v, scale=SCALE))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_attend_shared(num_tokens: int) -> None:
    q, k, v = random_qkv(num_tokens, 33)
    part, shares = torch_backend.attend_shared(q, k, v, scale=SCALE)
    expected, expected_shares = reference.attend_shared(q, k, v, scale=SCALE)
    assert_same(part, expected)
    torch.testing.assert_close(shares, expected_shares, atol=1e-5, rtol=0)


def test_key_mass_is_each_key_of_the_whole() -> None:
    q, k, v = random_qkv(3, 33)
    whole = reference.attend(q, k, v, scale=SCALE)
    ours = torch_backend.key_mass(q, k[:, :20], whole.lse, scale=SCALE)
    expected = reference.key_mass(q, k[:, :20], whole.lse, scale=SCALE)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    rest = torch_backend.key_mass(q, k[:, 20:], whole.lse, scale=SCALE)
    torch.testing.assert_close(ours.sum(dim=-1) + rest.sum(dim=-1), torch.ones(3, 6))


@pytest.mark.parametrize("is_masked", [False, True])
def test_attend_slots_with_padding_and_an_empty_head(is_masked: bool) -> None:
    q, k, v = random_qkv(3, 40)
    # A slice of a larger buffer, as resident KV is: gathering must honour its strides.
    k, v = (torch.cat([x, x], dim=1)[:, :40] for x in (k, v))
    slots = torch.tensor([[3, 0, 39, 7, -1], [-1, -1, -1, -1, -1]])
    visible = None
    if is_masked:
        visible = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(2)) < 0.6
        visible[0, 1] = False
    part, shares = torch_backend.attend_slots(q, k, v, slots, visible=visible, scale=SCALE)
    expected, expected_shares = reference.attend_slots(q, k, v, slots, visible=visible, scale=SCALE)
    assert_same(part, expected)
    torch.testing.assert_close(shares, expected_shares, atol=1e-5, rtol=0)


def test_attend_estimated_with_a_row_without_units() -> None:
    generator = torch.Generator().manual_seed(3)
    log_mass = torch.randn(2, 6, 9, generator=generator)
    log_mass[0, 0] = -torch.inf
    value_sums = torch.randn(2, 9, 16, generator=generator)
    sizes = torch.arange(1, 19).view(2, 9)
    assert_same(
        torch_backend.attend_estimated(log_mass, value_sums, sizes),
        reference.attend_estimated(log_mass, value_sums, sizes),
    )


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
    assert BACKENDS == ("reference", "torch", "native")
    with pytest.raises(BackendUnknown, match=r"triton.*reference, torch, native"):
        find_backend("triton")

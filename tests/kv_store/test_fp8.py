"""Keys and values in one byte: what a number becomes, and a document of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kv_store import Holding, ResidentDocument, Store, fp8, load_resident
from tests.kv_store.tiny import NAME, Input, ingest, make_input

KV_DTYPE = "float8_e4m3fn"


@given(
    greatest=st.floats(1e-6, 1e6),
    share=st.floats(2.0**-9, 28.0),
    sign=st.sampled_from([-1.0, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_number_keeps_four_bits(
    greatest: float, share: float, sign: float, dtype: torch.dtype
) -> None:
    scales = fp8.choose_scales(torch.tensor([greatest]))
    mantissa, _ = math.frexp(float(scales))
    assert mantissa == 0.5  # a power of two
    x = torch.tensor([[[sign * share * greatest]]]).to(dtype)
    wide = fp8.widen(fp8.narrow(x, scales), scales, dtype)
    assert float((wide - x).abs()) <= 2.0**-4 * float(x.abs())
    assert torch.equal(fp8.widen(fp8.narrow(wide, scales), scales, dtype), wide)
    assert torch.equal(fp8.widen(fp8.narrow(x, scales), scales, torch.float32), wide.float())


def test_scales_leave_room_for_what_comes_later() -> None:
    greatest = torch.tensor([1.0, 1.5, 1.99, 3e-20, 0.0, math.inf, math.nan])
    scales = fp8.choose_scales(greatest)
    stored = greatest[:4] / scales[:4]
    assert bool((stored >= 8).all())
    assert bool((stored < 16).all())
    assert scales[4:].tolist() == [1.0, 1.0, 1.0]
    largest = 28.0 * greatest[:4, None, None]
    assert torch.equal(
        fp8.narrow(largest, scales[:4]).float()[:2, 0, 0], torch.tensor([224.0, 320.0])
    )
    assert fp8.narrow(torch.full((1, 1, 1), 1e9), torch.ones(1)).item() == 448.0
    assert fp8.greatest_of(torch.zeros(3, 0, 4)).tolist() == [0.0] * 3
    assert math.isnan(float(fp8.greatest_of(torch.tensor([[1.0, math.nan]]))))


def stored_heads(source: Input) -> list[list[dict[str, Tensor]]]:
    """Segments of the input, with the scales of a head the same in all of them."""
    segments = [source.segment(s) for s in range(source.layout.num_segments)]
    for heads in segments:
        for g, head in enumerate(heads):
            head["scales"] = torch.tensor([[0.5, 2.0], [0.25, 4.0]]) * 2.0**g
    return segments


def write(store: Store, source: Input) -> list[list[dict[str, Tensor]]]:
    segments = stored_heads(source)
    with source.begin(store) as writer:
        for segment_idx, heads in enumerate(segments):
            writer.append_segment(segment_idx, heads)
        writer.finish()
    return segments


@pytest.mark.parametrize("num_sliding", [0, 1])
@pytest.mark.parametrize("num_tokens", [20, 17, 9])
def test_a_document_is_loaded_as_it_was_written(
    tmp_path: Path, num_tokens: int, num_sliding: int
) -> None:
    source = make_input(num_tokens, kv_dtype=KV_DTYPE, num_sliding_layers=num_sliding)
    layout, store = source.layout, Store(tmp_path)
    segments = write(store, source)
    assert store.verify(NAME) == []
    by_segment = ResidentDocument(Holding.whole(layout), dtype=torch.bfloat16, device="cpu")
    for segment_idx, heads in enumerate(segments):
        by_segment.append(segment_idx, dict(enumerate(heads)))
    with store.open(NAME) as document:
        loaded = load_resident(document, dtype=torch.bfloat16, device="cpu")
        assert document.read_segment(0)[1]["k"].dtype == fp8.DTYPE
    for resident in (loaded, by_segment):
        assert_holds(resident, source, segments)


def assert_holds(
    resident: ResidentDocument, source: Input, segments: list[list[dict[str, Tensor]]]
) -> None:
    layout = source.layout
    for g in range(layout.num_kv_heads):
        scales = segments[0][g]["scales"]
        assert torch.equal(torch.stack([x[g] for x in resident.scales if x is not None]), scales)
        for i, name in enumerate(("k", "v")):
            stored = torch.cat([heads[g][name] for heads in segments], dim=1)
            first, last = resident.holding.head_bounds[g : g + 2]
            held = torch.stack(getattr(resident, name))[:, first:last]
            assert torch.equal(held.view(torch.uint8), stored.view(torch.uint8))
            wanted = stored.to(torch.bfloat16) * scales[:, i, None, None].to(torch.bfloat16)
            steady = torch.cat([heads[g][f"steady_{name}"] for heads in segments], dim=1)
            steady = steady.to(torch.bfloat16)
            places = [*range(layout.sinks), *range(layout.num_tokens - layout.window, last - first)]
            wanted[:, places] = steady
            for layer in range(layout.num_full_layers):
                wide = resident.wide_head(name, layer, g, last - first)
                assert torch.equal(wide, wanted[layer])
            own = [resident.steady_rows(name, s, g) for s in range(layout.num_segments)]
            assert torch.equal(torch.cat(own, dim=1), steady)
    if layout.num_sliding_layers:
        assert resident.sliding_k[0].dtype == torch.bfloat16


def test_a_body_takes_one_byte_a_number() -> None:
    wide, narrow = (
        ResidentDocument(
            Holding.whole(make_input(4000, segment_tokens=512, kv_dtype=of).layout),
            dtype=torch.bfloat16,
            device="cpu",
        )
        for of in ("bfloat16", KV_DTYPE)
    )
    positions = sum(x.nbytes for x in wide.positions)
    assert narrow.slot_dtype == fp8.DTYPE
    assert wide.scales == [None, None]
    scales = sum(x.nbytes for x in narrow.scales if x is not None)
    assert 2 * (narrow.num_bytes - positions - scales) == wide.num_bytes - positions


def test_files_of_another_number_format_do_not_fit(tmp_path: Path) -> None:
    source = make_input(20, kv_dtype=KV_DTYPE)
    heads = stored_heads(source)[0]
    described = {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in heads[0].items()}
    assert source.layout.find_misfit(0, described) is None
    for name, wrong in (
        ("k", ("bfloat16", described["k"][1])),
        ("steady_k", ("float32", (2, 1, 4))),
        ("scales", ("float32", (2, 1))),
    ):
        said = source.layout.find_misfit(0, {**described, name: wrong})
        assert said is not None
        assert said.startswith(f"tensor {name} is")
    assert ingest(Store(tmp_path), make_input(20)) != ""
    del described["scales"]
    assert "scales is absent" in str(source.layout.find_misfit(0, described))

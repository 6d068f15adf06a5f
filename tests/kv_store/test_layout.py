"""Segment spans, the steady zone, and which tensors fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kv_store.tiny import make_input, params


@given(num_tokens=st.integers(1, 60), segment_tokens=st.integers(1, 20))
def test_segments_partition_the_document(num_tokens: int, segment_tokens: int) -> None:
    layout = params(segment_tokens=segment_tokens).layout(num_tokens=num_tokens)
    spans = [layout.segment_span(s) for s in range(layout.num_segments)]
    assert [t for start, end in spans for t in range(start, end)] == list(range(num_tokens))


@given(
    num_tokens=st.integers(1, 60),
    segment_tokens=st.integers(1, 20),
    sinks=st.integers(0, 6),
    window=st.integers(0, 30),
)
def test_clustered_spans_leave_the_steady_zone_out(
    num_tokens: int, segment_tokens: int, sinks: int, window: int
) -> None:
    layout = params(segment_tokens=segment_tokens, sinks=sinks, window=window).layout(
        num_tokens=num_tokens
    )
    clustered: list[int] = []
    for segment_idx in range(layout.num_segments):
        start = layout.segment_span(segment_idx)[0]
        first, last = layout.clustered_span(segment_idx)
        clustered += range(start + first, start + last)
    assert clustered == [t for t in range(num_tokens) if sinks <= t < num_tokens - window]


def test_bytes_are_those_of_the_tensors() -> None:
    source = make_input(20, kv_dtype="bfloat16")
    stored = sum(
        tensor.nbytes
        for segment_idx in range(3)
        for head in source.segment(segment_idx)
        for name, tensor in head.items()
        if name in ("k", "v", "positions")
    )
    assert source.layout.kv_bytes == stored


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"segment_tokens": 0}, "below its limit"), ({"kv_dtype": "int3"}, "limit float32, bfloat16")],
)
def test_impossible_layouts(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        params(**changes).layout(num_tokens=5)

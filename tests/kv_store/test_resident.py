"""What is resident is what was appended, by segments or from disk, for any number of clusters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kv_store import (
    CLUSTER_TENSORS,
    ClusterTables,
    InvalidSegment,
    ResidentDocument,
    Store,
    load_resident,
)
from kv_store.host import empty_host, zeros_host
from tests.kv_store.tiny import NAME, Input, ingest, make_input

FIELDS = [name.removeprefix("cluster_") for name in CLUSTER_TENSORS]


def resident_by_segments(given_input: Input, dtype: torch.dtype) -> ResidentDocument:
    resident = ResidentDocument.for_layout(given_input.layout, dtype=dtype, device="cpu")
    for segment_idx in range(given_input.layout.num_segments):
        resident.append(given_input.segment(segment_idx))
    resident.freeze()
    return resident


def assert_same(ours: ResidentDocument, theirs: ResidentDocument) -> None:
    for left, right in (
        (ours.k, theirs.k),
        (ours.v, theirs.v),
        (ours.positions, theirs.positions),
        (ours.sliding_k, theirs.sliding_k),
        (ours.sliding_v, theirs.sliding_v),
    ):
        assert len(left) == len(right)
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert ours.sliding_start == theirs.sliding_start
    assert len(ours.clusters) == len(theirs.clusters)
    for a, b in zip(ours.clusters, theirs.clusters, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


@given(
    num_tokens=st.integers(3, 30),
    segment_tokens=st.integers(1, 12),
    sliding=st.tuples(st.integers(0, 2), st.integers(1, 20)),
    kv_dtype=st.sampled_from(["float32", "bfloat16"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    has_clusters=st.booleans(),
)
def test_from_disk_equals_by_segments(
    num_tokens: int,
    segment_tokens: int,
    sliding: tuple[int, int],
    kv_dtype: str,
    dtype: torch.dtype,
    has_clusters: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    source = make_input(
        num_tokens,
        segment_tokens=segment_tokens,
        num_sliding_layers=sliding[0],
        sliding_window=sliding[1],
        kv_dtype=kv_dtype,
        has_clusters=has_clusters,
    )
    store = Store(tmp_path_factory.mktemp("store"))
    ingest(store, source)
    with store.open(NAME) as document:
        loaded = load_resident(document, dtype=dtype, device="cpu")
        stored = [document.read_segment(s) for s in range(source.layout.num_segments)]
    assert_same(loaded, resident_by_segments(source, dtype))
    assert_is_what_was_appended(loaded, source, dtype)
    for segment_idx, heads in enumerate(stored):
        for ours, theirs in zip(heads, source.segment(segment_idx), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_is_what_was_appended(
    resident: ResidentDocument, source: Input, dtype: torch.dtype
) -> None:
    """Against plain concatenation over segments."""
    layout = source.layout
    segments = [source.segment(s) for s in range(layout.num_segments)]
    for g in range(layout.num_kv_heads):
        for name, layers in (("k", resident.k), ("v", resident.v)):
            whole = torch.cat([heads[g][name] for heads in segments], dim=1).to(dtype)
            assert all(torch.equal(layers[i][g], whole[i]) for i in range(len(layers)))
        positions = torch.cat([heads[g]["positions"] for heads in segments], dim=1)
        assert torch.equal(torch.stack(resident.positions)[:, g], positions)
    width = min(layout.num_tokens, layout.sliding_window)
    for i, tail in enumerate(resident.sliding_k):
        whole = torch.cat([torch.stack([h["sliding_k"][i] for h in s]) for s in segments], dim=1)
        assert torch.equal(tail, whole[:, whole.shape[1] - width :].to(dtype))
        assert resident.sliding_start == layout.num_tokens - width


def column(table: Tensor, g: int, sizes: Tensor) -> Tensor:
    return table[g][sizes[g] > 0]


def test_clusters_keep_their_order_and_number_their_slots_globally() -> None:
    source = make_input()
    tables = resident_by_segments(source, torch.float32).clusters
    layout = source.layout
    segments = [source.segment(s) for s in range(layout.num_segments)]
    assert len(tables) == layout.num_full_layers
    for i, table in enumerate(tables):
        assert table.sizes.shape == (2, sum(2 + s for s in range(3)))
        for g in range(layout.num_kv_heads):
            starts = [h[g]["cluster_starts"][i] + 8 * s for s, h in enumerate(segments)]
            assert torch.equal(column(table.starts, g, table.sizes), torch.cat(starts).long())
            for name in ("centroids", "value_sums", "variances", "radii"):
                wanted = torch.cat([h[g][name][i] for h in segments])
                assert torch.equal(column(getattr(table, name), g, table.sizes), wanted)


def test_groups_point_at_the_columns_of_their_clusters() -> None:
    source = make_input()
    resident = ResidentDocument.for_layout(source.layout, dtype=torch.float32, device="cpu")
    first_columns = []
    for segment_idx in range(source.layout.num_segments):
        heads = source.segment(segment_idx)
        for head in heads:
            head["group_starts"].zero_()
        first_columns.append(sum(2 + s for s in range(segment_idx)))
        resident.append(heads)
    resident.freeze()
    table = resident.clusters[0]
    for g in range(source.layout.num_kv_heads):
        wanted = [first for first in first_columns for _ in range(1 + g)]
        assert column(table.group_starts, g, table.group_counts).tolist() == wanted


def test_padding_is_not_stored_and_not_resident(tmp_path: Path) -> None:
    source = make_input()
    store = Store(tmp_path)
    with source.begin(store) as writer:
        for segment_idx in range(3):
            heads = [pad_columns(head) for head in source.segment(segment_idx)]
            writer.append_segment(segment_idx, heads)
        writer.finish()
    with store.open(NAME) as document:
        assert document.read_segment(0)[0]["cluster_sizes"].shape == (2, 1)
        loaded = load_resident(document, dtype=torch.float32, device="cpu")
    assert_same(loaded, resident_by_segments(source, torch.float32))


def pad_columns(head: dict[str, Tensor]) -> dict[str, Tensor]:
    padded = dict(head)
    for name in CLUSTER_TENSORS:
        tensor = head[name]
        padded[name] = torch.cat([tensor, torch.zeros_like(tensor[:, :1])], dim=1)
    return padded


def test_a_document_without_slots_for_clusters_has_empty_tables() -> None:
    source = make_input(4)
    resident = ResidentDocument.for_layout(source.layout, dtype=torch.float32, device="cpu")
    heads = [
        {n: t[:, :0] if n in CLUSTER_TENSORS else t for n, t in head.items()}
        for head in source.segment(0)
    ]
    resident.append(heads)
    resident.freeze()
    table: ClusterTables = resident.clusters[1]
    assert table.sizes.shape == (2, 0)
    assert table.centroids.shape == (2, 0, 4)


def test_appending_more_than_there_is_room_for() -> None:
    source = make_input(8)
    resident = ResidentDocument.for_layout(source.layout, dtype=torch.float32, device="cpu")
    with pytest.raises(InvalidSegment, match="0 tokens resident, wanted 8"):
        resident.freeze()
    resident.append(source.segment(0))
    assert resident.num_sealed == 8
    with pytest.raises(InvalidSegment, match="up to token 16; limit 2 and 8"):
        resident.append(source.segment(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_host_buffers(dtype: torch.dtype) -> None:
    shape = (3, 5, (4 << 20) // dtype.itemsize + 1)
    buffer = empty_host(shape, dtype)
    assert buffer.shape == shape
    assert buffer.is_contiguous()
    assert buffer.data_ptr() % (2 << 20) == 0
    assert not zeros_host(shape, dtype).any()
    kept = buffer[2]
    del buffer
    assert kept.fill_(1).eq(1).all()


@pytest.mark.gpu
def test_on_an_accelerator_as_on_the_host(tmp_path: Path) -> None:
    source = make_input()
    ingest(Store(tmp_path), source)
    with Store(tmp_path).open(NAME) as document:
        host = load_resident(document, dtype=torch.bfloat16, device="cpu")
        there = load_resident(document, dtype=torch.bfloat16, device="cuda")
    for name in ("k", "v", "positions", "sliding_k"):
        for ours, theirs in zip(getattr(host, name), getattr(there, name), strict=True):
            assert theirs.is_cuda
            assert torch.equal(ours, theirs.cpu())
    for a, b in zip(host.clusters, there.clusters, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name).cpu()) for name in FIELDS)

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
    Holding,
    InvalidSegment,
    ResidentDocument,
    Store,
    load_resident,
)
from kv_store.host import empty_host, zeros_host
from tests.kv_store.tiny import NAME, Input, ingest, make_input

FIELDS = [name.removeprefix("cluster_") for name in CLUSTER_TENSORS]


def resident_by_segments(
    given_input: Input, dtype: torch.dtype, holding: Holding | None = None
) -> ResidentDocument:
    whole = Holding.whole(given_input.layout)
    resident = ResidentDocument(holding or whole, dtype=dtype, device="cpu")
    for segment_idx in range(given_input.layout.num_segments):
        resident.append(segment_idx, dict(enumerate(given_input.segment(segment_idx))))
    resident.freeze()
    return resident


def assert_same(ours: ResidentDocument, theirs: ResidentDocument) -> None:
    for left, right in (
        (ours.k, theirs.k),
        (ours.v, theirs.v),
        (ours.positions, theirs.positions),
    ):
        assert len(left) == len(right)
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert_same_tails(ours, theirs)
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


def assert_same_tails(ours: ResidentDocument, theirs: ResidentDocument) -> None:
    for left, right in ((ours.sliding_k, theirs.sliding_k), (ours.sliding_v, theirs.sliding_v)):
        assert len(left) == len(right)
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert ours.sliding_start == theirs.sliding_start


def assert_is_what_was_appended(
    resident: ResidentDocument, source: Input, dtype: torch.dtype
) -> None:
    """Against plain concatenation over segments."""
    layout = source.layout
    segments = [source.segment(s) for s in range(layout.num_segments)]
    for g in range(layout.num_kv_heads):
        own = slice(*resident.holding.head_bounds[g : g + 2])
        for name, layers in (("k", resident.k), ("v", resident.v)):
            whole = torch.cat([heads[g][name] for heads in segments], dim=1).to(dtype)
            assert all(torch.equal(layers[i][own], whole[i]) for i in range(len(layers)))
        positions = torch.cat([heads[g]["positions"] for heads in segments], dim=1)
        assert torch.equal(torch.stack(resident.positions)[:, own], positions)
    width = min(layout.num_tokens, layout.sliding_window)
    for i, tail in enumerate(resident.sliding_k):
        whole = torch.cat([torch.stack([h["sliding_k"][i] for h in s]) for s in segments], dim=1)
        assert torch.equal(tail, whole[:, whole.shape[1] - width :].to(dtype))
        assert resident.sliding_start == layout.num_tokens - width


def test_clusters_keep_their_order_and_number_their_slots_globally() -> None:
    source = make_input()
    tables = resident_by_segments(source, torch.float32).clusters
    layout = source.layout
    segments = [source.segment(s) for s in range(layout.num_segments)]
    assert len(tables) == layout.num_full_layers
    for i, table in enumerate(tables):
        assert table.columns == ((0, 1, 3, 6), (0, 2, 5, 9))
        assert table.sizes.shape == (2, 9)
        for g in range(layout.num_kv_heads):
            width = table.columns[g][-1]
            first = g * layout.num_tokens
            starts = [first + h[g]["cluster_starts"][i] + 8 * s for s, h in enumerate(segments)]
            assert torch.equal(table.starts[g, :width], torch.cat(starts).long())
            assert not table.sizes[g, width:].any()
            for name in ("centroids", "value_sums", "variances", "radii"):
                wanted = torch.cat([h[g][name][i] for h in segments])
                assert torch.equal(getattr(table, name)[g, :width], wanted)


def test_groups_point_at_the_columns_of_their_clusters() -> None:
    source = make_input()
    resident = ResidentDocument(Holding.whole(source.layout), dtype=torch.float32, device="cpu")
    for segment_idx in range(source.layout.num_segments):
        heads = source.segment(segment_idx)
        for head in heads:
            head["group_starts"].zero_()
        resident.append(segment_idx, dict(enumerate(heads)))
    resident.freeze()
    table = resident.clusters[0]
    for g in range(source.layout.num_kv_heads):
        wanted = [first for first in table.columns[g][:-1] for _ in range(1 + g)]
        assert table.group_starts[g, : len(wanted)].tolist() == wanted


SHARDS = [((0, 2), (1,)), ((2, 1, 0), ()), ((), (2, 0))]


@pytest.mark.parametrize("segments", SHARDS)
@pytest.mark.parametrize("from_disk", [False, True])
def test_a_shard_holds_its_segments_in_its_order(
    segments: tuple[tuple[int, ...], ...], from_disk: bool, tmp_path: Path
) -> None:
    source = make_input()
    layout = source.layout
    holding = Holding(layout=layout, first_kv_head=0, segments=segments)
    if from_disk:
        ingest(Store(tmp_path), source)
        with Store(tmp_path).open(NAME) as document:
            shard = load_resident(document, dtype=torch.float32, device="cpu", holding=holding)
    else:
        shard = resident_by_segments(source, torch.float32, holding)
    whole = resident_by_segments(source, torch.float32)
    assert_same_tails(shard, whole)
    assert (
        holding.num_slots
        == shard.k[0].shape[0]
        == sum(20 - 8 * 2 if s == 2 else 8 for held in segments for s in held)
    )
    for g, held in enumerate(segments):
        for place, s in enumerate(held):
            for name in ("k", "v", "positions"):
                assert torch.equal(shard.slots(name, s, g), whole.slots(name, s, g))
            first = shard.clusters[0].columns[g][place]
            there = whole.clusters[0].columns[g][s]
            width = whole.clusters[0].columns[g][s + 1] - there
            offset = holding.slots_of(s, g)[0] - whole.holding.slots_of(s, g)[0]
            for ours, theirs in zip(shard.clusters, whole.clusters, strict=True):
                starts = ours.starts[g, first : first + width]
                assert torch.equal(starts, theirs.starts[g, there : there + width] + offset)
                own = ours.centroids[g, first : first + width]
                assert torch.equal(own, theirs.centroids[g, there : there + width])


def test_a_shard_of_one_kv_head_knows_no_other() -> None:
    source = make_input()
    holding = Holding(layout=source.layout, first_kv_head=1, segments=((0, 1, 2),))
    shard, whole = (resident_by_segments(source, torch.float32, held) for held in (holding, None))
    for ours, theirs in zip(shard.k, whole.k, strict=True):
        assert torch.equal(ours, theirs[source.layout.num_tokens :])
    for ours, theirs in zip(shard.sliding_k, whole.sliding_k, strict=True):
        assert torch.equal(ours, theirs[1:])
    with pytest.raises(ValueError, match="KV heads 1 to 3"):
        Holding(layout=source.layout, first_kv_head=1, segments=((), ()))


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
    resident = ResidentDocument(Holding.whole(source.layout), dtype=torch.float32, device="cpu")
    heads = [
        {n: t[:, :0] if n in CLUSTER_TENSORS else t for n, t in head.items()}
        for head in source.segment(0)
    ]
    resident.append(0, dict(enumerate(heads)))
    resident.freeze()
    table: ClusterTables = resident.clusters[1]
    assert table.sizes.shape == (2, 0)
    assert table.centroids.shape == (2, 0, 4)


def test_appending_more_than_there_is_room_for() -> None:
    source = make_input(8)
    resident = ResidentDocument(Holding.whole(source.layout), dtype=torch.float32, device="cpu")
    with pytest.raises(InvalidSegment, match="0 tokens resident, wanted 8"):
        resident.freeze()
    heads = dict(enumerate(source.segment(0)))
    with pytest.raises(InvalidSegment, match=r"KV heads \[0\]; limit all of \[0, 1\]"):
        resident.append(0, {0: heads[0]})
    resident.append(0, heads)
    assert resident.num_sealed == 8
    with pytest.raises(InvalidSegment, match="segment 0 after 8 of 8 tokens"):
        resident.append(0, heads)


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

"""The rank grid is a partition of whatever is dealt out over it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives import (
    NUM_VIRTUAL_SHARDS,
    Mesh,
    MeshInvalid,
    context_owner,
    parse_mesh,
    split_evenly,
    virtual_shard,
)

axes = st.integers(min_value=1, max_value=12)
meshes = st.builds(lambda heads, context: Mesh(heads=heads, context=context), axes, axes)


@given(meshes)
def test_text_and_mesh_are_inverse(mesh: Mesh) -> None:
    assert parse_mesh(str(mesh)) == mesh


def test_auto_is_one_rank() -> None:
    assert parse_mesh("auto") == Mesh(heads=1, context=1)


@pytest.mark.parametrize(
    "text", ["", "1", "x", "0x1", "1x0", "1x-1", "1 x 1", "1X1", "1x1x1", "01x1", "AUTO", "٣x1"]
)
def test_malformed_text_is_refused_by_value(text: str) -> None:
    with pytest.raises(MeshInvalid) as caught:
        parse_mesh(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("heads", "context"), [(0, 1), (1, 0), (-1, 2)])
def test_empty_axes_are_refused(heads: int, context: int) -> None:
    with pytest.raises(MeshInvalid):
        Mesh(heads=heads, context=context)


@given(meshes)
def test_coordinates_and_ranks_are_inverse(mesh: Mesh) -> None:
    places = [mesh.coordinates_of(rank) for rank in range(mesh.num_ranks)]
    assert len(set(places)) == mesh.num_ranks
    ranks = [mesh.rank_of(head_idx=p.head_idx, context_idx=p.context_idx) for p in places]
    assert ranks == list(range(mesh.num_ranks))


@given(meshes)
def test_context_ranks_partition_the_grid(mesh: Mesh) -> None:
    groups = [list(ranks) for ranks in mesh.context_groups]
    assert groups == [list(mesh.context_ranks(head_idx)) for head_idx in range(mesh.heads)]
    assert [rank for group in groups for rank in group] == list(range(mesh.num_ranks))
    for head_idx, group in enumerate(groups):
        assert {mesh.coordinates_of(rank).head_idx for rank in group} == {head_idx}


@given(meshes, st.integers(min_value=0, max_value=200))
def test_places_outside_the_grid_are_refused(mesh: Mesh, beyond: int) -> None:
    with pytest.raises(MeshInvalid):
        mesh.coordinates_of(mesh.num_ranks + beyond)
    with pytest.raises(MeshInvalid):
        mesh.coordinates_of(-1 - beyond)
    with pytest.raises(MeshInvalid):
        mesh.rank_of(head_idx=0, context_idx=mesh.context + beyond)


@given(axes, st.integers(min_value=1, max_value=64))
def test_heads_must_divide_the_kv_heads(heads: int, num_kv_heads: int) -> None:
    mesh = Mesh(heads=heads, context=2)
    if num_kv_heads % heads:
        with pytest.raises(MeshInvalid, match=f"{num_kv_heads} KV heads"):
            mesh.check_kv_heads(num_kv_heads)
    else:
        mesh.check_kv_heads(num_kv_heads)


@given(meshes, st.integers(min_value=1, max_value=4), st.integers(min_value=1, max_value=9))
def test_every_query_head_has_one_owner(mesh: Mesh, per_group: int, group_size: int) -> None:
    num_kv_heads = mesh.heads * per_group
    num_heads = num_kv_heads * group_size
    owned = [
        mesh.query_heads_of(rank, num_heads=num_heads, num_kv_heads=num_kv_heads)
        for rank in range(mesh.num_ranks)
    ]
    assert [head for run in owned for head in run] == list(range(num_heads))
    for rank, run in enumerate(owned):
        kv_heads = mesh.kv_heads_of(rank, num_kv_heads=num_kv_heads)
        assert all(head // group_size in kv_heads for head in run)
    sizes = [len(run) for run in owned]
    assert max(sizes) - min(sizes) <= 1


def test_query_heads_must_be_a_multiple_of_the_kv_heads() -> None:
    with pytest.raises(MeshInvalid, match="7 query heads"):
        Mesh(heads=1, context=2).query_heads_of(0, num_heads=7, num_kv_heads=2)


@given(meshes, st.integers(min_value=1, max_value=4), st.integers(min_value=0, max_value=40))
def test_owner_follows_the_virtual_shard(mesh: Mesh, per_group: int, segment_idx: int) -> None:
    num_kv_heads = mesh.heads * per_group
    for kv_head_idx in range(num_kv_heads):
        owner = mesh.owner_of(
            segment_idx=segment_idx, kv_head_idx=kv_head_idx, num_kv_heads=num_kv_heads
        )
        place = mesh.coordinates_of(owner)
        assert kv_head_idx in mesh.kv_heads_of(owner, num_kv_heads=num_kv_heads)
        assert place.context_idx == ((segment_idx + kv_head_idx) % 8) % mesh.context


@given(st.integers(min_value=0, max_value=40), st.integers(min_value=0, max_value=40))
def test_eight_consecutive_segments_fill_every_shard(segment_idx: int, kv_head_idx: int) -> None:
    shards = {
        virtual_shard(segment_idx=segment_idx + step, kv_head_idx=kv_head_idx)
        for step in range(NUM_VIRTUAL_SHARDS)
    }
    assert shards == set(range(NUM_VIRTUAL_SHARDS))


@given(st.integers(min_value=0, max_value=7), st.sampled_from([1, 2, 4, 8]))
def test_halving_the_context_joins_shards_that_share_low_bits(shard: int, context: int) -> None:
    twin = shard ^ (NUM_VIRTUAL_SHARDS // 2)
    owners = {context_owner(shard, num_context=context), context_owner(twin, num_context=context)}
    assert len(owners) == (2 if context == NUM_VIRTUAL_SHARDS else 1)


@given(st.integers(min_value=0, max_value=500), st.integers(min_value=1, max_value=40))
def test_even_splits_cover_everything_once(total: int, parts: int) -> None:
    runs = split_evenly(total, parts)
    assert [idx for run in runs for idx in run] == list(range(total))
    sizes = [len(run) for run in runs]
    assert len(sizes) == parts
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1

"""The group of one rank obeys the contract that a larger group has to obey."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectives import Group, GroupMisuse, SoloGroup

shapes = st.lists(st.integers(min_value=0, max_value=4), min_size=0, max_size=3)


@pytest.fixture(name="group", scope="module")
def make_group() -> Group:
    """A SoloGroup seen as the protocol, so that the type checker compares the two."""
    return SoloGroup()


def test_solo_is_rank_zero_of_one(group: Group) -> None:
    assert (group.rank, group.size) == (0, 1)


@given(shape=shapes)
def test_gather_adds_a_rank_axis_and_copies(group: Group, shape: list[int]) -> None:
    tensor = torch.randn(shape)
    gathered = group.all_gather(tensor)
    assert gathered.shape == (1, *shape)
    assert torch.equal(gathered[0], tensor)
    if tensor.numel():
        gathered.add_(1)
        assert not torch.equal(gathered[0], tensor)


@given(shape=shapes)
def test_scatter_undoes_gather(group: Group, shape: list[int]) -> None:
    tensor = torch.randn(shape)
    assert torch.equal(group.reduce_scatter(group.all_gather(tensor)), tensor)


@given(shape=shapes, op=st.sampled_from(["sum", "max"]))
def test_in_place_collectives_leave_one_rank_alone(group: Group, shape: list[int], op: str) -> None:
    tensor = torch.randn(shape)
    before = tensor.clone()
    group.all_reduce_(tensor, op="max" if op == "max" else "sum")
    group.broadcast_(tensor, source=0)
    group.barrier()
    assert torch.equal(tensor, before)


def test_strided_tensors_are_refused(group: Group) -> None:
    strided = torch.zeros(4, 6).t()
    for call in (group.all_reduce_, group.all_gather, group.reduce_scatter, group.broadcast_):
        with pytest.raises(GroupMisuse, match=r"call \.contiguous\(\) first"):
            call(strided)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_scatter_needs_one_row_a_rank(group: Group, shape: tuple[int, ...]) -> None:
    with pytest.raises(GroupMisuse, match="one a rank"):
        group.reduce_scatter(torch.zeros(shape))


def test_unknown_source_and_reduction_are_refused(group: Group) -> None:
    with pytest.raises(GroupMisuse, match="source 1"):
        group.broadcast_(torch.zeros(1), source=1)
    with pytest.raises(GroupMisuse, match="'mean'"):
        group.all_reduce_(torch.zeros(1), op="mean")  # type: ignore[arg-type]

"""A segment's bytes between device and files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kv_store.staging import Staging

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_head(num_tokens: int, used: int, device: str) -> dict[str, Tensor]:
    """Two layers; of 5 columns of clusters some are used."""
    sizes = torch.zeros(2, 5, dtype=torch.int32)
    sizes[1, :used] = 3
    head = {
        "positions": torch.arange(2 * num_tokens, dtype=torch.int32).view(2, num_tokens),
        "k": torch.randn(2, num_tokens, 3).bfloat16(),
        "cluster_sizes": sizes,
        "group_counts": torch.ones(2, 1, dtype=torch.int32),
        "radii": torch.rand(2, 5),
    }
    return {name: x.to(device) for name, x in head.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_staged_is_contiguous_and_without_padding(device: str) -> None:
    heads = {3: make_head(7, 2, device), 5: make_head(7, 4, device)}
    host = Staging(is_locked=device == "cuda").copy(heads)
    if device == "cuda":
        torch.cuda.synchronize()
    assert list(host) == [3, 5]
    for head, width in ((3, 2), (5, 4)):
        own = {name: x.cpu() for name, x in heads[head].items()}
        assert torch.equal(host[head]["k"], own["k"])
        assert torch.equal(host[head]["positions"], own["positions"])
        assert torch.equal(host[head]["radii"], own["radii"][:, :width])
        assert all(x.is_contiguous() and x.device.type == "cpu" for x in host[head].values())
        assert all(x.is_pinned() == (device == "cuda") for x in host[head].values())


def test_the_buffer_is_made_once() -> None:
    staging = Staging(is_locked=False)
    first = staging.copy({0: make_head(9, 5, "cpu")})[0]["positions"]
    place = first.untyped_storage().data_ptr()
    shorter = staging.copy({0: make_head(4, 1, "cpu")})[0]
    assert {x.untyped_storage().data_ptr() for x in shorter.values()} == {place}
    longer = staging.copy({0: make_head(4, 1, "cpu"), 1: make_head(9, 5, "cpu")})
    assert longer[1]["positions"].tolist() == make_head(9, 5, "cpu")["positions"].tolist()

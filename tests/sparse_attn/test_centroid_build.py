"""Clusters of a segment: what the store keeps and the look-up believes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attn.select.centroid_build import MAX_DISTANCE_BYTES, CentroidParams, build, kmeans
from tests.sparse_attn.inputs import random_qkv

PARAMS = CentroidParams(keys_per_cluster=8, clusters_per_group=4)


def built(keys: Tensor, *, num_sinks: int = 4, num_window: int = 8) -> dict[str, Tensor]:
    return build(keys, keys.flip(2), num_sinks=num_sinks, num_window=num_window, params=PARAMS)


@settings(deadline=None, max_examples=25)
@given(num_tokens=st.integers(1, 90), seed=st.integers(0, 2**16), is_repeated=st.booleans())
def test_every_body_token_is_in_exactly_one_cluster(
    num_tokens: int, seed: int, is_repeated: bool
) -> None:
    _, keys, _ = random_qkv(1, num_tokens, seed=seed)
    if is_repeated:
        keys = keys[:, :1].expand(-1, num_tokens, -1).clone()
    num_sinks = min(4, num_tokens)
    num_window = min(8, num_tokens - num_sinks)
    tensors = built(keys, num_sinks=num_sinks, num_window=num_window)
    num_body = num_tokens - num_sinks - num_window
    for head in range(2):
        order = tensors["order"][head]
        assert sorted(order.tolist()) == list(range(num_tokens))
        assert order[:num_sinks].tolist() == list(range(num_sinks))
        assert order[num_tokens - num_window :].tolist() == list(
            range(num_tokens - num_window, num_tokens)
        )
        sizes = tensors["cluster_sizes"][head]
        starts = tensors["cluster_starts"][head]
        assert int(sizes.sum()) == num_body
        covered = [
            slot
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
            for slot in range(start, start + size)
        ]
        assert covered == list(range(num_sinks, num_sinks + num_body))


def test_statistics_describe_the_keys_of_each_cluster() -> None:
    _, keys, _ = random_qkv(1, 120, seed=3)
    tensors = built(keys)
    for head in range(2):
        ordered = keys[head, tensors["order"][head]]
        values = keys.flip(2)[head, tensors["order"][head]]
        for column, size in enumerate(tensors["cluster_sizes"][head].tolist()):
            if size == 0:
                continue
            start = int(tensors["cluster_starts"][head, column])
            own = ordered[start : start + size]
            for name, expected in (
                ("centroids", own.mean(dim=0)),
                ("variances", own.var(dim=0, unbiased=False)),
                ("value_sums", values[start : start + size].sum(dim=0)),
            ):
                stored = tensors[name][head, column]
                torch.testing.assert_close(stored, expected.half(), atol=1e-5, rtol=1e-3)
            reach = (own - tensors["centroids"][head, column].float()).norm(dim=1).max()
            assert reach <= tensors["radii"][head, column] <= reach * 1.001 + 1e-6


def test_groups_are_runs_of_clusters_and_of_slots() -> None:
    _, keys, _ = random_qkv(1, 200, seed=5)
    tensors = built(keys)
    for head in range(2):
        counts = tensors["group_counts"][head].tolist()
        starts = tensors["group_starts"][head].tolist()
        num_filled = int((tensors["cluster_sizes"][head] > 0).sum())
        assert sum(counts) == num_filled
        for group, (start, count) in enumerate(zip(starts, counts, strict=True)):
            sizes = tensors["cluster_sizes"][head, start : start + count]
            assert int(sizes.sum()) == int(tensors["group_sizes"][head, group])


def test_clusters_far_above_the_mean_are_split() -> None:
    _, keys, _ = random_qkv(1, 256, seed=7)
    keys[:, 20:220] = keys[:, 20:21] + 0.01 * keys[:, 20:220]
    tensors = built(keys)
    num_clusters = (256 - 12) // PARAMS.keys_per_cluster
    limit = PARAMS.max_cluster_ratio * -(-(256 - 12) // num_clusters)
    assert int(tensors["cluster_sizes"].max()) <= limit


def test_the_same_keys_give_the_same_bytes() -> None:
    _, keys, _ = random_qkv(1, 150, seed=9)
    first, second = built(keys), built(keys.clone())
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_outlier_keys_do_not_break_the_others(scale: float) -> None:
    _, keys, _ = random_qkv(1, 100, seed=11)
    keys[:, 50] *= scale * 100
    tensors = built(keys)
    assert all(bool(torch.isfinite(x.float()).all()) for x in tensors.values())


def test_kmeans_finds_separate_groups_of_points() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(1, 5, 8, generator=generator)
    owner = torch.arange(100) // 20
    points = centres[:, owner] + 0.1 * torch.randn(1, 100, 8, generator=generator)
    labels = kmeans(points, num_clusters=5, iterations=8)[0]
    assert all(len(set(labels[owner == c].tolist())) == 1 for c in range(5))
    assert len(set(labels.tolist())) == 5


def test_kmeans_in_batches_gives_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(7, 100, 8, generator=torch.Generator().manual_seed(0))
    together = kmeans(points, num_clusters=25, iterations=4)
    for num_bytes in (1, 2 * 100 * 25 * 4, 3 * 100 * 25 * 4 + 1):
        monkeypatch.setitem(MAX_DISTANCE_BYTES, "cpu", num_bytes)
        assert torch.equal(kmeans(points, num_clusters=25, iterations=4), together)


@pytest.mark.parametrize(
    ("num_tokens", "size"), [(1, 8), (8192, 8), (32_768, 16), (131_072, 32), (1_048_576, 91)]
)
def test_groups_grow_with_the_root_of_the_length(num_tokens: int, size: int) -> None:
    assert CentroidParams().for_document(num_tokens).clusters_per_group == size
    assert PARAMS.for_document(num_tokens) == PARAMS

"""Kernels of cluster building against the definition: interpreted in float32, or on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from sparse_attn.errors import AttentionError, InvalidBudget, ShapeMismatch
from sparse_attn.kernels import label_runs
from sparse_attn.kernels.kmeans import TILES, assign, centre_points, kmeans
from sparse_attn.kernels.label_runs import Runs, find_runs
from sparse_attn.kernels.run_split import split_oversized
from sparse_attn.kernels.run_statistics import run_means, run_statistics
from sparse_attn.select import centroid_build
from sparse_attn.select.centroid_build import RADIUS_SLACK, CentroidParams, build

HAS_GPU = torch.cuda.is_available()
# Distances that differ by less tie (`assign_kernel`); twice that for their own rounding.
NEAR = 2.0**-15
PLACES = [
    pytest.param(
        ("cpu", torch.float32), marks=pytest.mark.skipif(HAS_GPU, reason="compiled"), id="cpu"
    ),
    pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu, id="gpu"),
]
Place = tuple[str, torch.dtype]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Where kernels run, and the type of keys there."""
    if request.param[0] == "cuda" and not HAS_GPU:
        pytest.skip("no GPU here")
    return request.param


def random_keys(place: Place, num_problems: int, num_keys: int, dim: int, seed: int = 0) -> Tensor:
    """Keys that lie in clumps, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    num_clumps = max(1, num_keys // 9)
    clumps = 2 * torch.randn(num_problems, num_clumps, dim, generator=generator) + 3
    owner = torch.randint(num_clumps, (num_keys,), generator=generator)
    keys = clumps[:, owner] + torch.randn(num_problems, num_keys, dim, generator=generator)
    return keys.to(*place)


def precision_of(place: Place) -> torch.dtype:
    return torch.float32 if place[0] == "cpu" else torch.float16


def own_distance(x: Tensor, centres: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of each point to its centre, and to the nearest."""
    distances = torch.cdist(x.double(), centres.double()).square()
    return distances.gather(2, labels.long().unsqueeze(2)).squeeze(2), distances.amin(2)


def padded_centres(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    multiple = max(tile.centres for tile in TILES.values())
    padded = points.new_zeros(points.shape[0], multiple, points.shape[2])
    padded[:, : centres.shape[1]] = centres
    norms = padded.float().square().sum(2)
    norms[:, centres.shape[1] :] = torch.inf
    return padded, norms


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("num_keys", [1, 63, 65, 1023, 1025])
def test_every_point_gets_its_nearest_centre(place: Place, num_keys: int, dim: int) -> None:
    points = centre_points(random_keys(place, 2, num_keys, dim), precision_of(place))
    centres = centre_points(random_keys(place, 2, 70, dim, seed=1), precision_of(place))
    labels = assign(points, *padded_centres(points, centres))
    assert labels.max() < 70
    own, nearest = own_distance(points, centres, labels)
    rounding = 1e-6 * points.double().square().sum(2)
    assert bool((own <= nearest * (1 + NEAR) + rounding).all())


def test_ties_go_to_the_lowest_centre_within_and_across_tiles(place: Place) -> None:
    points = centre_points(random_keys(place, 1, 40, 64), precision_of(place))
    centres = points[:, torch.arange(120) % 40]
    labels = assign(points, *padded_centres(points, centres))
    assert labels[0].tolist() == list(range(40))


@pytest.mark.parametrize("precision", [torch.float16, torch.float32])
def test_centred_points_keep_their_differences(place: Place, precision: torch.dtype) -> None:
    keys = random_keys(place, 2, 65, 48)
    points = centre_points(keys, precision).float()
    assert points.shape[2] == 64
    assert not points[:, :, 48:].any()
    assert 2.0**12 < points.abs().max() <= 2.0**15
    keys = keys.float()
    scale = (points[:, 1, 0] - points[:, 0, 0]) / (keys[:, 1, 0] - keys[:, 0, 0])
    moved = (keys - keys.mean(1, keepdim=True)) * scale.view(-1, 1, 1)
    torch.testing.assert_close(points[:, :, :48], moved, rtol=2e-3, atol=40)


@pytest.mark.skipif(HAS_GPU, reason="labels of float32 are compared where kernels are interpreted")
@pytest.mark.parametrize(
    ("num_keys", "num_clusters", "dim"),
    [(1, 1, 64), (63, 15, 64), (65, 16, 128), (257, 64, 64), (100, 1, 64), (20, 33, 64)],
)
def test_labels_are_those_of_the_definition(num_keys: int, num_clusters: int, dim: int) -> None:
    keys = random_keys(("cpu", torch.float32), 2, num_keys, dim)
    wanted = centroid_build.kmeans(keys, num_clusters=num_clusters, iterations=3)
    labels = kmeans(keys, num_clusters=num_clusters, iterations=3, precision=torch.float32)
    assert torch.equal(labels.long(), wanted)


def test_half_precision_clusters_as_well_as_the_definition(place: Place) -> None:
    keys = random_keys(place, 2, 240, 64)
    ours = kmeans(keys, num_clusters=60, iterations=5).long()
    wanted = centroid_build.kmeans(keys.float(), num_clusters=60, iterations=5)
    spread = [_spread(keys.float(), labels, 60) for labels in (ours, wanted)]
    assert spread[0] <= spread[1] * 1.01


def _spread(keys: Tensor, labels: Tensor, num_clusters: int) -> float:
    """Sum of squared distances from the own mean."""
    index = labels.unsqueeze(2).expand_as(keys)
    means = keys.new_zeros(keys.shape[0], num_clusters, keys.shape[2])
    means.scatter_reduce_(1, index, keys, "mean", include_self=False)
    return float((keys - means.gather(1, index)).square().sum())


def test_equal_keys_all_go_to_the_first_cluster(place: Place) -> None:
    keys = random_keys(place, 2, 1, 64).expand(-1, 130, -1).contiguous()
    assert not kmeans(keys, num_clusters=32, iterations=2).any()


def test_more_clusters_than_distinct_keys_leave_the_rest_empty(place: Place) -> None:
    keys = 10 * random_keys(place, 1, 3, 64)[:, torch.arange(90) // 30]
    labels = kmeans(keys, num_clusters=30, iterations=3)
    assert labels[0].tolist() == [0] * 30 + [10] * 30 + [20] * 30


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_tiny_and_huge_keys_cluster_alike(place: Place, factor: float) -> None:
    keys = random_keys(place, 1, 65, 64)
    keys_scaled = (keys.float() * 2.0 ** round(torch.tensor(factor).log2().item())).to(keys.dtype)
    wanted = kmeans(keys, num_clusters=16, iterations=2)
    assert torch.equal(kmeans(keys_scaled, num_clusters=16, iterations=2), wanted)


@pytest.mark.parametrize(("num_points", "num_runs"), [(1, 1), (65, 300), (513, 7), (300, 1)])
def test_runs_are_a_stable_sort_by_label(place: Place, num_points: int, num_runs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_runs, (3, num_points), generator=generator).to(place[0])
    runs = find_runs(labels.int(), num_runs)
    assert torch.equal(runs.members.long(), labels.argsort(dim=1, stable=True))
    for problem in range(3):
        wanted = torch.bincount(labels[problem], minlength=num_runs)
        assert torch.equal(runs.sizes[problem].long(), wanted)
        assert torch.equal(runs.starts[problem].long(), wanted.cumsum(0) - wanted)


def test_the_order_in_which_atomics_came_is_put_right(place: Place) -> None:
    labels = torch.tensor([[0] * 5 + [1] * 150], dtype=torch.int32, device=place[0])
    starts, sizes = torch.tensor([[[0, 5]], [[5, 150]]], dtype=torch.int32, device=place[0])
    back = torch.cat([torch.arange(4, -1, -1), torch.arange(154, 4, -1)]).int().to(place[0])
    members = torch.empty_like(labels)
    label_runs.sort_kernel[(2, 1)](
        back.unsqueeze(0), labels, starts, sizes, members, 155, 2, BLOCK=label_runs.SLOTS
    )
    assert members[0].tolist() == list(range(155))


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("max_size", [1, 7, 400])
def test_long_runs_are_cut_as_the_definition_cuts_them(
    place: Place, max_size: int, is_tied: bool
) -> None:
    keys = random_keys(place, 2, 300, 48)
    if is_tied:
        keys = keys.round()
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(9, (2, 300), generator=generator).square() // 9
    wanted = labels.clone()
    centroid_build._split_oversized(keys.float().cpu(), wanted, 9, max_size)
    ours = labels.int().to(place[0])
    split_oversized(keys, ours, 9, max_size=max_size)
    assert torch.equal(ours.cpu().long(), wanted)


@pytest.mark.parametrize("dim", [48, 128])
def test_statistics_are_those_of_the_definition(place: Place, dim: int) -> None:
    keys = random_keys(place, 2, 155, dim)[:, 5:]
    values = random_keys(place, 2, 150, dim, seed=1)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(40, (2, 150), generator=generator).to(place[0])
    labels[:, ::3] = 3
    wanted = centroid_build._statistics(keys.float(), values.float(), labels, 50)
    runs = find_runs(labels.int(), 50)
    ours = run_statistics(keys, values, runs, slack=RADIUS_SLACK)
    assert torch.equal(runs.sizes.long(), wanted.sizes)
    assert torch.equal(ours.centroids, run_means(keys, runs))
    for name in ("centroids", "variances", "value_sums", "radii"):
        # Half precision rounds sums that were added in another order.
        torch.testing.assert_close(
            getattr(ours, name), getattr(wanted, name), rtol=1e-3, atol=1e-4, msg=name
        )
    centres = ours.centroids.float().gather(1, labels.unsqueeze(2).expand_as(keys))
    reach = (keys.float() - centres).norm(dim=2)
    assert bool((reach <= ours.radii.gather(1, labels)).all())


def test_statistics_beyond_half_precision_are_cut(place: Place) -> None:
    keys = 1e6 * random_keys(place, 1, 8, 64)
    runs = find_runs(torch.zeros(1, 8, dtype=torch.int32, device=place[0]), 1)
    tables = run_statistics(keys, keys, runs, slack=RADIUS_SLACK)
    assert all(bool(table.isfinite().all()) for table in tables)
    assert tables.value_sums.abs().max() == torch.finfo(torch.float16).max


PARAMS = CentroidParams(keys_per_cluster=8, clusters_per_group=4, iterations=3)


@pytest.mark.parametrize("num_tokens", [13, 130])
def test_a_segment_is_built_as_the_definition_builds_it(place: Place, num_tokens: int) -> None:
    # Clumps far from each other: rounding decides nothing.
    generator = torch.Generator().manual_seed(0)
    clumps = 20 * torch.randn(2, num_tokens // 8 + 1, 64, generator=generator)
    keys = clumps[:, torch.arange(num_tokens) // 8]
    keys = (keys + torch.randn(keys.shape, generator=generator)).to(*place)
    values = keys.flip(2).contiguous()
    ours = build(keys, values, num_sinks=4, num_window=8, params=PARAMS, kernels=True)
    wanted = build(
        keys.float().cpu(), values.float().cpu(), num_sinks=4, num_window=8, params=PARAMS
    )
    assert list(ours) == list(wanted)
    for name, tensor in wanted.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].is_contiguous(), name
        torch.testing.assert_close(ours[name].cpu(), tensor, rtol=2e-3, atol=2e-2, msg=name)


def test_a_segment_of_the_steady_zone_alone_has_no_clusters(place: Place) -> None:
    keys = random_keys(place, 2, 12, 64)
    tensors = build(keys, keys, num_sinks=4, num_window=8, params=PARAMS, kernels=True)
    assert not tensors["cluster_sizes"].any()


def test_the_same_keys_give_the_same_bytes(place: Place) -> None:
    keys = random_keys(place, 1, 110, 64, seed=9)
    keys[:, 20:90] = keys[:, 20:21] + 0.01 * keys[:, 20:90]
    first, second = (
        build(x, x, num_sinks=4, num_window=8, params=PARAMS, kernels=True)
        for x in (keys, keys.clone())
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    limit = PARAMS.max_size(110 - 12)
    assert int(first["cluster_sizes"].max()) <= limit


def test_a_problem_does_not_depend_on_the_others(place: Place) -> None:
    keys = random_keys(place, 3, 130, 64)
    together = kmeans(keys, num_clusters=30, iterations=2)
    alone = kmeans(keys[1:2], num_clusters=30, iterations=2)
    assert torch.equal(together[1:2], alone)


def test_what_no_kernel_can_read_is_refused(place: Place) -> None:
    keys = random_keys(place, 1, 20, 64)
    runs = Runs(*(torch.zeros(1, 20, dtype=torch.int32, device=place[0]) for _ in range(3)))
    cluster = partial(kmeans, num_clusters=2, iterations=1)
    with pytest.raises(ShapeMismatch, match="float64"):
        cluster(keys.double())
    with pytest.raises(ShapeMismatch, match="D up to 256"):
        cluster(keys.new_zeros(1, 20, 257))
    with pytest.raises(ShapeMismatch, match="stride"):
        cluster(keys.transpose(1, 2))
    with pytest.raises(ShapeMismatch, match="none empty"):
        cluster(keys[:, :0])
    with pytest.raises(ShapeMismatch, match="bfloat16"):
        cluster(keys, precision=torch.bfloat16)
    with pytest.raises(InvalidBudget, match="0 clusters"):
        kmeans(keys, num_clusters=0, iterations=1)
    with pytest.raises(ShapeMismatch, match="same shape"):
        run_statistics(keys, keys[:, 1:], runs, slack=1.0)
    with pytest.raises(AttentionError, match="int32"):
        find_runs(torch.zeros(1, 5, dtype=torch.int64, device=place[0]), 2)
    points = centre_points(keys, torch.float16)
    with pytest.raises(ShapeMismatch, match="multiple of"):
        assign(points, points[:, :3], torch.zeros(1, 3, device=place[0]))

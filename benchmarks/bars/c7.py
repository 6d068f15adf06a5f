"""Row C7, building an index: clusters of 128K tokens of the 8B shape against their exact prefill.

Owns the keys that are clustered (random, in clumps) and the two times: `build` of every segment
over all layers and KV heads, and `Prefill.fill` of the same tokens without clusters. A smaller
`--model shape:llama-3.1-8b@2`, fewer `--tokens` and `--device cpu` try the script itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Timing, interleave, note, print_row
from kv_store import Layout
from orchestrator.ingest import NUM_SINKS
from orchestrator.model.config import ModelConfig
from orchestrator.model.load import Loading, load_model
from orchestrator.prefill import Prefill
from sparse_attn.api import find_backend
from sparse_attn.select.centroid_build import CentroidParams, build
from sparse_attn.select.centroid_build import kmeans as kmeans_in_torch

BAR = (
    "k-means and cluster building take at most 3 % of the exact prefill time of the same 128K "
    "tokens of the 8B shape, on one H200"
)
MAX_SHARE = 0.03
DENSE_FLOPS = 989e12  # of an H100 or H200, half precision
WINDOW = 64
MAX_LOSS = 1.01  # of the spread within clusters, against the definition's
CHECKED_PROBLEMS, CLUMP_KEYS = 4, 32
# Beside the one that is used, of `assign_kernel`; the best differs between machines.
OTHER_TILES: tuple[dict[str, int], ...] = (
    {"rows": 128, "centres": 128, "warps": 8, "stages": 3},
    {"rows": 128, "centres": 64, "warps": 4, "stages": 2},
    {"rows": 256, "centres": 64, "warps": 8, "stages": 3},
    {"rows": 256, "centres": 128, "warps": 8, "stages": 2},
    {"rows": 256, "centres": 128, "warps": 16, "stages": 3},
)


def main() -> int:
    """Measure the row."""
    options = _options()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("row C7: no GPU; limit one H200; run it there, or try --device cpu")
    cfg, prefill_s = _time_prefill(options)
    layout = _layout(cfg, options)
    note(f"prefill {prefill_s:.3f} s, limit {_prefill_limit_s(cfg, layout):.3f} s")
    is_exact, loss = _check(layout, options)
    note(f"the same bytes twice: {is_exact}; spread {loss:.4f} of the definition's")
    rows = {}
    for keys_per_cluster in (CentroidParams().keys_per_cluster, 8):
        params = replace(CentroidParams(), keys_per_cluster=keys_per_cluster)
        limit_s = _flops(layout, params) / DENSE_FLOPS
        note(f"{keys_per_cluster} keys a cluster: limit of its products {limit_s:.3f} s")
        seconds = _time_builds(layout, params, options)
        rows[str(keys_per_cluster)] = {
            "params": asdict(params),
            "build_s": sum(seconds),
            "build_segments_s": [round(s, 6) for s in seconds],
            "share_of_prefill": sum(seconds) / prefill_s,
            "limit_s": limit_s,
            "fraction_of_limit": limit_s / sum(seconds),
        }
        note(f"  built in {sum(seconds):.3f} s, {sum(seconds) / prefill_s:.2%} of prefill")
    parts = _time_parts(layout, options) if options.device == "cuda" else {}
    measured: dict[str, object] = {
        "model": options.model,
        "num_tokens": layout.num_tokens,
        "backend": options.backend,
        "prefill_s": prefill_s,
        "by_keys_per_cluster": rows,
        "parts_of_one_segment": parts,
        "same_bytes_twice": is_exact,
        "spread_of_the_definition": loss,
        "peak_build_bytes": _peak_bytes(options),
    }
    share = rows[str(CentroidParams().keys_per_cluster)]["share_of_prefill"]
    assert isinstance(share, float)
    holds = share <= MAX_SHARE and is_exact and loss <= MAX_LOSS and options.device == "cuda"
    return print_row(row="C7", measured=measured, bar=BAR, holds=holds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="torch", help="of the prefill's attention")
    parser.add_argument("--model", default="shape:llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--segment-tokens", type=int, default=8192)
    return parser.parse_known_args()[0]


def _layout(cfg: ModelConfig, options: argparse.Namespace) -> Layout:
    return Layout(
        num_tokens=options.tokens,
        segment_tokens=options.segment_tokens,
        sinks=NUM_SINKS,
        window=WINDOW,
        num_full_layers=len(cfg.full_layers),
        num_sliding_layers=0,
        sliding_window=0,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        kv_dtype=str(_dtype(options)).removeprefix("torch."),
    )


def _dtype(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if options.device == "cuda" else torch.float32


def _time_prefill(options: argparse.Namespace) -> tuple[ModelConfig, float]:
    """Configuration of the model, and seconds of every chunk's `fill`, sealing left out."""
    device = torch.device(options.device)
    model = load_model(options.model, Loading(dtype=_dtype(options), device=device))
    layout = _layout(model.cfg, options)
    backend = find_backend(options.backend)
    generator = torch.Generator(device).manual_seed(0)
    shape, high = (layout.num_tokens,), model.cfg.vocab_size
    ids = torch.randint(high, shape, generator=generator, device=device)
    seconds: list[float] = []
    # The first two segments once more before: kernels are compiled and libraries loaded.
    warm = replace(layout, num_tokens=min(layout.num_tokens, 2 * layout.segment_tokens))
    for its_layout in (warm, layout):
        prefill = Prefill(model.decoder, backend, its_layout, clusters=None)
        seconds = []
        for segment_idx in range(its_layout.num_segments):
            start, stop = its_layout.segment_span(segment_idx)
            fill = partial(prefill.fill, ids[start:stop], start)
            seconds.append(_time_once(fill, options))
            prefill.append(segment_idx, prefill.build(segment_idx))
    return model.cfg, sum(seconds)


def _prefill_limit_s(cfg: ModelConfig, layout: Layout) -> float:
    """Products of a layer's matrices and of causal attention, at the machine's peak."""
    heads, dim = cfg.num_heads * cfg.head_dim, cfg.model_dim
    weights = 2 * dim * heads + 2 * dim * cfg.num_kv_heads * cfg.head_dim
    weights += 3 * dim * cfg.mlp_dim
    flops = layout.num_tokens * (2 * weights + 2 * layout.num_tokens * heads)
    return cfg.num_layers * flops / DENSE_FLOPS


def _flops(layout: Layout, params: CentroidParams) -> float:
    """Products of points and centres over the whole document, groups included."""
    total = 0.0
    for segment_idx in range(layout.num_segments):
        first, last = layout.clustered_span(segment_idx)
        num_keys = last - first
        columns = params.max_clusters(num_keys)
        pairs = num_keys * params.num_clusters(num_keys) + columns * params.num_groups(columns)
        total += 2.0 * (params.iterations + 1) * pairs * layout.head_dim
    return total * layout.num_full_layers * layout.num_kv_heads


def _keys(layout: Layout, options: argparse.Namespace, seed: int, num_problems: int) -> Tensor:
    """Keys [B, S, D] of one segment, in clumps of uneven size and away from the origin."""
    num_keys = layout.segment_tokens
    generator = torch.Generator(options.device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=options.device, dtype=_dtype(options))
    clumps = 2 * draw(num_problems, max(1, num_keys // CLUMP_KEYS), layout.head_dim) + 1
    place = torch.rand(num_keys, generator=generator, device=options.device).square()
    owner = (place * clumps.shape[1]).long().clamp(max=clumps.shape[1] - 1)
    return clumps[:, owner] + draw(num_problems, num_keys, layout.head_dim)


def _check(layout: Layout, options: argparse.Namespace) -> tuple[bool, float]:
    """Whether the same keys give the same bytes, and the spread against the definition's."""
    keys = _keys(layout, options, 0, CHECKED_PROBLEMS)
    params = CentroidParams()
    first, second = (
        build(keys, keys, num_sinks=NUM_SINKS, num_window=WINDOW, params=params) for _ in range(2)
    )
    is_exact = all(torch.equal(first[name], second[name]) for name in first)
    num_clusters = params.num_clusters(layout.segment_tokens)
    wanted = kmeans_in_torch(keys.float(), num_clusters=num_clusters, iterations=params.iterations)
    if options.device == "cuda":
        from sparse_attn.kernels.kmeans import kmeans

        labels = kmeans(keys, num_clusters=num_clusters, iterations=params.iterations).long()
    else:
        labels = wanted
    spreads = [_spread(keys.float(), x, num_clusters) for x in (labels, wanted)]
    return is_exact, spreads[0] / spreads[1]


def _spread(keys: Tensor, labels: Tensor, num_clusters: int) -> float:
    """Sum of squared distances from the own mean."""
    index = labels.unsqueeze(2).expand_as(keys)
    means = keys.new_zeros(keys.shape[0], num_clusters, keys.shape[2])
    means.scatter_reduce_(1, index, keys, "mean", include_self=False)
    return float((keys - means.gather(1, index)).square().sum())


def _time_builds(
    layout: Layout, params: CentroidParams, options: argparse.Namespace
) -> list[float]:
    """Seconds of each segment's `build` over all layers and KV heads."""
    num_problems = layout.num_full_layers * layout.num_kv_heads
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    # Every shape of segment once more before.
    warm = (0, min(1, layout.num_segments - 1), layout.num_segments - 1)
    for segment_idx in (*warm, *range(layout.num_segments)):
        start, stop = layout.segment_span(segment_idx)
        first, last = layout.clustered_span(segment_idx)
        keys = _keys(layout, options, segment_idx, num_problems)[:, : stop - start]
        own = partial(build, keys, keys, num_sinks=first, num_window=stop - start - last)
        seconds.append(_time_once(partial(own, params=params), options))
    return seconds[len(warm) :]


def _time_parts(layout: Layout, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of the steps of one segment's build, each by itself."""
    from sparse_attn.kernels.kmeans import Tile, assign, centre_points, kmeans
    from sparse_attn.kernels.label_runs import find_runs
    from sparse_attn.kernels.run_split import split_oversized
    from sparse_attn.kernels.run_statistics import run_means, run_statistics, write_means

    params = CentroidParams()
    keys = _keys(layout, options, 0, layout.num_full_layers * layout.num_kv_heads)
    num_keys = keys.shape[1]
    num_clusters, columns = params.num_clusters(num_keys), params.max_clusters(num_keys)
    max_size = params.max_size(num_keys)
    points = centre_points(keys, torch.float16)
    # A multiple of every tile: no padding.
    centres = points[:, : max(1, num_clusters // 128) * 128].contiguous()
    norms = centres.float().square().sum(2)
    labels = kmeans(keys, num_clusters=num_clusters, iterations=params.iterations)
    runs = find_runs(labels, num_clusters)
    sums = points[:, :num_clusters].clone(), norms.new_empty(len(keys), num_clusters)
    split = labels.clone()
    split_oversized(keys, split, num_clusters, max_size=max_size)
    split_runs = find_runs(split, columns)
    means = run_means(keys, split_runs)
    group = partial(kmeans, num_clusters=params.num_groups(columns), iterations=params.iterations)
    functions: dict[str, Callable[[], object]] = {
        "centre points": partial(centre_points, keys, torch.float16),
        "assign once": partial(assign, points, centres, norms),
        "sort by label once": partial(find_runs, labels, num_clusters),
        "means once": partial(write_means, points, runs, *sums),
        "split": lambda: split_oversized(keys, labels.clone(), num_clusters, max_size=max_size),
        "means of keys": partial(run_means, keys, split_runs),
        "k-means of groups": partial(group, means),
        "statistics of clusters": partial(run_statistics, keys, keys, split_runs, slack=1.0),
    }
    for words in OTHER_TILES:
        tile = Tile(**words)
        functions[f"assign once, {words}"] = partial(assign, points, centres, norms, tile=tile)
    times: dict[str, Timing] = interleave(functions, repeats=5, synchronize=torch.cuda.synchronize)
    for name, timing in times.items():
        note(f"  {name}: {1e3 * timing.median_s:.3f} ms")
    return {name: timing.as_json() for name, timing in times.items()}


def _time_once(function: Callable[[], object], options: argparse.Namespace) -> float:
    wait: Callable[[], object] = torch.cuda.synchronize if options.device == "cuda" else _no_wait
    wait()
    timing = interleave({"it": function}, repeats=1, warmup=0, synchronize=wait)
    return timing["it"].median_s


def _no_wait() -> None:
    """On a CPU, what returned is done."""


def _peak_bytes(options: argparse.Namespace) -> int | None:
    return torch.cuda.max_memory_allocated() if options.device == "cuda" else None


if __name__ == "__main__":
    sys.exit(main())

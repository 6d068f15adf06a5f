"""The kernels of cluster building as they are launched, for compiling where there is no GPU.

`KERNELS`: (kernel, signature, constexprs, options) of each, `KERNELS_AMD` the same for gfx942.
Pointers, strides, rows and num_centres are multiples of 16 at run time; other numbers are not
specialised. Import this where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparse_attn.kernels import kmeans, label_runs, run_split, run_statistics

Entry = tuple[Any, dict[str, str], dict[str, int], dict[str, int]]
_HALF, _FLOAT, _INT = "*fp16", "*fp32", "*i32"
_FOUR_WARPS = {"num_warps": 4}


def _sizes(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _pointers(kind: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, kind)


def _assign(head_dim: int, kind: str) -> Entry:
    tile = kmeans.TILE_SINGLE if kind == _FLOAT else kmeans.TILES[max(128, head_dim)]
    signature = {
        **_pointers(kind, "points", "centres"),
        **_pointers(_FLOAT, "norms"),
        **_pointers(_INT, "labels"),
        **_sizes("num_points", "num_centres"),
    }
    constants = {
        "D": head_dim,
        "ROWS": tile.rows,
        "CENTRES": tile.centres,
        "STAGES": tile.stages,
    }
    return kmeans.assign_kernel, signature, constants, tile.options()


def _centre(head_dim: int, kind: str) -> Entry:
    signature = {
        "x": kind,
        **_pointers(_FLOAT, "shifts", "scales"),
        "points": _HALF,
        **_sizes("problem_stride", "row_stride", "num_points"),
    }
    constants = {"D": head_dim, "BLOCK_D": label_runs.pad_dim(head_dim), "ROWS": kmeans.ROWS}
    return kmeans.centre_kernel, signature, constants, _FOUR_WARPS


def _sorting() -> Iterator[Entry]:
    sizes = _sizes("num_points", "num_runs")
    block = {"BLOCK": label_runs.SLOTS}
    names = {
        label_runs.count_kernel: ("labels", "sizes", "places"),
        label_runs.place_kernel: ("labels", "starts", "places", "unsorted", "slot_labels"),
        label_runs.sort_kernel: ("unsorted", "slot_labels", "starts", "sizes", "members"),
    }
    for kernel, pointers in names.items():
        yield kernel, {**_pointers(_INT, *pointers), **sizes}, block, _FOUR_WARPS


def _tile(head_dim: int) -> dict[str, int]:
    block_dim, block_runs = run_statistics.tile_runs(head_dim)
    return {"D": head_dim, "BLOCK_D": block_dim, "U": block_runs}


def _mean(head_dim: int, kind: str, *, has_norms: bool) -> Entry:
    signature = {
        "x": kind,
        **_pointers(_INT, "members", "starts", "sizes"),
        "means": _HALF,
        "norms": _FLOAT,
        **_sizes("problem_stride", "row_stride", "num_members", "num_runs"),
        **_sizes("means_stride", "norms_stride"),
    }
    constants = {**_tile(head_dim), "HAS_NORMS": has_norms}
    return run_statistics.mean_kernel, signature, constants, _FOUR_WARPS


def _statistics(head_dim: int, kind: str) -> Entry:
    signature = {
        **_pointers(kind, "keys", "values"),
        **_pointers(_INT, "members", "starts", "sizes"),
        **_pointers(_HALF, "centroids", "variances", "value_sums"),
        "radii": _FLOAT,
        **_sizes("keys_stride", "keys_row", "values_stride", "values_row"),
        **_sizes("num_members", "num_runs"),
        "slack": "fp32",
    }
    return run_statistics.statistics_kernel, signature, _tile(head_dim), _FOUR_WARPS


def _split(head_dim: int, kind: str) -> Iterator[Entry]:
    strides = _sizes("keys_stride", "keys_row")
    widest = {
        "keys": kind,
        **_pointers(_INT, "members", "starts", "sizes", "widest"),
        **strides,
        **_sizes("num_members", "num_runs", "max_size"),
    }
    yield run_split.widest_kernel, widest, _tile(head_dim), _FOUR_WARPS
    cut = {
        "keys": kind,
        **_pointers(_INT, "members", "slot_labels", "starts", "sizes", "widest", "next_labels"),
        **_pointers(_INT, "labels"),
        **strides,
        **_sizes("num_points", "num_runs", "max_size"),
    }
    constants = {"BLOCK": label_runs.SLOTS}
    yield run_split.cut_kernel, cut, constants, _FOUR_WARPS


def _all() -> Iterator[Entry]:
    yield from _sorting()
    for head_dim in (64, 128, 256):
        yield _assign(head_dim, _HALF)
        yield _mean(head_dim, _HALF, has_norms=True)
        for kind in ("*bf16", _HALF, _FLOAT):
            yield _centre(head_dim, kind)
            yield _mean(head_dim, kind, has_norms=False)
            yield _statistics(head_dim, kind)
            yield from _split(head_dim, kind)
    yield _assign(128, _FLOAT)


KERNELS: list[Entry] = list(_all())
KERNELS_AMD: list[Entry] = [
    (kernel, signature, constants, {k: n for k, n in options.items() if k != "maxnreg"})
    for kernel, signature, constants, options in KERNELS
]

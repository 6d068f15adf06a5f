"""The decode kernels as they are launched, for compiling where there is no GPU.

`KERNELS`: (kernel, signature, constexprs, options) of each, `KERNELS_AMD` the same for gfx942.
Pointers are multiples of 16 bytes at run time; other numbers are not specialised. Import this where
TRITON_INTERPRET is not set.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import triton
import triton.language as tl

from sparse_attn.estimate import MAX_LOG_RATIO, UNIFORM_SHARE
from sparse_attn.kernels import dense, merge, sample, steps, tails, take
from sparse_attn.kernels.decode import dense_options
from sparse_attn.kernels.merge import merge_options
from sparse_attn.kernels.read import LONG, read_launch, read_options
from sparse_attn.kernels.score import TILE_MEMBERS, TILE_UNITS
from sparse_attn.kernels.search import MOST_AT_ONCE
from tests.sparse_attn.compiling import Entry, launched

_FLOAT, _INT, _LONG = "*fp32", "*i32", "*i64"
_KV = {"bf16": tl.bfloat16, "fp16": tl.float16}
_PARTS = {"part_out": _FLOAT, "part_lse": _FLOAT}
_HEADS = 8


def _counts(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _pointers(kind: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, kind)


def _shape(per_group: int, head_dim: int) -> dict[str, Any]:
    return {"G": _HEADS, "P": per_group, "D": head_dim}


def _rows(per_group: int, num_queries: int = 1) -> int:
    return min(64, max(16, triton.next_power_of_2(per_group * num_queries)))


def _runs(
    kv: str,
    head_dim: int,
    per_group: int,
    *,
    num_queries: int = 1,
    window: int = 0,
    keeps: bool = False,
    stored: Any = None,
) -> Entry:
    signature = {
        "q": f"*{kv}",
        **_pointers(_LONG, "runs", "visible"),
        **_PARTS,
        "scores": _FLOAT,
        "scale": "fp32",
        **_counts("num_queries", "num_parts", "num_slots"),
    }
    options = dense_options(head_dim)
    constants = {
        **_shape(per_group, head_dim),
        "KV": _KV[kv],
        "BLOCK_R": _rows(per_group, num_queries),
        "BLOCK_N": options.pop("BLOCK_N"),
        "STAGES": options.pop("STAGES"),
        "WINDOW": window,
        "KEEPS": keeps,
        "STORED": stored or _KV[kv],
    }
    return dense.attend_runs_kernel, signature, constants, options


def _spread(per_group: int, *, gathers: bool) -> Entry:
    signature = {
        "scores": _FLOAT,
        **_pointers(_INT if gathers else _LONG, "slots", "bounds"),
        "lse": _FLOAT,
        "evidence": _LONG,
        **_counts("num_slots"),
    }
    constants = {"G": 8, "P": per_group, "BLOCK": 1024, "GATHERS": gathers}
    return dense.spread_kernel, signature, constants, {}


def _look(kv: str, head_dim: int, per_group: int, *, num_queries: int = 1) -> Entry:
    signature = {
        "q": f"*{kv}",
        "runs": _LONG,
        "num_runs": "i32",
        "visible": _LONG,
        "tiles": _INT,
        "tables": _LONG,
        **_pointers(_FLOAT, "log_mass", "tile_lse"),
        **_PARTS,
        "scale": "fp32",
        **_counts("num_queries", "num_parts", "width", "num_tiles"),
    }
    constants = {
        **_shape(per_group, head_dim),
        "KV": _KV[kv],
        "BLOCK_R": _rows(per_group, num_queries),
        "BLOCK_N": dense.STEADY_SLOTS,
        "TILE": TILE_UNITS,
    }
    return steps.look_kernel, signature, constants, {"num_warps": 8}


def _open(kv: str, head_dim: int, per_group: int) -> Entry:
    signature = {
        "q": f"*{kv}",
        **_pointers(_INT, "tiles", "tile_first"),
        "group_tables": _LONG,
        "group_mass": _FLOAT,
        "tables": _LONG,
        "packed_bounds": _INT,
        "log_mass": _FLOAT,
        "members": _INT,
        "opened_lse": _FLOAT,
        **_PARTS,
        "scale": "fp32",
        **_counts("num_queries", "num_parts", "group_width", "width", "max_opened"),
        "base": "i32",
    }
    constants = {
        **_shape(per_group, head_dim),
        "BLOCK_R": max(8, triton.next_power_of_2(per_group)),
        "BLOCK_N": TILE_MEMBERS,
        "TILE_MEMBERS": TILE_MEMBERS,
    }
    return steps.open_kernel, signature, constants, {"num_warps": 4}


def _read(
    kv: str,
    head_dim: int,
    per_group: int,
    *,
    is_deep: bool = False,
    keeps: bool = False,
    capacity: int = 2048,
    stored: Any = None,
    estimates: bool = True,
    is_early: bool,
) -> Entry:
    signature = {
        "q": f"*{kv}",
        "documents": _LONG,
        **_pointers(_INT, "slots", "slot_bounds"),
        "scores": _FLOAT,
        **_pointers(_INT, "tiles", "tile_first"),
        "tables": _LONG,
        **_pointers(_INT, "members", "packed_bounds"),
        "log_mass": _FLOAT,
        **_PARTS,
        "scale": "fp32",
        **_counts("num_queries", "num_parts", "capacity", "width"),
        **_counts("base_read", "base_tiles", "base_members"),
    }
    early = {"EARLY": is_early}
    division = read_launch(read_options(capacity, head_dim), head_dim, per_group, early)
    names = ("num_warps", "maxnreg")
    options: dict[str, int] = {k: division.pop(k) for k in names if k in division}
    constants = {
        **_shape(per_group, head_dim),
        "KV": _KV[kv],
        **division,
        "TILE": TILE_UNITS,
        "IS_DEEP": is_deep,
        "KEEPS": keeps,
        "STORED": stored or _KV[kv],
        "ESTIMATES": estimates,
    }
    return steps.read_kernel, signature, constants, options


def _take(per_group: int, block: int, *, by_mass: bool, expands: bool, shift: int = 20) -> Entry:
    signature = {
        "log_mass": _FLOAT,
        "units": _INT if expands else _LONG,
        "unit_bounds": _INT,
        **_pointers(_FLOAT, "steady_lse", "tile_lse"),
        **_pointers(_INT, "scratch", "entries", "place_bounds", "places"),
        **_counts("width", "num_queries", "num_steady", "steady_rows", "num_tiles", "tile_rows"),
        **_counts("max_opened", "limit", "max_entries", "capacity"),
        "goal": "i64",
    }
    constants = {
        "G": _HEADS,
        "P": per_group,
        "BLOCK_P": triton.next_power_of_2(per_group),
        "BLOCK": block,
        "SHIFT": shift,
        "BY_HEAD": not expands,
        "BY_MASS": by_mass,
        "TILE_OPENED": TILE_MEMBERS,
        "SPAN": 8 if expands else 64,
    }
    if expands:
        signature |= {"opened_lse": _FLOAT}
    else:
        constants |= {"opened_lse": None}
    options = {"num_warps": 8 if block == MOST_AT_ONCE else 4}
    return take.take_kernel, signature, constants, options


def _merge(kv: str, head_dim: int, per_group: int, num_lists: int) -> Entry:
    signature = {
        **_PARTS,
        **_pointers(_INT, "bounds_read", "bounds_tiles", "bounds_members"),
        "out": f"*{kv}",
        **_pointers(_FLOAT, "lse_all", "lse_read"),
        **_counts(
            "num_queries", "num_parts", "num_steady", "base_read", "base_tiles", "base_members"
        ),
    }
    options = merge_options(head_dim)
    constants = {
        "G": 8,
        "P": per_group,
        "D": head_dim,
        "BLOCK": options.pop("BLOCK"),
        "AT_ONCE": options.pop("AT_ONCE"),
        "TILE_READ": 1 if num_lists == 1 else 128,
        "TILE_MEMBERS": 1 if num_lists == 1 else TILE_UNITS,
        "LISTS": num_lists,
        "READS_ALL": num_lists == 1,
    }
    return merge.merge_kernel, signature, constants, options


def _missed(
    kv: str, head_dim: int, per_group: int, num_lists: int, stored: Any = None
) -> Iterator[Entry]:
    shape = {**_shape(per_group, head_dim), "NUM_LISTS": num_lists}
    drawn = {
        "q": f"*{kv}",
        **_pointers(_LONG, "documents", "lists"),
        **_pointers(_LONG, "seeds", "visible"),
        "layer": "i32",
        "chosen": _INT,
        **_pointers(_FLOAT, "lse_read", "most", "mean", "variance", "log_most"),
        "scale": "fp32",
    }
    constants = {"STORED": stored or _KV[kv], "DRAWS": 64, "IS_SCALED": stored is not None}
    constants |= {"TILE": tails._DRAWN, "WIDE": tails._WIDE, "SPLITS": tails._SPLITS}
    constants |= {"UNIFORM": UNIFORM_SHARE, "MAX_RATIO": MAX_LOG_RATIO}
    yield sample.sample_kernel, drawn, {**shape, **constants}, {"num_warps": 8}
    bound = {
        "q": f"*{kv}",
        "lists": _LONG,
        "chosen": _INT,
        "most": _FLOAT,
        "scale": "fp32",
    }
    divided = {"BLOCK_R": _rows(per_group), "TILE": tails._BOUND_TILE}
    yield sample.bound_kernel, bound, {**shape, **divided}, {}


def _each(*, is_early: bool) -> Iterator[Entry]:
    read = partial(_read, is_early=is_early)
    for kv, head_dim, per_group in (
        *(("bf16", head_dim, per_group) for head_dim in (64, 128, 256) for per_group in (1, 4, 16)),
        *(("fp16", head_dim, 4) for head_dim in (64, 128, 256)),
    ):
        shape = (kv, head_dim, per_group)
        yield _runs(*shape)
        yield _look(*shape)
        yield _open(*shape)
        yield read(*shape)
        yield read(*shape, is_deep=True)
        yield _merge(*shape, num_lists=3)
    for head_dim in (64, 128, 256):
        yield _runs("bf16", head_dim, 4, num_queries=16)
        yield _look("bf16", head_dim, 4, num_queries=16)
        for num_lists in (1, 2):
            yield from _missed("bf16", head_dim, 4, num_lists)
        for per_group in (1, 4, 16):
            yield _runs("bf16", head_dim, per_group, stored=tl.float8e4nv)
            for is_deep in (False, True):
                yield read("bf16", head_dim, per_group, is_deep=is_deep, stored=tl.float8e4nv)
        yield from _missed("bf16", head_dim, 4, 2, stored=tl.float8e4nv)
    yield _runs("bf16", 128, 4, keeps=True, stored=tl.float8e4nv)
    yield read("bf16", 128, 4, is_deep=True, keeps=True, stored=tl.float8e4nv)
    yield _runs("bf16", 128, 4, window=128)
    yield _runs("bf16", 128, 4, keeps=True)
    yield read("bf16", 128, 4, is_deep=True, keeps=True)
    for head_dim in (64, 128, 256):
        yield read("bf16", head_dim, 4, capacity=LONG + 1)
        yield read("bf16", head_dim, 4, capacity=LONG + 1, estimates=False)
        yield read("bf16", head_dim, 4, capacity=LONG + 1, is_deep=True)
    yield _merge("bf16", 128, 4, num_lists=1)
    yield _merge("bf16", 128, 4, num_lists=2)
    for per_group in (1, 4, 7, 16):
        yield _spread(per_group, gathers=True)
        yield _spread(per_group, gathers=False)
        for block in (128, MOST_AT_ONCE):
            for by_mass in (False, True):
                yield _take(per_group, block, by_mass=by_mass, expands=True)
                yield _take(per_group, block, by_mass=by_mass, expands=False, shift=32)


KERNELS_AMD: list[Entry] = launched(_each(is_early=False), is_early=False)
KERNELS: list[Entry] = launched(_each(is_early=True), is_early=True)

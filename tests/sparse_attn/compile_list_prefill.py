"""The prefill kernels as they are launched, for compiling where there is no GPU.

`KERNELS` for NVIDIA, `KERNELS_AMD`: (kernel, signature, constexprs, options) of each; at run
time pointers and strides are multiples of 16 bytes. Import this where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparse_attn.kernels import prefill_choose, prefill_dense, prefill_select, prefill_sparse
from sparse_attn.kernels.prefill_launch import (
    AMD,
    LANES,
    NVIDIA,
    Launch,
    Launches,
    fitted,
    padded,
    pairs_per_item,
)

Table = dict[int, Launches]
Entry = tuple[Any, dict[str, str], dict[str, int], dict[str, int]]
_HALF, _FLOAT, _INT, _BYTE = "*bf16", "*fp32", "*i32", "*i8"
_QKV = {"q": _HALF, "k": _HALF, "v": _HALF}
_PART = {"part_out": _FLOAT, "part_lse": _FLOAT}
_STRIDES = {"stride_qt": "i32", "stride_kg": "i32", "stride_vg": "i32"}


def _counts(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _dense(table: Table, head_dim: int, per_group: int, is_causal: bool) -> Entry:
    shape = table[head_dim].dense
    signature = {**_QKV, **_PART, "scale": "fp32", **_counts("num_tokens", "num_slots"), **_STRIDES}
    constants = {
        "G": 8,
        "P": per_group,
        "D": head_dim,
        "CAUSAL": is_causal,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "STAGES": shape.num_stages,
    }
    return prefill_dense.attend_dense_kernel, signature, constants, shape.options()


def _lists(
    table: Table,
    head_dim: int,
    per_group: int,
    tile: int,
    *,
    reads: bool,
    is_short: bool,
    has_tail: bool,
) -> Entry:
    shape = fitted(table[head_dim].lists, rows=tile * per_group)
    signature = {
        **_QKV,
        "blocks": _INT,
        "counts": _INT,
        **dict.fromkeys(("unit_keys", "unit_values"), _HALF),
        "flags": _BYTE if has_tail else _INT,
        **_PART,
        "scale": "fp32",
        **_counts("num_tokens", "num_slots", "num_units", "width"),
        **_STRIDES,
    }
    constants = {
        "G": 8,
        "P": per_group,
        "D": head_dim,
        "TILE": tile,
        "BLOCK": 128,
        "READS": reads,
        "HAS_SHORT": is_short,
        "HAS_TAIL": has_tail,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "BLOCK_U": table[head_dim].unread_units,
        "STAGES": shape.num_stages,
    }
    return prefill_sparse.attend_lists_kernel, signature, constants, shape.options()


def _pairs(table: Table, head_dim: int, per_group: int, tile: int) -> Entry:
    shape = table[head_dim].pairs
    signature = {
        **_QKV,
        **dict.fromkeys(("pairs", "first_pairs", "item_blocks", "item_firsts"), _INT),
        "pair_out": _HALF,
        "pair_lse": _FLOAT,
        "scale": "fp32",
        **_counts("num_tokens", "num_slots", "num_units", "width"),
        **_STRIDES,
    }
    constants = {
        "G": 8,
        "P": per_group,
        "D": head_dim,
        "TILE": tile,
        "BLOCK": 128,
        "BLOCK_M": shape.block_m,
        "PAIRS": pairs_per_item(tile * per_group),
        "STAGES": shape.num_stages,
    }
    return prefill_sparse.attend_pairs_kernel, signature, constants, shape.options()


def _merge(head_dim: int, per_group: int, tile: int) -> Entry:
    signature = {
        "pair_out": _HALF,
        "pair_lse": _FLOAT,
        "counts": _INT,
        **_PART,
        **_counts("num_tokens", "width"),
    }
    constants = {"G": 8, "P": per_group, "D": head_dim, "TILE": tile, "BLOCK_M": 4}
    return prefill_sparse.merge_pairs_kernel, signature, constants, {"num_warps": 4}


_SCORED = {
    **dict.fromkeys(("q", "unit_keys", "unit_variances"), _HALF),
    **dict.fromkeys(("log_sums", "log_shares"), _FLOAT),
    "scale": "fp32",
    **_counts("num_tokens", "num_slots", "num_units", "num_runs", "stride_qt"),
}


def _scored(kernel: Any, shape: Launch, head_dim: int, per_group: int, **constants: int) -> Entry:
    constants |= {"P": per_group, "P_PADDED": padded(per_group), "D": head_dim, "BLOCK": 128}
    constants |= {"BLOCK_M": shape.block_m, "BLOCK_U": shape.block_n, "STAGES": shape.num_stages}
    signature = {name: of for name, of in _SCORED.items() if name in kernel.arg_names}
    return kernel, signature, constants, shape.options()


def _log_sums(table: Table, head_dim: int, per_group: int) -> Entry:
    shape = table[head_dim].log_sums
    return _scored(prefill_select.log_sums_kernel, shape, head_dim, per_group, LANES=LANES)


def _shares(table: Table, head_dim: int, per_group: int, rows: int) -> Entry:
    shape = table[head_dim].shares
    rows = min(rows, shape.block_m)
    kernel = prefill_select.greatest_shares_kernel
    return _scored(kernel, shape, head_dim, per_group, G=8, ROWS=rows)


def _take_best(runs: int, chunk: int) -> Entry:
    signature = {
        "log_shares": _FLOAT,
        **dict.fromkeys(("blocks", "counts"), _INT),
        **_counts("num_slots", "num_units", "budget_keys", "width", "num_always"),
    }
    constants = {"BLOCK": 128, "RUNS": runs, "CHUNK": chunk}
    return prefill_choose.take_best_kernel, signature, constants, {"num_warps": 4}


def _each(table: Table) -> Iterator[Entry]:
    for head_dim in (64, 128, 256):
        yield _dense(table, head_dim, 4, False)
        yield _dense(table, head_dim, 4, True)
        yield _lists(table, head_dim, 4, 64, reads=True, is_short=False, has_tail=False)
        yield _pairs(table, head_dim, 4, 1)
        yield _log_sums(table, head_dim, 4)
        yield _shares(table, head_dim, 4, 256)
        yield _lists(table, head_dim, 4, 64, reads=True, is_short=True, has_tail=True)
    for tile, per_group in ((1, 4), (16, 4), (64, 1), (64, 7)):
        yield _lists(table, 128, per_group, tile, reads=True, is_short=False, has_tail=False)
    yield _lists(table, 128, 4, 64, reads=True, is_short=True, has_tail=False)
    yield _lists(table, 128, 4, 64, reads=True, is_short=False, has_tail=True)
    yield _lists(table, 128, 4, 64, reads=False, is_short=False, has_tail=True)
    yield _pairs(table, 128, 4, 64)
    yield _merge(128, 4, 1)
    yield _shares(table, 128, 4, 4)
    yield _take_best(4, 1024)
    yield _take_best(1, prefill_choose.MOST_AT_ONCE)


KERNELS: list[Entry] = list(_each(NVIDIA))
KERNELS_AMD: list[Entry] = list(_each(AMD))

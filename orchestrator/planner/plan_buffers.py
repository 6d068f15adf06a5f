"""Bytes of what a question's plans of kernels keep on a GPU (`sparse_attn/kernels`).

Owns the shapes of their buffers, as `DenseDecode`, `CentroidDecode` and `Rows` allocate them; a
test adds up the real ones. Tables of addresses of a few numbers a head are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planner.workload import Reading

_FLOAT, _INT, _LONG = 4, 4, 8
_FOLDS = 8
# As `sparse_attn.kernels`: slots of a steady part, of a tile that is read (in long selections), of
# a run at least and at most, and runs that fill a GPU; units of a tile, and of one that is opened.
_STEADY, _TILE, _LONG_TILE, _LONG_LIMIT = 128, 128, 1024, 4096
_LEAST_RUN, _MOST_RUN, _RUNS, _RUN_COLUMNS = 256, 4096, 264, 8
_UNITS, _MEMBERS = 128, 64
# Groups that a two-level look-up opens hold so many times the keys that are read.
_OPENED = 4
# Question tokens that come together (`model/device_attention.py`).
TILE_QUERIES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSizes:
    """One rank's document and question. keys, segments: of a KV head's body; steady: keys that
    every query reads, room for the answer included; columns, groups: of a KV head's tables, no
    matter where everything is read.
    """

    num_layers: int
    num_kv_heads: int
    per_group: int
    head_dim: int
    item_bytes: int
    keys: int
    segments: int
    steady: int
    columns: int = 0
    groups: int = 0


def question_plan_bytes(sizes: PlanSizes, reading: Reading, question_tokens: int) -> int:
    """All plans of a question: of its tiles of tokens, and of one token."""
    counts = {1}
    if question_tokens >= TILE_QUERIES:
        counts.add(TILE_QUERIES)
    if question_tokens % TILE_QUERIES:
        counts.add(question_tokens % TILE_QUERIES)
    plan_bytes = dense_plan_bytes if reading.mode == "exact" else selected_plan_bytes
    return sum(plan_bytes(sizes, reading, count) for count in counts)


def dense_plan_bytes(sizes: PlanSizes, reading: Reading, num_queries: int) -> int:
    """A plan that reads every key; of one query it keeps scores, from which evidence is spread."""
    num_slots = sizes.keys * sizes.num_kv_heads
    wanted = max(1, -(-num_slots // _RUNS))
    run = min(_MOST_RUN, max(_LEAST_RUN, 1 << (wanted - 1).bit_length()))
    runs = sizes.segments * max(1, -(-sizes.keys // (max(1, sizes.segments) * run)))
    steady = -(-sizes.steady // _STEADY)
    table = sizes.num_layers * sizes.num_kv_heads * (runs + steady) * _RUN_COLUMNS * _LONG
    scores = sizes.per_group * num_slots * _FLOAT if num_queries == 1 else 0
    return table + scores + _parts_bytes(sizes, num_queries, steady + runs)


def selected_plan_bytes(sizes: PlanSizes, reading: Reading, num_queries: int) -> int:
    """A plan that selects clusters by a number of keys."""
    z, p = num_queries * sizes.num_kv_heads, sizes.per_group
    is_deep = reading.levels == 2
    capacity = min(sizes.keys, reading.keys)
    first = sizes.groups if is_deep else sizes.columns
    opened = min(sizes.columns, _OPENED * reading.keys) if is_deep else 1
    looked_at = first if is_deep else 1
    tiles = _FOLDS * -(-first // (_FOLDS * _UNITS))
    tile = _LONG_TILE
    if reading.keys <= _LONG_LIMIT:
        tile = _TILE if sizes.head_dim <= 128 else _TILE // 2
    members = opened // _UNITS + _FOLDS if is_deep else 0
    parts = -(-sizes.steady // _STEADY) + capacity // tile + _FOLDS + tiles + members
    pieces = opened // _MEMBERS + _FOLDS
    kept = capacity if num_queries == 1 else 1
    floats = p * (kept + first + tiles + opened + pieces)
    ints = capacity + 3 * opened + 3 * looked_at + 3 * min(capacity, sizes.columns)
    ints += max(first, opened)
    return z * (floats * _FLOAT + ints * _INT) + _parts_bytes(sizes, num_queries, parts)


def _parts_bytes(sizes: PlanSizes, num_queries: int, num_parts: int) -> int:
    """`Rows`: parts of every problem in float32, and the result."""
    rows = num_queries * sizes.num_kv_heads * sizes.per_group
    parts = rows * num_parts * (sizes.head_dim + 1) * _FLOAT
    return parts + rows * (sizes.head_dim * sizes.item_bytes + 2 * _FLOAT)

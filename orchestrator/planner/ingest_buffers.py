"""Buffers of an ingest: what is alive beside weights, KV and the open segment at each moment.

Owns the list of buffers of a chunk (`model/decoder.py`, `prefill_attention.py`) and of the sealing
of a segment (`prefill.py`), which a CPU computes by `centroid_build.py` and a GPU by kernels that
keep no distances (`centroid_device.py`). Refuses to know what stays, and how buffers make a peak:
`memory.py`.
"""

from __future__ import annotations

from collectives.mesh import Mesh
from orchestrator.planner.shards import head_share, slot_share, widest_shard
from orchestrator.planner.topology import Topology
from orchestrator.planner.workload import Choice, Workload

_FLOAT, _INT, _LONG, _HALF = 4, 4, 8, 2
# As `sparse_attn.select.centroid_build.MAX_DISTANCE_BYTES` of a CPU.
_MAX_DISTANCE_BYTES = 2 << 20
# Centres of a tile of k-means, and columns of a row at least, on a GPU (`kernels/kmeans.py`).
_TILE_CENTRES, _LEAST_COLUMNS = 128, 16

Phase = tuple[int, ...]
"""Bytes of each buffer that is alive at one moment."""


def chunk_phase(workload: Workload, choice: Choice, topology: Topology) -> Phase:
    """Buffers of one layer of a prefill chunk, attention or MLP, whichever has more: they take
    turns, and what one has freed the other uses. On a GPU also the segment before, on its way to
    the disk.
    """
    cfg, T, item = workload.cfg, choice.chunk_tokens, topology.item_bytes
    heads, shard = head_share(cfg, choice.mesh), widest_shard(cfg, choice.mesh)
    rotated = heads.group_heads + heads.group_kv_heads
    stream = 3 * [T * cfg.model_dim * item]  # the stream, its norm, a branch
    projected = [T * (rotated + heads.group_kv_heads) * cfg.head_dim * item]
    rotation = [T * rotated * cfg.head_dim * item]
    own = T * heads.own_heads * cfg.head_dim
    causal = 3 * [own * item] + [own * _FLOAT]  # keys and values of every query head; out; part
    sealed = T * heads.group_heads * cfg.head_dim
    parts = [sealed * item, sealed * item, sealed * _FLOAT, own * _FLOAT, own * _FLOAT]
    attention = [*stream, *projected, *rotation, *causal, *parts]
    layout = workload.layout(topology.dtype)
    if layout.is_fp8:  # keys and values of one head's sealed segments, as numbers
        slots = slot_share(layout, choice.mesh, workload.clusters)
        sealed_slots = max(slots.sealed) // heads.group_kv_heads
        attention += 2 * [sealed_slots * cfg.head_dim * item]
    attention += _gathered(T * cfg.num_heads * cfg.head_dim * item, choice.mesh)
    inner = [3 * T * shard.mlp.width * item]  # gate, up, and the activation
    mlp = [*stream, *inner, *_gathered(T * cfg.mlp_dim * item, choice.mesh)]
    leaving = (
        [] if topology.is_cpu or layout.num_segments == 1 else _stored(workload, choice, topology)
    )
    return (*max(attention, mlp, key=sum), *leaving)


def cluster_phases(workload: Workload, choice: Choice, topology: Topology) -> list[Phase]:
    """Buffers while a full segment is clustered, put in slot order, and written."""
    if not topology.is_cpu:
        return _device_cluster_phases(workload, choice, topology)
    cfg, rule, item = workload.cfg, workload.clusters, topology.item_bytes
    layout = workload.layout(topology.dtype)
    share, group = slot_share(layout, choice.mesh, rule), head_share(cfg, choice.mesh)
    tokens = min(workload.segment_tokens, workload.num_tokens)
    heads, layers, D = max(share.owned_heads), len(cfg.full_layers), cfg.head_dim
    clusters, units = rule.clusters_of(tokens), rule.columns_of(tokens) + rule.groups_of(tokens)
    # B: problems that a rank clusters; kept: those that it puts in order; known: of its group.
    B, kept, known = group.own_problems, heads * layers, group.group_kv_heads * layers
    unit = 3 * D * _HALF + 3 * _INT
    wide, labels, whole = B * tokens * D * _FLOAT, B * tokens * _LONG, known * tokens * D * item
    widened = [] if item == _FLOAT else [wide, wide]
    distance = tokens * clusters * _FLOAT
    batch = min(B, max(1, _MAX_DISTANCE_BYTES // max(1, distance)))
    some = batch * clusters * D * _FLOAT
    own = [whole, whole, *widened]
    if layout.is_fp8:  # as they were, and as the store gives them back
        own += [whole, whole]
    kmeans = [*own, batch * distance, batch * tokens * D * _FLOAT, some, some, labels]
    statistics = [*own, wide, wide, labels, labels, B * units * unit]
    moved, tables = kept * tokens * D * item, kept * units * unit
    shared = known * (units * unit + tokens * _LONG) if choice.mesh.context > 1 else 0
    ordered = [*(4 * [moved]), 2 * kept * tokens * _LONG, tables, shared]
    each = moved // max(1, heads)
    written = [moved, moved, *(2 * heads * [each]), tables, tables]
    return [tuple(kmeans), tuple(statistics), tuple(ordered), tuple(written)]


def _device_cluster_phases(workload: Workload, choice: Choice, topology: Topology) -> list[Phase]:
    """`cluster_phases` on a GPU: k-means, then the stored form. Keys are read where the open
    segment has them and centred in half precision; each head's tables are among those that stay.
    """
    cfg, rule, item = workload.cfg, workload.clusters, topology.item_bytes
    layout = workload.layout(topology.dtype)
    share, group = slot_share(layout, choice.mesh, rule), head_share(cfg, choice.mesh)
    tokens = min(workload.segment_tokens, workload.num_tokens)
    heads, layers, D = max(share.owned_heads), len(cfg.full_layers), cfg.head_dim
    clusters, units = rule.clusters_of(tokens), rule.columns_of(tokens) + rule.groups_of(tokens)
    B, kept, known = group.own_problems, heads * layers, group.group_kv_heads * layers
    whole, moved = known * tokens * D * item, kept * tokens * D * item
    unit, order = 3 * D * _HALF + 3 * _INT, tokens * _LONG
    own = [whole, whole] if layout.num_sliding_layers else []  # full-attention layers alone
    own += [whole, whole] if layout.is_fp8 else []  # as the store gives them back
    width = max(_LEAST_COLUMNS, 1 << (D - 1).bit_length())
    centres = -(-clusters // _TILE_CENTRES) * _TILE_CENTRES
    points = [B * tokens * width * _HALF, B * centres * (width * _HALF + _FLOAT)]
    # Labels; by label: members, and three lists to sort them; starts and sizes.
    sorting = 5 * [B * tokens * _INT] + 2 * [B * clusters * _INT]
    built = [moved, moved, kept * tokens * _INT, known * order]
    if kept < known:  # of all heads of the group, and what is picked of them
        built += [known * units * unit, moved, moved, kept * order]
    if heads > 1:  # all heads together, and each by itself; the latter's tables stay
        built += [kept * units * unit, *_stored(workload, choice, topology)]
    return [(*own, *points, *sorting), (*own, *built)]


def _stored(workload: Workload, choice: Choice, topology: Topology) -> list[int]:
    """The stored form of a segment without its tables: keys, values and positions of the KV heads
    that a rank owns.
    """
    cfg, layout = workload.cfg, workload.layout(topology.dtype)
    heads = max(slot_share(layout, choice.mesh, workload.clusters).owned_heads)
    rows = heads * len(cfg.full_layers) * min(workload.segment_tokens, workload.num_tokens)
    body = rows * cfg.head_dim * layout.slot_bytes(topology.item_bytes)
    return [body, body, rows * _INT]


def _gathered(num_bytes: int, mesh: Mesh) -> list[int]:
    """What a gather adds: the ranks' pieces, and the tensor made of them."""
    return [num_bytes, num_bytes] if mesh.num_ranks > 1 else []

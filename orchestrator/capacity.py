"""How much memory a document and a question take on a rank, and how much there is.

Owns the formulas that admission goes by and the measurement of what is free. Refuses to decide:
`coordinator.py` admits, queues and refuses.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from collectives import Mesh
from kv_store import Layout
from orchestrator.model.config import ModelConfig
from orchestrator.place import Place
from orchestrator.planner.plan_buffers import PlanSizes, question_plan_bytes
from orchestrator.planner.workload import Reading
from sparse_attn.select.centroid_build import LEAST_PER_GROUP

# The rest is for activations, the allocator and other processes.
USABLE_SHARE = 0.9
_CGROUP = Path("/sys/fs/cgroup")


def document_bytes(layout: Layout, mesh: Mesh, *, item_bytes: int, keys_per_cluster: int) -> int:
    """Bytes of an open document on the rank that holds most of it.

    KV and positions of its segments; look-up tables, three halves of D a cluster and five numbers;
    the steady zone of its head group.
    """
    slots = max(_slots_of(layout, mesh, rank) for rank in range(mesh.num_ranks))
    per_slot = 2 * layout.head_dim * layout.slot_bytes(item_bytes) + 4
    per_cluster = 3 * 2 * layout.head_dim + 36
    tables = slots // keys_per_cluster * per_cluster if keys_per_cluster else 0
    # One group for each eight clusters.
    tables += tables // LEAST_PER_GROUP
    steady = _steady_bytes(layout, mesh, item_bytes=item_bytes)
    return layout.num_full_layers * (slots * per_slot + tables) + steady


def question_bytes(
    layout: Layout,
    mesh: Mesh,
    cfg: ModelConfig,
    *,
    capacity_tokens: int,
    item_bytes: int,
    has_plans: bool = False,
) -> int:
    """Bytes of a question in progress on a rank: its tail in every layer, evidence mass, and, where
    kernels attend, plans that read everything: a plan that selects by keys is smaller.
    """
    slots = max(_slots_of(layout, mesh, rank) for rank in range(mesh.num_ranks))
    kv_heads = cfg.num_kv_heads // mesh.heads
    steady = layout.sinks + layout.window
    tail = kv_heads * 2 * cfg.head_dim * item_bytes
    windows = (steady if window is None else window for window in cfg.windows)
    tails = sum((kept + capacity_tokens) * tail for kept in windows)
    plans = 0
    if has_plans and layout.num_full_layers:
        sizes = PlanSizes(
            num_layers=layout.num_full_layers,
            num_kv_heads=kv_heads,
            per_group=cfg.num_heads // cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            item_bytes=item_bytes,
            keys=slots // kv_heads,
            segments=layout.num_segments,
            steady=steady + capacity_tokens,
        )
        plans = question_plan_bytes(sizes, Reading(mode="exact"), capacity_tokens)
    return tails + layout.num_full_layers * slots * 4 + plans


def fitting_tokens(
    layout: Layout, mesh: Mesh, *, item_bytes: int, keys_per_cluster: int, capacity_bytes: int
) -> int:
    """About how many document tokens fit into a rank's memory on that mesh."""
    needed = document_bytes(layout, mesh, item_bytes=item_bytes, keys_per_cluster=keys_per_cluster)
    fixed = _steady_bytes(layout, mesh, item_bytes=item_bytes)
    share = (capacity_bytes - fixed) / max(1, needed - fixed)
    return max(0, int(layout.num_tokens * share))


def _steady_bytes(layout: Layout, mesh: Mesh, *, item_bytes: int) -> int:
    """The steady zone of a head group, which every rank of it has."""
    keys = (layout.sinks + layout.window) * layout.num_kv_heads // mesh.heads
    keys *= 2 if layout.is_fp8 else 1  # of a body in fp8 they are not a part
    return layout.num_full_layers * keys * 2 * layout.head_dim * item_bytes


def measure_free_bytes(place: Place, device: torch.device) -> int:
    """Memory that the rank with the least can use; every rank must call it.

    Ranks on CPUs share one machine's memory evenly.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = min(psutil.virtual_memory().available, _cgroup_free()) // place.flat.size
    least = torch.tensor([-int(free * USABLE_SHARE)], dtype=torch.int64)
    place.flat.control.all_reduce_(least, op="max")
    return -int(least)


def _cgroup_free() -> int:
    """What a container may still use; more than any machine has where there is no limit."""
    try:
        limit, used = (
            (_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current")
        )
    except OSError:
        return 1 << 62
    return int(limit) - int(used) if limit.isdecimal() else 1 << 62


def _slots_of(layout: Layout, mesh: Mesh, rank: int) -> int:
    """Slots that a rank holds, over the KV heads of its head group."""
    total = 0
    for kv_head_idx in mesh.kv_heads_of(rank, num_kv_heads=layout.num_kv_heads):
        for segment_idx in range(layout.num_segments):
            owner = mesh.owner_of(
                segment_idx=segment_idx,
                kv_head_idx=kv_head_idx,
                num_kv_heads=layout.num_kv_heads,
            )
            if owner == rank:
                start, end = layout.segment_span(segment_idx)
                total += end - start
    return total

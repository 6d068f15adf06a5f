"""From disk into memory: a finished document becomes resident, every byte checked on the way.

Owns the threads that read. Bytes land in their final place and are checked there, while they are in
cache, before anybody sees them. Refuses to know what they are used for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from kv_store.clusters import TableBuilder
from kv_store.device import SLOT_TENSORS, ResidentDocument, widest
from kv_store.disk import TensorFile, byte_rows, torch_dtype
from kv_store.document import Document
from kv_store.layout import CLUSTER_TENSORS, Layout

T = TypeVar("T")

_INT_TABLES = [name for name, (dtype, _, _) in CLUSTER_TENSORS.items() if dtype == "int32"]
_FLOAT_TABLES = [name for name in CLUSTER_TENSORS if name not in _INT_TABLES]


def load_resident(
    document: Document,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    has_clusters: bool = True,
    num_threads: int = 2,
    verify: bool = True,
) -> ResidentDocument:
    """Bring a finished document into memory, with its cluster tables if `has_clusters`.

    `num_threads` read beside each other and are gone on return. `verify=False` skips the tensor
    checksums, to measure what they cost. Errors: DocumentDamaged, naming the file.
    """
    layout = document.layout
    resident = ResidentDocument.for_layout(layout, dtype=dtype, device=device)
    stored = torch_dtype(layout.kv_dtype)
    is_direct = resident.device.type == "cpu" and resident.dtype == stored

    def read(head: tuple[int, int]) -> dict[str, Tensor]:
        with document.open_head(*head, verify=verify) as file:
            return _read_kv(file, resident, layout, *head, is_direct=is_direct)

    tails = _for_each(read, _heads(layout), num_threads)
    for segment_idx in range(layout.num_segments):
        resident.num_sealed = layout.segment_span(segment_idx)[1]
        first = segment_idx * layout.num_kv_heads
        if tails[first]:
            resident.append_tail(tails[first : first + layout.num_kv_heads])
    if has_clusters:
        load_clusters(document, resident, num_threads=num_threads, verify=verify)
    return resident


def load_clusters(
    document: Document, resident: ResidentDocument, *, num_threads: int = 2, verify: bool = True
) -> None:
    """Give a resident document its cluster tables, if it has any on disk.

    Errors: DocumentDamaged, naming the file.
    """
    layout, first_slots, widths = document.layout, [], []
    for segment_idx in range(layout.num_segments):
        columns = []
        for kv_head_idx in range(layout.num_kv_heads):
            with document.open_head(segment_idx, kv_head_idx, verify=verify) as file:
                if "cluster_sizes" not in file.entries:
                    return
                columns.append(_columns(file))
        first_slots.append(layout.segment_span(segment_idx)[0])
        widths.append(widest(columns))
    tables = resident.table_builder(first_slots, widths)

    def read(head: tuple[int, int]) -> None:
        with document.open_head(*head, verify=verify) as file:
            _read_tables(file, tables, *head)

    _for_each(read, _heads(layout), num_threads)
    resident.clusters = tables.finish(device=resident.device)


def _heads(layout: Layout) -> list[tuple[int, int]]:
    """(segment, KV head) of every file of segments."""
    return [
        (segment_idx, kv_head_idx)
        for segment_idx in range(layout.num_segments)
        for kv_head_idx in range(layout.num_kv_heads)
    ]


def _for_each(
    work: Callable[[tuple[int, int]], T], heads: list[tuple[int, int]], num_threads: int
) -> list[T]:
    with ThreadPoolExecutor(num_threads, thread_name_prefix="kv-read") as pool:
        return list(pool.map(work, heads))


def _read_kv(
    file: TensorFile,
    resident: ResidentDocument,
    layout: Layout,
    segment_idx: int,
    kv_head_idx: int,
    *,
    is_direct: bool,
) -> dict[str, Tensor]:
    """Fill one KV head's part of one segment; return the sliding tensors that still matter."""
    start, end = layout.segment_span(segment_idx)
    if is_direct:
        for name in SLOT_TENSORS:
            file.read_into(name, byte_rows(resident.slots(name, kv_head_idx, start, end)))
    else:
        stored = {name: file.read(name) for name in SLOT_TENSORS}
        resident.fill(kv_head_idx, start, end, stored)
    if not layout.num_sliding_layers or end <= layout.num_tokens - layout.sliding_window:
        return {}
    return {name: file.read(name) for name in ("sliding_k", "sliding_v")}


def _columns(file: TensorFile) -> tuple[int, int]:
    """Clusters and groups of one file."""
    return file.entries["cluster_sizes"].shape[1], file.entries["group_sizes"].shape[1]


def _read_tables(
    file: TensorFile, tables: TableBuilder, segment_idx: int, kv_head_idx: int
) -> None:
    tables.put(segment_idx, kv_head_idx, {name: file.read(name) for name in _INT_TABLES})
    for name in _FLOAT_TABLES:
        width = file.entries[name].shape[1]
        file.read_into(name, byte_rows(tables.place(name, segment_idx, kv_head_idx, width)))

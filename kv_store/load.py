"""From disk into memory: what is held of a finished document becomes resident, every byte checked.

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
from kv_store.device import SLOT_TENSORS, ResidentDocument
from kv_store.disk import TensorFile, byte_rows, torch_dtype
from kv_store.document import Document
from kv_store.holding import Holding
from kv_store.layout import CLUSTER_TENSORS

T = TypeVar("T")
_File = tuple[int, int]  # (segment, KV head)

_STEADY = ("steady_k", "steady_v")
_SLIDING = ("sliding_k", "sliding_v")
_INT_TABLES = [name for name, (dtype, _, _) in CLUSTER_TENSORS.items() if dtype == "int32"]
_FLOAT_TABLES = [name for name in CLUSTER_TENSORS if name not in _INT_TABLES]


def load_resident(
    document: Document,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    holding: Holding | None = None,
    has_clusters: bool = True,
    num_threads: int = 2,
    verify: bool = True,
) -> ResidentDocument:
    """Bring what is held of a finished document (None: all) into memory, with its cluster tables if
    `has_clusters`.

    `num_threads` read beside each other and are gone on return. `verify=False` skips the tensor
    checksums, to measure what they cost. Errors: DocumentDamaged, naming the file.
    """
    held = Holding.whole(document.layout) if holding is None else holding
    resident = ResidentDocument(held, dtype=dtype, device=device)
    stored = torch_dtype(document.layout.kv_dtype)
    is_direct = resident.device.type == "cpu" and resident.slot_dtype == stored

    def read(file: _File) -> None:
        with document.open_head(*file, verify=verify) as tensors:
            _read_kv(tensors, resident, *file, is_direct=is_direct)

    _for_each(read, held.files, num_threads)
    _load_tails(document, resident, verify=verify)
    resident.num_sealed = resident.num_tokens
    if has_clusters:
        load_clusters(document, resident, num_threads=num_threads, verify=verify)
    return resident


def load_clusters(
    document: Document, resident: ResidentDocument, *, num_threads: int = 2, verify: bool = True
) -> None:
    """Give a resident document its cluster tables, if it has any on disk.

    Errors: DocumentDamaged, naming the file.
    """
    files, widths = resident.holding.files, {}
    for file in files:
        with document.open_head(*file, verify=verify) as tensors:
            if "cluster_sizes" not in tensors.entries:
                return
            widths[file] = _columns(tensors)
    tables = resident.table_builder(widths)

    def read(file: _File) -> None:
        with document.open_head(*file, verify=verify) as tensors:
            _read_tables(tensors, tables, *file)

    _for_each(read, files, num_threads)
    resident.clusters = tables.finish(device=resident.device)


def _for_each(work: Callable[[_File], T], files: list[_File], num_threads: int) -> list[T]:
    with ThreadPoolExecutor(num_threads, thread_name_prefix="kv-read") as pool:
        return list(pool.map(work, files))


def _read_kv(
    tensors: TensorFile,
    resident: ResidentDocument,
    segment_idx: int,
    kv_head_idx: int,
    *,
    is_direct: bool,
) -> None:
    for name in SLOT_TENSORS:
        place = resident.slots(name, segment_idx, kv_head_idx)
        if is_direct:
            tensors.read_into(name, byte_rows(place))
        else:
            place.copy_(tensors.read(name))
    if resident.layout.is_fp8:
        resident.set_scales(kv_head_idx, tensors.read("scales"))
        steady = {name: tensors.read(name) for name in _STEADY}
        resident.keep_steady(segment_idx, kv_head_idx, steady)


def _load_tails(document: Document, resident: ResidentDocument, *, verify: bool) -> None:
    """The sliding-window tensors of every KV head, whoever holds its segments."""
    layout = document.layout
    if not layout.num_sliding_layers:
        return
    for segment_idx in range(layout.num_segments):
        _, end = layout.segment_span(segment_idx)
        if end <= layout.num_tokens - layout.sliding_window:
            continue
        heads = []
        for kv_head_idx in resident.holding.kv_heads:
            with document.open_head(segment_idx, kv_head_idx, verify=verify) as tensors:
                heads.append({name: tensors.read(name) for name in _SLIDING})
        resident.num_sealed = end
        resident.append_tail(heads)


def _columns(tensors: TensorFile) -> tuple[int, int]:
    """Clusters and groups of one file."""
    return tensors.entries["cluster_sizes"].shape[1], tensors.entries["group_sizes"].shape[1]


def _read_tables(
    tensors: TensorFile, tables: TableBuilder, segment_idx: int, kv_head_idx: int
) -> None:
    ints: dict[str, Tensor] = {name: tensors.read(name) for name in _INT_TABLES}
    tables.put(segment_idx, kv_head_idx, ints)
    for name in _FLOAT_TABLES:
        tensors.read_into(name, byte_rows(tables.place(name, segment_idx, kv_head_idx)))

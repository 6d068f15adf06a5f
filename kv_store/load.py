"""From disk into memory: a finished document becomes resident, every byte checked on the way.

Owns the threads that read. Bytes land in their final place and are checked there, while they are in
cache, before anybody sees them. Refuses to know what they are used for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kv_store.clusters import TableBuilder
from kv_store.device import SLOT_TENSORS, ResidentDocument, widest
from kv_store.disk import TensorFile, byte_rows, torch_dtype
from kv_store.document import Document
from kv_store.layout import CLUSTER_TENSORS

_INT_TABLES = [name for name, (dtype, _, _) in CLUSTER_TENSORS.items() if dtype == "int32"]
_FLOAT_TABLES = [name for name in CLUSTER_TENSORS if name not in _INT_TABLES]


def load_resident(
    document: Document,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    num_threads: int = 2,
    verify: bool = True,
) -> ResidentDocument:
    """Bring a finished document into memory, complete with its cluster tables.

    `num_threads` read beside each other and are gone on return. `verify=False` skips the tensor
    checksums, to measure what they cost. Errors: DocumentDamaged, naming the file.
    """
    layout = document.layout
    resident = ResidentDocument.for_layout(layout, dtype=dtype, device=device)
    reader = _Reader(document, resident, verify=verify)
    jobs = [
        (segment_idx, kv_head_idx)
        for segment_idx in range(layout.num_segments)
        for kv_head_idx in range(layout.num_kv_heads)
    ]
    with ThreadPoolExecutor(num_threads, thread_name_prefix="kv-read") as pool:
        tails = list(pool.map(lambda job: reader.read_head(*job), jobs))
    for segment_idx in range(layout.num_segments):
        resident.num_sealed = layout.segment_span(segment_idx)[1]
        first = segment_idx * layout.num_kv_heads
        if tails[first]:
            resident.append_tail(tails[first : first + layout.num_kv_heads])
    if reader.tables is not None:
        resident.clusters = reader.tables.finish(device=resident.device)
    return resident


class _Reader:
    """Reads files of one document into one resident document; threads share it."""

    def __init__(self, document: Document, resident: ResidentDocument, *, verify: bool) -> None:
        self._document = document
        self._resident = resident
        self._verify = verify
        stored = torch_dtype(document.layout.kv_dtype)
        self._is_direct = resident.device.type == "cpu" and resident.dtype == stored
        self.tables = self._allocate_tables()

    def _open(self, segment_idx: int, kv_head_idx: int) -> TensorFile:
        return self._document.open_head(segment_idx, kv_head_idx, verify=self._verify)

    def _allocate_tables(self) -> TableBuilder | None:
        """Cluster tables as wide as the headers say; None for a document without clusters."""
        layout = self._document.layout
        first_slots, widths = [], []
        for segment_idx in range(layout.num_segments):
            columns = []
            for kv_head_idx in range(layout.num_kv_heads):
                with self._open(segment_idx, kv_head_idx) as file:
                    if "cluster_sizes" not in file.entries:
                        return None
                    shapes = file.entries["cluster_sizes"].shape, file.entries["group_sizes"].shape
                    columns.append((shapes[0][1], shapes[1][1]))
            first_slots.append(layout.segment_span(segment_idx)[0])
            widths.append(widest(columns))
        return self._resident.table_builder(first_slots, widths)

    def read_head(self, segment_idx: int, kv_head_idx: int) -> dict[str, Tensor]:
        """Fill one KV head's part of one segment; return the sliding tensors that still matter."""
        layout = self._document.layout
        start, end = layout.segment_span(segment_idx)
        with self._open(segment_idx, kv_head_idx) as file:
            if self._is_direct:
                for name in SLOT_TENSORS:
                    slots = self._resident.slots(name, kv_head_idx, start, end)
                    file.read_into(name, byte_rows(slots))
            else:
                stored = {name: file.read(name) for name in SLOT_TENSORS}
                self._resident.fill(kv_head_idx, start, end, stored)
            if self.tables is not None:
                _read_tables(file, self.tables, segment_idx, kv_head_idx)
            if not layout.num_sliding_layers or end <= layout.num_tokens - layout.sliding_window:
                return {}
            return {name: file.read(name) for name in ("sliding_k", "sliding_v")}


def _read_tables(
    file: TensorFile, tables: TableBuilder, segment_idx: int, kv_head_idx: int
) -> None:
    tables.put(segment_idx, kv_head_idx, {name: file.read(name) for name in _INT_TABLES})
    for name in _FLOAT_TABLES:
        width = file.entries[name].shape[1]
        file.read_into(name, byte_rows(tables.place(name, segment_idx, kv_head_idx, width)))

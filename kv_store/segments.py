"""The segment files of a document being ingested: written and read back one KV head at a time.

Owns what a segment file must hold and how it is tied to its document. Refuses to know the order of
segments, locks and manifests: `writer.py` seals what is written here. Several processes may write
files of one segment, each the KV heads that it owns.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from kv_store.clusters import trim_padding
from kv_store.disk import TensorFile, dtype_name, encode_tensors
from kv_store.errors import DocumentDamaged, InvalidSegment
from kv_store.files import make_directory
from kv_store.layout import Layout, segment_file
from kv_store.manifest import FileEntry

# A segment of this size is written by several threads, a file each: copies from a GPU, checksums
# and the disk then wait for each other no longer.
_SMALL_BYTES = 64 << 20
_MAX_WRITERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentFiles:
    """Where the files of one document's segments are. digest: of the document's source."""

    directory: Path
    digest: str
    layout: Layout

    def write(
        self, segment_idx: int, heads: Mapping[int, Mapping[str, Tensor]]
    ) -> dict[int, FileEntry]:
        """Write the named tensors of some KV heads of a segment; returns what the manifest lists.

        Padding columns of cluster tensors that no layer uses are not stored. Tensors:
        docs/disk_format.md. Errors: InvalidSegment before anything is written; StoreFull,
        StoreNotWritable, StoreError.
        """
        self._check(segment_idx, heads)
        make_directory((self.directory / segment_file(segment_idx, 0)).parent)
        write = partial(self._write_head, segment_idx)
        num_bytes = sum(x.nbytes for tensors in heads.values() for x in tensors.values())
        if num_bytes < _SMALL_BYTES:
            return dict(zip(heads, map(write, heads, heads.values()), strict=True))
        with ThreadPoolExecutor(min(len(heads), _MAX_WRITERS)) as writers:
            entries = writers.map(write, heads, heads.values())
            return dict(zip(heads, entries, strict=True))

    def _write_head(
        self, segment_idx: int, kv_head_idx: int, tensors: Mapping[str, Tensor]
    ) -> FileEntry:
        encoded = encode_tensors(trim_padding(tensors), self._metadata(segment_idx, kv_head_idx))
        return encoded.write(self.directory, segment_file(segment_idx, kv_head_idx))

    def read(self, segment_idx: int, kv_head_idx: int) -> dict[str, Tensor]:
        """A file's tensors, checked, in host memory. Errors: DocumentDamaged."""
        with self._open(segment_idx, kv_head_idx) as file:
            return file.read_all()

    def check(self, segment_idx: int, kv_head_idx: int) -> FileEntry:
        """Read every byte of a file; returns its entry. Errors: DocumentDamaged."""
        with self._open(segment_idx, kv_head_idx) as file:
            file.check_all()
            path = segment_file(segment_idx, kv_head_idx)
            return FileEntry(path=path, size_bytes=file.size_bytes, digest=file.digest)

    def _open(self, segment_idx: int, kv_head_idx: int) -> TensorFile:
        path = segment_file(segment_idx, kv_head_idx)
        file = TensorFile(self.directory, path, expected=None)
        if not self._metadata(segment_idx, kv_head_idx).items() <= file.metadata.items():
            file.close()
            what = "belongs to another document or version"
            raise DocumentDamaged(document=self.directory.name, file=path, what=what)
        return file

    def _check(self, segment_idx: int, heads: Mapping[int, Mapping[str, Tensor]]) -> None:
        for kv_head_idx, tensors in heads.items():
            described = {n: (dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()}
            misfit = self.layout.find_misfit(segment_idx, described)
            if misfit is not None:
                raise InvalidSegment(
                    f"document {self.directory.name!r}: segment {segment_idx}: "
                    f"KV head {kv_head_idx}: {misfit}"
                )

    def _metadata(self, segment_idx: int, kv_head_idx: int) -> dict[str, str]:
        return {
            "source": self.digest,
            "segment_idx": str(segment_idx),
            "kv_head_idx": str(kv_head_idx),
        }

"""A document being ingested: segments are appended in order, and sealed when they are on disk.

Owns the order of writes and what a resume believes. Refuses to know names, locks' meaning and other
versions of the document: `store.py` decides what may be written and where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from kv_store.disk import EncodedFile, TensorFile, encode_tensors
from kv_store.document import read_checked
from kv_store.errors import DocumentDamaged, DocumentIncomplete, InvalidSegment
from kv_store.files import named_faults, remove_tree, sync_directory, write_atomic
from kv_store.layout import Layout, segment_file
from kv_store.lock import Lock
from kv_store.manifest import (
    MANIFEST_FILE,
    PARTIAL_FILE,
    TEXT_FILE,
    TOKENS_FILE,
    DocumentParams,
    FileEntry,
    Manifest,
    checksum,
    compute_document_hash,
    encode_manifest,
)
from kv_store.segments import SegmentFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a document is made from, encoded: enough to write it, or to compare it with another."""

    text: bytes
    tokens: EncodedFile
    manifest: Manifest

    @staticmethod
    def encode(
        params: DocumentParams,
        text: str,
        token_ids: Sequence[int],
        spans: Sequence[tuple[int, int]],
    ) -> Source:
        """Encode the inputs of an ingest.

        Errors: ValueError if there are no tokens, or not one span per token.
        """
        if not token_ids or len(token_ids) != len(spans):
            raise ValueError(f"{len(token_ids)} token ids and {len(spans)} spans")
        raw = text.encode()
        text_entry = FileEntry(path=TEXT_FILE, size_bytes=len(raw), digest=checksum(raw))
        tokens = encode_tensors(
            {
                "ids": torch.tensor(token_ids, dtype=torch.int32),
                "spans": torch.tensor(spans, dtype=torch.int32),
            },
            {"text_bytes": str(len(raw)), "text_checksum": text_entry.digest},
        )
        tokens_entry = FileEntry(
            path=TOKENS_FILE, size_bytes=tokens.size_bytes, digest=tokens.digest
        )
        manifest = Manifest(
            params=params,
            num_tokens=len(token_ids),
            files=(text_entry, tokens_entry),
            document_hash=None,
        )
        return Source(text=raw, tokens=tokens, manifest=manifest)

    def write(self, directory: Path) -> None:
        """Write text, tokens and partial.json into an existing directory."""
        write_atomic(directory / TEXT_FILE, [self.text])
        self.tokens.write(directory, TOKENS_FILE)
        write_atomic(directory / PARTIAL_FILE, [encode_manifest(self.manifest)])

    def mend(self, directory: Path) -> None:
        """Make a partial document's own files what they were when its ingest began.

        Damaged copies of text and tokens are written again; the manifest of a replacement that was
        finished but never swapped in goes, since a resume may discard segments that it lists.
        """
        text_entry, tokens_entry = self.manifest.files
        try:
            read_checked(directory, text_entry)
        except DocumentDamaged:
            write_atomic(directory / TEXT_FILE, [self.text])
        try:
            with TensorFile(directory, TOKENS_FILE, expected=tokens_entry) as file:
                file.check_all()
        except DocumentDamaged:
            self.tokens.write(directory, TOKENS_FILE)
        if (directory / MANIFEST_FILE).exists():
            write_atomic(directory / PARTIAL_FILE, [encode_manifest(self.manifest)])
            with named_faults(directory):
                (directory / MANIFEST_FILE).unlink()


class DocumentWriter:
    """An ingest in progress; nobody else ingests or removes the name until `close`.

    Closing before `finish` leaves a partial document that the next `Store.begin` resumes.
    """

    def __init__(
        self,
        directory: Path,
        source: Source,
        *,
        sealed: Sequence[FileEntry],
        lock: Lock,
        publish: Callable[[], None],
        document_hash: str | None,
    ) -> None:
        """Made by `Store.begin`. `publish` makes a finished directory the one that readers open."""
        self.name = directory.name
        self._directory = directory
        self._source = source
        self._sealed = list(sealed)
        self._lock = lock
        self._publish = publish
        self._document_hash = document_hash
        self._digest = source.manifest.source

    @property
    def layout(self) -> Layout:
        """Shapes of the document."""
        return self._source.manifest.layout

    @property
    def is_complete(self) -> bool:
        """Whether the document is finished, so that nothing is left to append."""
        return self._document_hash is not None

    @property
    def sealed_segments(self) -> int:
        """Segments on disk, counted from the first; the next one to append has this index."""
        return len(self._sealed) // self.layout.num_kv_heads

    @property
    def files(self) -> SegmentFiles:
        """The segment files, for whoever writes or reads some KV heads of them."""
        return SegmentFiles(directory=self._directory, digest=self._digest, layout=self.layout)

    def append_segment(self, segment_idx: int, heads: Sequence[Mapping[str, Tensor]]) -> None:
        """Write one segment, one mapping of named tensors per KV head, and seal it.

        Errors: those of `SegmentFiles.write` and `seal`, after which the segment is not sealed and
        the document can be resumed.
        """
        self._check_next(segment_idx, len(heads))
        entries = self.files.write(segment_idx, dict(enumerate(heads)))
        self.seal(segment_idx, entries)

    def seal(self, segment_idx: int, entries: Mapping[int, FileEntry]) -> None:
        """Count a segment as sealed: every KV head's file is on disk, whoever wrote it.

        Errors: InvalidSegment if it is not the next one, or a KV head is missing.
        """
        self._check_next(segment_idx, len(entries))
        self._sealed.extend(entries[kv_head_idx] for kv_head_idx in sorted(entries))

    def _check_next(self, segment_idx: int, num_heads: int) -> None:
        layout = self.layout
        where = f"document {self.name!r}: segment {segment_idx}"
        wanted = self.sealed_segments
        if self.is_complete or segment_idx != wanted or segment_idx >= layout.num_segments:
            raise InvalidSegment(
                f"{where} out of order; limit {wanted} of {layout.num_segments}; append in order"
            )
        if num_heads != layout.num_kv_heads:
            raise InvalidSegment(f"{where}: {num_heads} KV heads, wanted {layout.num_kv_heads}")

    def read_segment(self, segment_idx: int) -> list[dict[str, Tensor]]:
        """The stored form of a sealed segment, checked, one dict per KV head, in host memory.

        Errors: DocumentDamaged; InvalidSegment if it is not sealed.
        """
        if not 0 <= segment_idx < self.sealed_segments:
            raise InvalidSegment(
                f"document {self.name!r}: segment {segment_idx} is not sealed; "
                f"limit {self.sealed_segments} sealed segments; append it first"
            )
        return [self.files.read(segment_idx, head) for head in range(self.layout.num_kv_heads)]

    def finish(self) -> str:
        """Write the manifest, make the document readable, return the document hash.

        Errors: DocumentIncomplete while segments are missing; DocumentBusy if readers hold the
        version to be replaced (nothing is lost: finish again, or begin again, when they are done);
        StoreFull, StoreNotWritable, StoreError.
        """
        if self._document_hash is not None:
            return self._document_hash
        if self.sealed_segments < self.layout.num_segments:
            raise DocumentIncomplete(
                f"document {self.name!r}: {self.sealed_segments} segments sealed, limit "
                f"{self.layout.num_segments}; append the others first"
            )
        document_hash = compute_document_hash(self._digest, tuple(self._sealed))
        manifest = replace(
            self._source.manifest,
            files=(*self._source.manifest.files, *self._sealed),
            document_hash=document_hash,
        )
        write_atomic(self._directory / MANIFEST_FILE, [encode_manifest(manifest)])
        with named_faults(self._directory):
            (self._directory / PARTIAL_FILE).unlink(missing_ok=True)
            sync_directory(self._directory)
        self._publish()
        self._document_hash = document_hash
        return document_hash

    def close(self) -> None:
        """Let others ingest or remove the name; a second call does nothing."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def keep_sealed(directory: Path, source: Source) -> list[FileEntry]:
    """Entries of the leading segments that are whole; whatever comes after them is deleted.

    Every byte is read: a resume must not build on damage.
    """
    layout = source.manifest.layout
    files = SegmentFiles(directory=directory, digest=source.manifest.source, layout=layout)
    sealed: list[FileEntry] = []
    for segment_idx in range(layout.num_segments):
        try:
            sealed += [files.check(segment_idx, head) for head in range(layout.num_kv_heads)]
        except DocumentDamaged:
            break
    num_sealed = len(sealed) // layout.num_kv_heads
    for segment_idx in range(num_sealed, layout.num_segments):
        remove_tree((directory / segment_file(segment_idx, 0)).parent)
    return sealed

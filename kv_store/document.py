"""One finished document, open for reading under a shared lock.

Owns the rule that text, tokens and KV are checked against the manifest when they are first read.
Refuses to know devices: `device.py` brings the KV into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from kv_store.disk import TensorFile
from kv_store.errors import DocumentDamaged
from kv_store.files import TEMPORARY_SUFFIX
from kv_store.layout import Layout
from kv_store.lock import Lock
from kv_store.manifest import (
    MANIFEST_FILE,
    PARTIAL_FILE,
    TEXT_FILE,
    TOKENS_FILE,
    FileEntry,
    Manifest,
    checksum,
    decode_manifest,
)

DERIVED = "derived"


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged file (path relative to the document's directory) and what is wrong with it."""

    file: str
    what: str


class Document:
    """A finished document; nobody replaces or removes it until `close`.

    Reading anything raises DocumentDamaged, naming the file, if its bytes are not what was written.
    """

    def __init__(self, directory: Path, manifest: Manifest, lock: Lock) -> None:
        """Made by `Store.open`, which hands the lock over."""
        self.name = directory.name
        self.directory = directory
        self.manifest = manifest
        self._lock = lock
        self._text: str | None = None
        self._token_ids: list[int] | None = None
        self._spans: list[tuple[int, int]] | None = None

    @property
    def layout(self) -> Layout:
        """Its shapes."""
        return self.manifest.layout

    @property
    def hash(self) -> str:
        """The document hash, 32 hex digits."""
        assert self.manifest.document_hash is not None
        return self.manifest.document_hash

    @property
    def text(self) -> str:
        """The text that was ingested, without the frame."""
        if self._text is None:
            entry = self.manifest.file(TEXT_FILE)
            self._text = read_checked(self.directory, entry).decode()
        return self._text

    @property
    def token_ids(self) -> list[int]:
        """Ids of all N tokens, frame first."""
        if self._token_ids is None:
            self._read_tokens()
        assert self._token_ids is not None
        return self._token_ids

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and past-the-end character of each token in `text`, as they were given."""
        if self._spans is None:
            self._read_tokens()
        assert self._spans is not None
        return self._spans

    def _read_tokens(self) -> None:
        entry = self.manifest.file(TOKENS_FILE)
        with TensorFile(self.directory, TOKENS_FILE, expected=entry) as file:
            self._token_ids = file.read("ids").tolist()
            self._spans = [(first, end) for first, end in file.read("spans").tolist()]

    def open_head(self, segment_idx: int, kv_head_idx: int, *, verify: bool = True) -> TensorFile:
        """The file of one KV head of one segment, its header checked against the manifest."""
        entry = self.manifest.segment_entry(segment_idx, kv_head_idx)
        return TensorFile(self.directory, entry.path, expected=entry, verify=verify)

    def read_segment(self, segment_idx: int) -> list[dict[str, Tensor]]:
        """All tensors of a segment as they were appended, one dict per KV head, in host memory."""
        heads = []
        for kv_head_idx in range(self.layout.num_kv_heads):
            with self.open_head(segment_idx, kv_head_idx) as file:
                heads.append(file.read_all())
        return heads

    def verify(self) -> list[Damage]:
        """Read every byte of the document; list each damaged file, in path order."""
        return find_damage(self.directory)

    def close(self) -> None:
        """Give the document back; a second call does nothing."""
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


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a finished document, else that of a partial one.

    Errors: DocumentDamaged if neither is there or its checksum fails; FormatUnsupported.
    """
    for file in (MANIFEST_FILE, PARTIAL_FILE):
        path = directory / file
        if path.exists():
            return decode_manifest(_read(directory, file), document=directory.name, file=file)
    raise DocumentDamaged(document=directory.name, file=MANIFEST_FILE, what="missing")


def read_checked(directory: Path, entry: FileEntry) -> bytes:
    """The bytes of a plain file, checked against its entry.

    Errors: DocumentDamaged.
    """
    raw = _read(directory, entry.path)
    if len(raw) != entry.size_bytes or checksum(raw) != entry.digest:
        what = f"{len(raw)} bytes whose checksum does not match, wanted {entry.size_bytes} bytes"
        raise DocumentDamaged(document=directory.name, file=entry.path, what=what)
    return raw


def _read(directory: Path, file: str) -> bytes:
    try:
        return (directory / file).read_bytes()
    except FileNotFoundError:
        what = "missing"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    raise DocumentDamaged(document=directory.name, file=file, what=what)


def find_damage(directory: Path) -> list[Damage]:
    """Every file of a document, finished or not, whose bytes are not what was written.

    Derived files are left out: they are checked, and rebuilt, by whoever reads them. Without a
    usable manifest the other files are checked against themselves. Errors: FormatUnsupported.
    """
    found: list[Damage] = []
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(directory)
    except DocumentDamaged as error:
        found.append(Damage(error.file, error.what))
    entries = {entry.path: entry for entry in manifest.files} if manifest else {}
    on_disk = _list_files(directory)
    for file in sorted(on_disk | entries.keys()):
        if manifest is not None and manifest.is_complete and file not in entries:
            found.append(Damage(file, "not a file of this document"))
            continue
        try:
            _check_file(directory, file, entries.get(file))
        except DocumentDamaged as error:
            found.append(Damage(file, error.what))
    return sorted(found, key=lambda damage: damage.file)


def _list_files(directory: Path) -> set[str]:
    files = {p.relative_to(directory) for p in directory.rglob("*") if not p.is_dir()}
    return {
        file.as_posix()
        for file in files
        if file.parts[0] not in (DERIVED, MANIFEST_FILE, PARTIAL_FILE)
        and file.suffix != TEMPORARY_SUFFIX
    }


def _check_file(directory: Path, file: str, entry: FileEntry | None) -> None:
    if file.endswith(".safetensors"):
        with TensorFile(directory, file, expected=entry) as tensors:
            tensors.check_all()
    elif entry is not None:
        read_checked(directory, entry)
    elif file == TEXT_FILE:
        _check_text_by_tokens(directory)


def _check_text_by_tokens(directory: Path) -> None:
    """Check the text without a manifest: the token file says what it was made from."""
    try:
        with TensorFile(directory, TOKENS_FILE, expected=None) as tokens:
            size_bytes, digest = tokens.metadata["text_bytes"], tokens.metadata["text_checksum"]
    except DocumentDamaged:
        return  # reported under its own name; nothing is left to check the text with
    read_checked(directory, FileEntry(path=TEXT_FILE, size_bytes=int(size_bytes), digest=digest))

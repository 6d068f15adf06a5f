"""What a listing says about a document, finished or not, without opening it.

Owns `DocumentInfo`. Takes no lock and verifies nothing but manifests: a listing must work beside an
ingest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kv_store.document import read_manifest
from kv_store.errors import DocumentDamaged, FormatUnsupported
from kv_store.files import count_bytes
from kv_store.layout import segment_file
from kv_store.manifest import Manifest
from kv_store.paths import StorePaths


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentInfo:
    """One line of a listing. `damage` says why the manifest cannot be used; counts are then 0.

    `sealed_tokens` counts the leading segments whose files are all there; they are not verified.
    """

    name: str
    is_complete: bool
    num_tokens: int
    sealed_tokens: int
    disk_bytes: int
    model: str
    document_hash: str | None
    is_being_replaced: bool
    damage: str | None


Listing = list[DocumentInfo]


def describe_document(paths: StorePaths, name: str) -> DocumentInfo | None:
    """One document's line; None if it was removed meanwhile."""
    directory = paths.readable(name)
    if directory is None:
        return None
    manifest: Manifest | None = None
    damage: str | None = None
    try:
        manifest = read_manifest(directory)
    except DocumentDamaged as error:
        damage = f"{error.file}: {error.what}"
    except FormatUnsupported as error:
        damage = str(error)
    sealed = count_sealed(directory, manifest) if manifest else 0
    if not directory.is_dir():
        return None
    return DocumentInfo(
        name=name,
        is_complete=manifest is not None and manifest.is_complete,
        num_tokens=manifest.num_tokens if manifest else 0,
        sealed_tokens=manifest.layout.segment_span(sealed - 1)[1] if manifest and sealed else 0,
        disk_bytes=count_bytes(directory),
        model=manifest.params.model if manifest else "",
        document_hash=manifest.document_hash if manifest else None,
        is_being_replaced=directory != paths.replacement(name) and paths.replacement(name).is_dir(),
        damage=damage,
    )


def count_sealed(directory: Path, manifest: Manifest) -> int:
    """Leading segments whose files are all there, unverified."""
    layout = manifest.layout
    for segment_idx in range(layout.num_segments):
        for kv_head_idx in range(layout.num_kv_heads):
            if not (directory / segment_file(segment_idx, kv_head_idx)).is_file():
                return segment_idx
    return layout.num_segments

"""What an ingest may do with the document that is already there.

Owns the decisions between recognising, resuming, discarding and refusing. Changes nothing on disk.
"""

from __future__ import annotations

from pathlib import Path

from kv_store.document import find_damage, read_manifest
from kv_store.errors import DocumentDamaged, DocumentExists, FormatUnsupported, ResumeRefused
from kv_store.manifest import (
    ENVIRONMENT_FIELDS,
    MANIFEST_FILE,
    PARTIAL_FILE,
    Manifest,
    describe_differences,
)
from kv_store.writer import Source


def is_partial(directory: Path) -> bool:
    """Whether the directory never was a finished document, so that nothing is lost with it."""
    return (directory / PARTIAL_FILE).exists() and not (directory / MANIFEST_FILE).exists()


def find_same(directory: Path, source: Source, *, replace: bool) -> Manifest | None:
    """The manifest of a finished, usable document of this source; None if there is none.

    Errors: DocumentExists, or the damage, if something else is there and may not be replaced.
    """
    if not directory.is_dir():
        return None
    try:
        held = read_manifest(directory)
    except (DocumentDamaged, FormatUnsupported):
        if replace or is_partial(directory):
            return None
        raise
    if not held.is_complete:
        return None
    if held.source == source.manifest.source:
        return None if replace and find_damage(directory) else held
    if replace:
        return None
    raise DocumentExists(
        f"document {directory.name!r} already holds other input: "
        f"{describe_differences(held, source.manifest)}; one name holds one document; "
        "give another --name, or --replace"
    )


def is_disposable(directory: Path, source: Source, *, replace: bool, restart: bool) -> bool:
    """Whether a partial document gives way to an empty one, instead of being resumed.

    Errors: ResumeRefused, DocumentDamaged, FormatUnsupported if it may do neither.
    """
    if restart:
        return True
    try:
        held = read_manifest(directory)
    except (DocumentDamaged, FormatUnsupported):
        if replace:
            return True
        raise
    differences = describe_differences(held, source.manifest)
    if not differences:
        return False
    is_same_source = held.source == source.manifest.source
    if replace and not is_same_source:
        return True
    limit = f"same {', '.join(ENVIRONMENT_FIELDS)}" if is_same_source else "same input"
    remedy = "--restart" if is_same_source else "--restart or --replace"
    raise ResumeRefused(
        f"document {directory.name!r} is partly ingested otherwise: {differences}; "
        f"a resume needs the {limit}; repeat it as it was, or discard it with {remedy}"
    )

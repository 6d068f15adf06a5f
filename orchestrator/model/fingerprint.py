"""xxh3-128 fingerprints: of files by their bytes, of tokenizers by what they are made of.

Owns the byte order that is hashed. Refuses to know paths, times and library versions: a copy of a
model elsewhere has the same fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

_BLOCK_BYTES = 1 << 22


def fingerprint_files(paths: Iterable[Path]) -> str:
    """Return the hash of the files' bytes, one after the other, each behind its length."""
    hasher = xxhash.xxh3_128()
    for path in paths:
        hasher.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                hasher.update(block)
    return hasher.hexdigest()


def fingerprint_parts(parts: Iterable[bytes]) -> str:
    """Return the hash of byte strings, each behind its length."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()

"""Where a store keeps what, and which names a document may have.

Owns the directory names below the root. Refuses to know what is inside a document.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kv_store.errors import InvalidName
from kv_store.manifest import MANIFEST_FILE

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> None:
    """Refuse a name that is not one plain path component.

    Errors: InvalidName.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidName(
            f"document name {name!r}: limit 1 to 100 of A-Z a-z 0-9 . _ - and a letter or digit "
            "first; give such a name with --name"
        )


@dataclass(frozen=True, slots=True)
class StorePaths:
    """The directories of one store. Everything but documents is below a name with a dot.

    `document` what readers open; `replacement` the next version of a finished document, being
    built; `fresh` a directory being set up; `discarded` one being deleted.
    """

    root: Path

    def document(self, name: str) -> Path:
        return self.root / name

    def replacement(self, name: str) -> Path:
        return self.root / ".replacements" / name

    def fresh(self, name: str) -> Path:
        return self.root / ".fresh" / name

    def discarded(self, name: str) -> Path:
        return self.root / ".discarded" / name

    def read_lock(self, name: str) -> Path:
        """Shared while a document is open, exclusive while it is swapped or removed."""
        return self.root / ".locks" / f"{name}.read"

    def ingest_lock(self, name: str) -> Path:
        """Exclusive while a document is ingested or removed."""
        return self.root / ".locks" / f"{name}.ingest"

    def readable(self, name: str) -> Path | None:
        """The directory that readers of `name` open, or None if there is none.

        A swap that was cut between its two renames leaves only a finished replacement: that is it.
        """
        if self.document(name).is_dir():
            return self.document(name)
        replacement = self.replacement(name)
        return replacement if (replacement / MANIFEST_FILE).is_file() else None

    def names(self) -> list[str]:
        """Names of all documents, finished or not, sorted. An absent root has none."""
        found: set[str] = set()
        for folder in (self.root, self.root / ".replacements"):
            if folder.is_dir():
                found.update(p.name for p in folder.iterdir() if _NAME.fullmatch(p.name))
        return sorted(name for name in found if self.readable(name) is not None)

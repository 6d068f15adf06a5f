"""The store: a directory of documents, one writer a name, readers that are never surprised.

Owns names, locks and swaps, and carries out what `begin` makes of what it finds: nothing, a partial
document, the same one, or another. Refuses to know tensors. How versions are swapped:
docs/disk_format.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from kv_store.admission import find_same, is_disposable, is_partial
from kv_store.document import Damage, Document, find_damage, read_manifest
from kv_store.errors import DocumentIncomplete, DocumentNotFound, StoreError
from kv_store.files import make_directory, move, named_faults, remove_tree
from kv_store.listing import DocumentInfo, Listing, count_sealed, describe_document
from kv_store.lock import Lock
from kv_store.manifest import PARTIAL_FILE, DocumentParams, Manifest
from kv_store.paths import StorePaths, check_name
from kv_store.writer import DocumentWriter, Source, keep_sealed

# Inside the class, `list` is its method.
Damages = list[Damage]


class Store:
    """A directory of documents. Making the object touches nothing; writing creates it."""

    def __init__(self, root: Path) -> None:
        """`root` need not exist."""
        self.root = root
        self._paths = StorePaths(root)

    def list(self) -> Listing:
        """Every document by name: finished, partial and damaged ones."""
        found = [describe_document(self._paths, name) for name in self._paths.names()]
        return [info for info in found if info is not None]

    def find(self, name: str) -> DocumentInfo:
        """One document's line of the listing.

        Errors: InvalidName, DocumentNotFound.
        """
        self._find_directory(name)
        info = describe_document(self._paths, name)
        if info is None:
            raise self._not_found(name)
        return info

    def open(self, name: str) -> Document:
        """Open a finished document under a shared lock, held until its `close`.

        Errors: InvalidName, DocumentNotFound, DocumentIncomplete, DocumentDamaged (its manifest),
        FormatUnsupported, DocumentBusy (being removed or swapped).
        """
        with ExitStack() as undo:
            self._find_directory(name)
            lock = self._lock_reading(name, exclusive=False)
            undo.callback(lock.release)
            directory = self._find_directory(name)
            manifest = read_manifest(directory)
            if not manifest.is_complete:
                sealed = count_sealed(directory, manifest)
                raise DocumentIncomplete(
                    f"document {name!r}: ingest not finished, {sealed} of "
                    f"{manifest.layout.num_segments} segments sealed; run `longspan ingest` again "
                    f"with the same text and options and --name {name} to resume"
                )
            undo.pop_all()
            return Document(directory, manifest, lock)

    def verify(self, name: str) -> Damages:
        """Read every byte of a document, finished or not, damaged manifest or not.

        Returns each damaged file. Errors: InvalidName, DocumentNotFound, DocumentBusy,
        FormatUnsupported.
        """
        self._find_directory(name)
        lock = self._lock_reading(name, exclusive=False)
        try:
            return find_damage(self._find_directory(name))
        finally:
            lock.release()

    def remove(self, name: str) -> None:
        """Delete a document, partial or finished, and any replacement of it.

        Errors: InvalidName, DocumentNotFound, DocumentBusy (read or ingested by somebody),
        StoreNotWritable.
        """
        paths = self._paths
        self._find_directory(name)
        with ExitStack() as undo:
            undo.callback(self._lock_ingest(name).release)
            undo.callback(self._lock_reading(name, exclusive=True).release)
            self._find_directory(name)
            # The replacement first: while it stands alone, it passes for the document.
            for directory in (paths.replacement(name), paths.document(name)):
                self._discard(directory)
            remove_tree(paths.fresh(name))

    def begin(
        self,
        name: str,
        params: DocumentParams,
        text: str,
        token_ids: Sequence[int],
        spans: Sequence[tuple[int, int]],
        *,
        replace: bool = False,
        restart: bool = False,
    ) -> DocumentWriter:
        """Start, resume or recognise an ingest; the name is locked until the writer closes.

        A finished document of the same source makes a writer that is complete. `replace` builds
        another version beside a finished document and swaps it in at `finish`; it also rebuilds one
        that is damaged. `restart` discards a partial document. Errors: InvalidName, DocumentBusy,
        DocumentExists, ResumeRefused, DocumentDamaged, FormatUnsupported, StoreNotWritable,
        StoreFull.
        """
        check_name(name)
        source = Source.encode(params, text, token_ids, spans)
        make_directory(self.root)
        with ExitStack() as undo:
            lock = self._lock_ingest(name)
            undo.callback(lock.release)
            self._complete_swap(name)
            found = find_same(self._paths.document(name), source, replace=replace)
            if found is not None:
                writer = self._recognise(name, found, source, lock)
            else:
                writer = self._start(name, source, lock, replace=replace, restart=restart)
            undo.pop_all()
            return writer

    def _recognise(self, name: str, held: Manifest, source: Source, lock: Lock) -> DocumentWriter:
        """A writer with nothing left to do."""
        directory = self._paths.document(name)
        with named_faults(directory):
            # Left behind when a finish was cut right after the manifest.
            (directory / PARTIAL_FILE).unlink(missing_ok=True)
        return DocumentWriter(
            directory,
            source,
            sealed=held.segment_files,
            lock=lock,
            publish=_publish_in_place,
            document_hash=held.document_hash,
        )

    def _start(
        self, name: str, source: Source, lock: Lock, *, replace: bool, restart: bool
    ) -> DocumentWriter:
        """Continue the partial document of this source, or set up an empty one."""
        document, replacement = self._paths.document(name), self._paths.replacement(name)
        is_replacement = document.is_dir() and not is_partial(document)
        directory = replacement if is_replacement else document
        publish = partial(self._swap, name) if is_replacement else _publish_in_place
        if directory.is_dir() and not is_disposable(
            directory, source, replace=replace, restart=restart
        ):
            source.mend(directory)
            sealed = keep_sealed(directory, source)
        else:
            self._set_up(directory, source)
            sealed = []
        return DocumentWriter(
            directory, source, sealed=sealed, lock=lock, publish=publish, document_hash=None
        )

    def _set_up(self, directory: Path, source: Source) -> None:
        """Put an empty partial document in place of whatever partial one is there."""
        fresh = self._paths.fresh(directory.name)
        remove_tree(fresh)
        try:
            make_directory(fresh)
            source.write(fresh)
            self._discard(directory)
            move(fresh, directory)
        except StoreError:
            remove_tree(fresh)
            raise

    def _swap(self, name: str) -> None:
        """Make the finished replacement the document.

        Errors: DocumentBusy while the old version is open; nothing has changed then.
        """
        lock = self._lock_reading(name, exclusive=True)
        try:
            self._discard(self._paths.document(name))
            move(self._paths.replacement(name), self._paths.document(name))
        finally:
            lock.release()

    def _complete_swap(self, name: str) -> None:
        """Finish a swap that was cut after the old version had gone."""
        directory = self._paths.readable(name)
        if directory is not None and directory == self._paths.replacement(name):
            self._swap(name)
        remove_tree(self._paths.discarded(name))

    def _discard(self, directory: Path) -> None:
        """Delete a directory in one step as seen by others: rename it away first."""
        discarded = self._paths.discarded(directory.name)
        remove_tree(discarded)
        if directory.is_dir():
            move(directory, discarded)
            remove_tree(discarded)

    def _find_directory(self, name: str) -> Path:
        check_name(name)
        directory = self._paths.readable(name)
        if directory is None:
            raise self._not_found(name)
        return directory

    def _not_found(self, name: str) -> DocumentNotFound:
        return DocumentNotFound(
            f"document {name!r}: not in {self.root}; list documents with `longspan docs ls`, "
            f"or make it with `longspan ingest PATH --name {name}`"
        )

    def _lock_ingest(self, name: str) -> Lock:
        busy = (
            f"document {name!r} is being ingested or removed by another process; limit one at a "
            "time; wait for it, or stop it"
        )
        return Lock(self._paths.ingest_lock(name), exclusive=True, busy=busy)

    def _lock_reading(self, name: str, *, exclusive: bool) -> Lock:
        holder = "open in" if exclusive else "being removed or replaced by"
        busy = (
            f"document {name!r} is {holder} another process; limit none; try again when it is done"
        )
        return Lock(self._paths.read_lock(name), exclusive=exclusive, busy=busy)


def _publish_in_place() -> None:
    """A document ingested under its own name needs no swap."""

"""Faults of the store, as whoever runs Longspan meets them: owns their names, knows no exit codes.

Every message is one line: *what, value, limit, remedy*.

    StoreError
    |- InvalidName           a document name that is not one plain path component
    |- InvalidSegment        a segment that does not fit its document's layout
    |- DocumentNotFound      no document of that name
    |- DocumentIncomplete    its ingest has not finished; it can be resumed
    |- DocumentExists        the name holds another text or other parameters
    |- ResumeRefused         a partial document of other parameters, or made in another environment
    |- DocumentBusy          another process holds the lock
    |- DocumentDamaged       bytes on disk are not those that were written
    |- FormatUnsupported     written by another version of the format
    |- StoreNotWritable      permissions, read-only file system, a file where the store should be
    |- StoreFull             disk full, quota or file-size limit
"""

from __future__ import annotations


class StoreError(Exception):
    """Base of every fault of the store."""


class InvalidName(StoreError):
    """A document name that is not one plain path component."""


class InvalidSegment(StoreError):
    """A segment out of order, or with tensors that do not fit the document's layout."""


class DocumentNotFound(StoreError):
    """No document of that name."""


class DocumentIncomplete(StoreError):
    """The document's ingest has not finished."""


class DocumentExists(StoreError):
    """The name is taken by another text or other parameters."""


class ResumeRefused(StoreError):
    """The partial document cannot be continued with this input or in this environment."""


class DocumentBusy(StoreError):
    """Another process reads, ingests or removes the document."""


class DocumentDamaged(StoreError):
    """Bytes on disk are not those that were written.

    `file` is the path relative to the document's directory, `what` what is wrong with it.
    """

    def __init__(self, *, document: str, file: str, what: str) -> None:
        super().__init__(
            f"document {document!r} is damaged: {file}: {what}; "
            f"list all damage with `longspan docs verify {document}`, "
            "then ingest the text again with --replace"
        )
        self.document = document
        self.file = file
        self.what = what


class FormatUnsupported(StoreError):
    """A file written by another version of the format."""


class StoreNotWritable(StoreError):
    """The store's directory cannot be written."""


class StoreFull(StoreError):
    """Disk full, quota reached, or the process's file-size limit."""

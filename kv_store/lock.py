"""One `flock` on one file: shared for readers, exclusive for writers.

Owns the file descriptor. Refuses to know what the lock protects. The kernel drops the lock when the
process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from kv_store.errors import DocumentBusy
from kv_store.files import named_faults


class Lock:
    """A held lock; released by `release`, or when it is dropped."""

    def __init__(self, path: Path, *, exclusive: bool, busy: str) -> None:
        """Take the lock without waiting; `busy` is the message if somebody else holds it.

        Errors: DocumentBusy; StoreNotWritable if the lock file cannot be made.
        """
        self._fd: int | None = None
        with named_faults(path):
            fd = _open_lock_file(path)
            try:
                fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise DocumentBusy(busy) from None
        self._fd = fd

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        self.release()


def _open_lock_file(path: Path) -> int:
    # Read-only, so that whoever may only read a store can still lock an existing lock file.
    flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)

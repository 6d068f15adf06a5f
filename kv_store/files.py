"""Plain files: whole or absent, and every operating-system fault under its own name.

Owns atomic writes, directory fsync and the translation of errno. Refuses to know what the bytes
mean.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kv_store.errors import DocumentBusy, StoreError, StoreFull, StoreNotWritable

TEMPORARY_SUFFIX = ".tmp"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
# The disk begins with a piece of this size while the next is copied: by fsync alone it would hear
# of a file when all of it is there.
_PIECE_BYTES = 8 << 20


@contextmanager
def named_faults(path: Path) -> Iterator[None]:
    """Turn an OSError of the enclosed writes into StoreFull, StoreNotWritable or StoreError."""
    try:
        yield
    except OSError as error:
        raise _translate(error, path) from error


def _translate(error: OSError, path: Path) -> StoreError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return StoreFull(
            f"cannot write {path}: {reason}; free space or raise the file-size limit, "
            "then run the same command again: sealed segments are kept"
        )
    if error.errno in _NOT_WRITABLE:
        return StoreNotWritable(
            f"cannot write {path}: {reason}; choose a writable directory with --store"
        )
    if error.errno == errno.ENOTEMPTY:
        return DocumentBusy(f"cannot replace {path}: {reason}; try again when no one writes there")
    return StoreError(f"cannot write {path}: {reason}; check the disk, then run it again")


def write_atomic(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write `pieces` to `path` so that a reader, or a restart, sees all of them or the old file.

    Temporary name, fsync, rename, fsync of the directory. Errors: StoreFull, StoreNotWritable,
    StoreError; the temporary file is then gone.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with named_faults(path):
        try:
            _write_synced(temporary, pieces)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def _write_synced(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        start = 0
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                written = os.write(fd, rest[:_PIECE_BYTES])
                _start_writeback(fd, start, written)
                rest, start = rest[written:], start + written
        os.fsync(fd)
    finally:
        os.close(fd)


def _start_writeback(fd: int, start: int, num_bytes: int) -> None:
    """Have the disk begin with bytes that were just written, if the system can be asked to.

    Linux does so with dirty pages that are said to be no longer needed, and keeps them cached.
    """
    if num_bytes == _PIECE_BYTES and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, num_bytes, os.POSIX_FADV_DONTNEED)


def sync_directory(path: Path) -> None:
    """Make renames and removals inside `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create `path` and its parents; an existing directory is fine."""
    if path.is_dir():
        return
    with named_faults(path):
        path.mkdir(parents=True, exist_ok=True)
        sync_directory(path.parent)


def move(source: Path, target: Path) -> None:
    """Rename a directory to a name that does not exist, durably."""
    with named_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        sync_directory(target.parent)
        sync_directory(source.parent)


def remove_tree(path: Path) -> None:
    """Delete a directory with all it holds; an absent one is fine."""
    with named_faults(path):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            return
        sync_directory(path.parent)


def count_bytes(path: Path) -> int:
    """Bytes of all files below `path`; files that vanish while counting are skipped."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total

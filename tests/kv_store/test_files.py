"""Plain files: what the disk is told, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kv_store import files


def test_the_disk_begins_before_a_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(files, "_PIECE_BYTES", 10)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, advice: told.append(start))
    fsync = os.fsync

    def sync(fd: int) -> None:
        told.append("sync")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", sync)
    path, pieces = tmp_path / "file", [b"x" * 7, b"y" * 25, b"z" * 10]
    files.write_atomic(path, pieces)
    assert path.read_bytes() == b"".join(pieces)
    assert told == [7, 17, 32, "sync", "sync"]  # pieces that are whole; the file, its directory


def test_a_system_that_cannot_be_asked_writes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PIECE_BYTES", 10)
    monkeypatch.delattr(os, "posix_fadvise")
    files.write_atomic(tmp_path / "file", [b"x" * 25])
    assert (tmp_path / "file").read_bytes() == b"x" * 25

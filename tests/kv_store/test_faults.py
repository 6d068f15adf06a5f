"""Full disks, limits and permissions: named, and nothing finished is touched."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kv_store import (
    Store,
    StoreFull,
    StoreNotWritable,
    segments,
)
from tests.kv_store.tiny import NAME, ingest, make_input


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("small_bytes", [0, segments._SMALL_BYTES], ids=["threads", "one by one"])
def test_a_full_disk_leaves_a_document_that_can_be_resumed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    monkeypatch.setattr(segments, "_SMALL_BYTES", small_bytes)
    given = make_input()
    finished = make_input(salt=3)
    other = store.begin("done", given.params, given.text, given.token_ids, given.spans)
    with other:
        for segment_idx in range(3):
            other.append_segment(segment_idx, given.segment(segment_idx))
        other.finish()
    with finished.begin(store) as writer:
        writer.append_segment(0, finished.segment(0))
        with file_size_limit(3000), pytest.raises(StoreFull, match="File too large; free space"):
            writer.append_segment(1, finished.segment(1))
    assert not list(store.root.rglob("*.tmp"))
    assert store.find(NAME).sealed_tokens == 8
    assert store.verify("done") == []
    assert ingest(store, finished) == ingest(Store(tmp_path / "other"), finished)


def test_a_full_disk_at_the_start_leaves_nothing(store: Store) -> None:
    with file_size_limit(10), pytest.raises(StoreFull):
        make_input().begin(store)
    assert store.list() == []
    ingest(store, make_input())


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EACCES, StoreNotWritable),
        (errno.EROFS, StoreNotWritable),
    ],
)
def test_faults_of_the_file_system_have_names(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    given = make_input()

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with given.begin(store) as writer:
        monkeypatch.setattr(os, "write", fail)
        with pytest.raises(error, match=os.strerror(code)):
            writer.append_segment(0, given.segment(0))
        monkeypatch.undo()
        assert not list(store.root.rglob("*.tmp"))
        writer.append_segment(0, given.segment(0))


def test_a_store_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        store = Store(root)
        assert store.list() == []
        with pytest.raises(StoreNotWritable, match="choose a writable directory with --store"):
            make_input().begin(store)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not stop the superuser")
def test_a_store_without_write_permission(tmp_path: Path) -> None:
    root = tmp_path / "store"
    ingest(Store(root), make_input())
    root.chmod(0o500)
    try:
        with pytest.raises(StoreNotWritable):
            make_input(salt=1).begin(Store(root), replace=True)
        with Store(root).open(NAME) as document:
            assert document.verify() == []
    finally:
        root.chmod(0o700)

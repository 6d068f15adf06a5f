"""Who keeps whom out, across processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kv_store import (
    DocumentBusy,
    Store,
)
from tests.kv_store.tiny import NAME, ingest, make_input

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@contextmanager
def held_by_another_process(store: Store, verb: str) -> Iterator[int]:
    """A forked process that holds the document open, or ingests it; gives its process id."""
    (from_child, to_parent), (from_parent, to_child) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(to_child)
            held = store.open(NAME) if verb == "open" else make_input().begin(store)
            with held:
                os.write(to_parent, b"x")
                os.read(from_parent, 1)  # until the parent closes its end
        finally:
            os._exit(0)
    try:
        os.close(to_parent)
        assert os.read(from_child, 1) == b"x"
        yield child
    finally:
        os.close(to_child)
        os.waitpid(child, 0)
        os.close(from_child)
        os.close(from_parent)


def test_a_reader_keeps_others_from_removing(store: Store) -> None:
    ingest(store, make_input())
    with held_by_another_process(store, "open"):
        with pytest.raises(DocumentBusy, match="open in another process"):
            store.remove(NAME)
        with store.open(NAME) as document:
            assert document.verify() == []
    store.remove(NAME)


def test_an_ingest_keeps_others_from_ingesting_and_removing(store: Store) -> None:
    ingest(store, make_input())
    with held_by_another_process(store, "ingest"):
        for verb in (lambda: store.remove(NAME), lambda: make_input().begin(store)):
            with pytest.raises(DocumentBusy, match="being ingested or removed"):
                verb()
        store.open(NAME).close()
    store.remove(NAME)


def test_a_killed_process_holds_nothing(store: Store) -> None:
    ingest(store, make_input())
    with held_by_another_process(store, "open") as child:
        with pytest.raises(DocumentBusy):
            store.remove(NAME)
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        store.remove(NAME)


def test_a_dropped_writer_holds_nothing(store: Store) -> None:
    writer = make_input().begin(store)
    with pytest.raises(DocumentBusy):
        make_input().begin(store)
    del writer
    make_input().begin(store).close()

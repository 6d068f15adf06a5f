"""Killed at every system call that changes the store, then carried on: one hash, no loss."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kv_store import DocumentExists, DocumentIncomplete, DocumentWriter, ResumeRefused, Store
from tests.kv_store.tiny import NAME, Input, ingest, make_input

# The children are single-threaded where it matters: they only touch files.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

KILLED = 77
SMALL: dict[str, Any] = {"num_full_layers": 1, "num_sliding_layers": 0, "num_kv_heads": 1}
CALLS = ("fsync", "replace", "rename", "write", "unlink", "rmdir", "mkdir")


def die_at(num_calls: int) -> None:
    """End this process, as kill -9 would, instead of the n-th call that changes the disk."""
    left = num_calls

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(KILLED)
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def run_killed(num_calls: int, action: Callable[[], object]) -> int:
    """Exit status of `action` in a forked process that dies at its n-th changing call."""
    child = os.fork()
    if child == 0:
        try:
            die_at(num_calls)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_first_ingest_killed_anywhere(tmp_path: Path) -> None:
    given = make_input(12, **SMALL)
    wanted = ingest(Store(tmp_path / "undisturbed"), given)
    num_calls = 0
    status = KILLED
    while status == KILLED:
        store = Store(tmp_path / str(num_calls))
        status = run_killed(num_calls, partial(ingest, store, given))
        assert all(info.damage is None for info in store.list())
        assert all(store.verify(info.name) == [] for info in store.list())
        assert ingest(store, given) == wanted
        assert store.verify(NAME) == []
        num_calls += 1
    assert status == 0
    assert num_calls > 30


def test_a_replacement_killed_anywhere_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    old, new = make_input(12, **SMALL), make_input(12, salt=1, **SMALL)
    wanted = ingest(Store(tmp_path / "undisturbed"), new)
    first = ingest(Store(tmp_path / "old"), old)
    num_calls, status, seen = 0, KILLED, set()
    while status == KILLED:
        store = Store(shutil.copytree(tmp_path / "old", tmp_path / str(num_calls)))
        status = run_killed(num_calls, partial(ingest, store, new, replace=True))
        with store.open(NAME) as document:
            assert document.hash in (first, wanted)
            assert document.verify() == []
            seen.add(document.hash)
        assert ingest(store, new, replace=True) == wanted
        assert store.verify(NAME) == []
        assert not [p for p in store.root.glob(".discarded/*") if p.is_dir()]
        num_calls += 1
    assert status == 0
    assert seen == {first, wanted}


def test_a_removal_killed_anywhere_leaves_all_or_nothing(tmp_path: Path) -> None:
    given = make_input(12, **SMALL)
    ingest(Store(tmp_path / "whole"), given)
    num_calls, status = 0, KILLED
    while status == KILLED:
        store = Store(shutil.copytree(tmp_path / "whole", tmp_path / str(num_calls)))
        status = run_killed(num_calls, partial(store.remove, NAME))
        assert all(store.verify(info.name) == [] for info in store.list())
        ingest(store, given)
        assert store.verify(NAME) == []
        num_calls += 1
    assert status == 0
    assert num_calls > 5


def test_a_restart_killed_anywhere_leaves_a_partial_document_or_none(tmp_path: Path) -> None:
    given = make_input(12, **SMALL)
    with given.begin(Store(tmp_path / "partial")) as writer:
        writer.append_segment(0, given.segment(0))
    num_calls, status = 0, KILLED
    while status == KILLED:
        store = Store(shutil.copytree(tmp_path / "partial", tmp_path / str(num_calls)))
        status = run_killed(num_calls, partial(given.begin, store, restart=True))
        assert all(info.damage is None for info in store.list())
        with given.begin(store) as writer:
            assert writer.sealed_segments <= 1
        num_calls += 1
    assert status == 0


INPUTS = [make_input(12, salt=salt, **SMALL) for salt in range(2)]


class StoreMachine(RuleBasedStateMachine):
    """The store against a few variables: what is finished, and what is partly there."""

    @initialize()
    def set_up(self) -> None:
        self.store = Store(self.make_root())
        self.finished: Input | None = None
        self.partial: tuple[Input, int] | None = None  # beside the finished one, or alone
        self.writer: DocumentWriter | None = None
        self.hashes: dict[str, str] = {}

    make_root: Callable[[], Path]

    @precondition(lambda self: self.writer is None)
    @rule(given=st.sampled_from(INPUTS), replace=st.booleans(), restart=st.booleans())
    def begin(self, given: Input, replace: bool, restart: bool) -> None:
        if self.finished is given:
            with given.begin(self.store, replace=replace, restart=restart) as writer:
                assert writer.is_complete
            return
        if self.finished is not None and not replace:
            with pytest.raises(DocumentExists):
                given.begin(self.store, restart=restart)
            return
        held, num_sealed = self.partial or (given, 0)
        if held is not given and not (replace or restart):
            with pytest.raises(ResumeRefused):
                given.begin(self.store)
            return
        self.writer = given.begin(self.store, replace=replace, restart=restart)
        kept = 0 if restart or held is not given else num_sealed
        assert self.writer.sealed_segments == kept
        self.partial = given, kept

    @precondition(lambda self: self.writer is not None)
    @rule()
    def append_or_finish(self) -> None:
        assert self.writer is not None
        assert self.partial is not None
        given, num_sealed = self.partial
        if num_sealed < given.layout.num_segments:
            self.writer.append_segment(num_sealed, given.segment(num_sealed))
            self.partial = given, num_sealed + 1
            return
        document_hash = self.writer.finish()
        assert self.hashes.setdefault(given.text, document_hash) == document_hash
        self.finished, self.partial = given, None
        self.writer.close()
        self.writer = None

    @precondition(lambda self: self.writer is not None)
    @rule()
    def kill(self) -> None:
        self.writer = None  # dropped, not closed

    @precondition(lambda self: self.writer is None and (self.finished or self.partial))
    @rule()
    def remove(self) -> None:
        self.store.remove(NAME)
        self.finished = self.partial = None

    @invariant()
    def what_is_listed_and_read_is_what_was_done(self) -> None:
        infos = self.store.list()
        assert bool(infos) == bool(self.finished or self.partial)
        if self.finished is not None:
            with self.store.open(NAME) as document:
                assert document.text == self.finished.text
                assert document.hash == self.hashes[self.finished.text]
            assert infos[0].is_being_replaced == (self.partial is not None)
        elif self.partial is not None:
            given, num_sealed = self.partial
            expected = given.layout.segment_span(num_sealed - 1)[1] if num_sealed else 0
            assert (infos[0].is_complete, infos[0].sealed_tokens) == (False, expected)
            with pytest.raises(DocumentIncomplete):
                self.store.open(NAME)


def test_store_as_a_state_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    class Machine(StoreMachine):
        make_root = staticmethod(partial(tmp_path_factory.mktemp, "store"))

    run_state_machine_as_test(Machine, settings=settings(max_examples=25, stateful_step_count=20))

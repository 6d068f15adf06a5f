"""Partial documents: listed, refused, resumed, and discarded only when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kv_store import (
    DocumentBusy,
    DocumentDamaged,
    DocumentIncomplete,
    InvalidSegment,
    ResumeRefused,
    Store,
)
from tests.kv_store.tiny import NAME, Input, ingest, make_input


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def start(store: Store, given: Input, num_segments: int) -> None:
    """A partial document of that many sealed segments."""
    with given.begin(store) as writer:
        for segment_idx in range(num_segments):
            writer.append_segment(segment_idx, given.segment(segment_idx))


@pytest.mark.parametrize("num_segments", [0, 1, 3])
def test_a_partial_document_is_listed_and_refused_and_resumed(
    store: Store, num_segments: int
) -> None:
    given = make_input()
    start(store, given, num_segments)
    info = store.find(NAME)
    sealed = min(20, 8 * num_segments)
    assert (info.is_complete, info.sealed_tokens, info.num_tokens) == (False, sealed, 20)
    with pytest.raises(DocumentIncomplete, match=f"{num_segments} of 3 .*`longspan ingest`"):
        store.open(NAME)
    assert store.verify(NAME) == []
    with given.begin(store) as writer:
        assert writer.sealed_segments == num_segments
        for segment_idx in range(num_segments):
            for ours, theirs in zip(
                writer.read_segment(segment_idx), given.segment(segment_idx), strict=True
            ):
                assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        with pytest.raises(InvalidSegment, match="is not sealed"):
            writer.read_segment(num_segments)


def test_resumed_and_undisturbed_documents_have_one_hash(store: Store, tmp_path: Path) -> None:
    given = make_input()
    start(store, given, 1)
    start(store, given, 0)
    with given.begin(store) as writer:
        writer.append_segment(1, given.segment(1))
    undisturbed = Store(tmp_path / "other")
    assert ingest(store, given) == ingest(undisturbed, given)


@pytest.mark.parametrize("damage", ["cut", "missing", "flip"])
@pytest.mark.parametrize("segment_idx", [0, 1])
def test_a_resume_discards_damage_and_what_follows(
    store: Store, damage: str, segment_idx: int, tmp_path: Path
) -> None:
    given = make_input()
    start(store, given, 3)
    path = store.root / NAME / f"segments/{segment_idx:05d}/kv001.safetensors"
    raw = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        raw[-1] ^= 1
        path.write_bytes(raw if damage == "flip" else raw[:-1])
    with given.begin(store) as writer:
        assert writer.sealed_segments == segment_idx
    left = sorted(p.name for p in (store.root / NAME / "segments").iterdir())
    assert left == [f"{s:05d}" for s in range(segment_idx)]
    assert ingest(store, given) == ingest(Store(tmp_path / "other"), given)


def test_a_resume_discards_whole_segments_of_another_document(store: Store, tmp_path: Path) -> None:
    given, other = make_input(), Store(tmp_path / "other")
    start(store, given, 2)
    start(other, make_input(salt=1), 2)
    file = f"{NAME}/segments/00001/kv000.safetensors"
    (store.root / file).write_bytes((other.root / file).read_bytes())
    with given.begin(store) as writer:
        assert writer.sealed_segments == 1


@pytest.mark.parametrize("file", ["text.txt", "tokens.safetensors"])
def test_a_resume_mends_damaged_inputs(store: Store, file: str) -> None:
    given = make_input()
    start(store, given, 1)
    path = store.root / NAME / file
    path.write_bytes(path.read_bytes()[:-1])
    assert [d.file for d in store.verify(NAME)] == [file]
    ingest(store, given)
    assert store.verify(NAME) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": 2},
        {"mesh": "1x2"},
        {"machine": "other"},
        {"library_versions": {"torch": "1"}},
    ],
)
def test_a_resume_elsewhere_needs_restart(store: Store, changes: dict[str, Any]) -> None:
    start(store, make_input(), 1)
    other = make_input(**changes)
    with pytest.raises(ResumeRefused, match=f"{next(iter(changes))} .*--restart$"):
        other.begin(store)
    with make_input().begin(store) as writer:
        assert writer.sealed_segments == 1
    with other.begin(store, restart=True) as writer:
        assert writer.sealed_segments == 0


@pytest.mark.parametrize("option", ["restart", "replace"])
@pytest.mark.parametrize("other", [make_input(salt=1), make_input(chunk_tokens=2)])
def test_a_partial_document_of_other_input_is_not_continued(
    store: Store, other: Input, option: str
) -> None:
    start(store, make_input(), 2)
    with pytest.raises(ResumeRefused, match="--restart or --replace"):
        other.begin(store)
    with make_input().begin(store) as writer:
        assert writer.sealed_segments == 2
    with other.begin(store, **{option: True}) as writer:
        assert writer.sealed_segments == 0


def test_a_damaged_partial_json_is_refused_and_discarded(store: Store) -> None:
    given = make_input()
    start(store, given, 1)
    (store.root / NAME / "partial.json").write_text("x")
    with pytest.raises(DocumentDamaged, match=r"partial\.json"):
        given.begin(store)
    with given.begin(store, restart=True) as writer:
        assert writer.sealed_segments == 0


def test_a_finish_cut_after_the_manifest_is_finished(store: Store) -> None:
    old, new = make_input(), make_input(salt=1)
    with old.begin(store) as writer:
        left_behind = (store.root / NAME / "partial.json").read_bytes()
    first = ingest(store, old)
    (store.root / NAME / "partial.json").write_bytes(left_behind)
    with new.begin(store, replace=True) as writer:
        writer.append_segment(0, new.segment(0))
    with store.open(NAME) as document:
        assert document.hash == first
    with old.begin(store) as writer:
        assert writer.is_complete
    assert not (store.root / NAME / "partial.json").exists()


def test_a_swap_cut_between_its_renames_is_ended(store: Store) -> None:
    new = make_input(salt=1)
    document_hash = ingest(store, new)
    replacement = store.root / ".replacements" / NAME
    replacement.parent.mkdir()
    (store.root / NAME).rename(replacement)
    assert [info.name for info in store.list()] == [NAME]
    with store.open(NAME) as document:
        assert document.hash == document_hash
        with pytest.raises(DocumentBusy):
            new.begin(store)
    with new.begin(store) as writer:
        assert writer.is_complete
    assert not replacement.exists()
    assert store.verify(NAME) == []


def test_a_damaged_replacement_is_not_taken_for_a_finished_one(store: Store) -> None:
    ingest(store, make_input())
    new = make_input(salt=1)
    with store.open(NAME), pytest.raises(DocumentBusy):
        ingest(store, new, replace=True)
    replacement = store.root / ".replacements" / NAME
    (replacement / "segments/00001/kv000.safetensors").unlink()
    with new.begin(store, replace=True) as writer:
        assert writer.sealed_segments == 1
        assert not (replacement / "manifest.json").exists()

"""What goes in comes out; names, replacements, hashes and misfits."""

from __future__ import annotations

from pathlib import Path

import pytest

from kv_store import (
    DocumentBusy,
    DocumentDamaged,
    DocumentExists,
    DocumentIncomplete,
    DocumentNotFound,
    InvalidName,
    InvalidSegment,
    Store,
    segments,
)
from tests.kv_store.tiny import NAME, Input, document_files, ingest, make_input


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_document_comes_back_as_it_went_in(store: Store) -> None:
    given = make_input()
    document_hash = ingest(store, given)
    with store.open(NAME) as document:
        assert document.text == given.text
        assert document.token_ids == given.token_ids
        assert document.spans == given.spans
        assert document.hash == document_hash
        assert document.manifest.params == given.params
        assert document.verify() == []
    info = store.find(NAME)
    assert store.list() == [info]
    assert (info.is_complete, info.sealed_tokens, info.num_tokens) == (True, 20, 20)
    assert (info.model, info.document_hash, info.damage) == ("tiny", document_hash, None)
    assert info.disk_bytes > given.layout.kv_bytes


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc", ".x", "-x", "a b", "é", "a" * 101, "a\n", "a\0"]
)
def test_names_that_are_not_one_plain_component(store: Store, name: str) -> None:
    given = make_input()
    for verb in (store.open, store.find, store.remove, store.verify):
        with pytest.raises(InvalidName, match="give such a name with --name"):
            verb(name)
    with pytest.raises(InvalidName):
        store.begin(name, given.params, given.text, given.token_ids, given.spans)
    assert not store.root.exists()


def test_unknown_documents_name_their_remedy(store: Store) -> None:
    for verb in (store.open, store.find, store.remove, store.verify):
        with pytest.raises(DocumentNotFound, match="longspan docs ls"):
            verb("nothing")
    assert store.list() == []
    assert not store.root.exists()


def test_identical_input_is_a_no_op(store: Store) -> None:
    given = make_input()
    document_hash = ingest(store, given)
    for options in ({}, {"replace": True}, {"restart": True}):
        with given.begin(store, **options) as writer:
            assert writer.is_complete
            assert writer.sealed_segments == 3
            assert writer.finish() == document_hash
            with pytest.raises(InvalidSegment, match="out of order"):
                writer.append_segment(3, given.segment(0))


def test_another_environment_does_not_make_another_document(store: Store) -> None:
    ingest(store, make_input())
    with make_input(library_versions={"torch": "9"}, threads=7).begin(store) as writer:
        assert writer.is_complete


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (make_input(salt=1), "other text"),
        (make_input(window=4), "window 3, asked 4"),
        (make_input(selector={"name": "window"}), "selector"),
    ],
)
def test_other_input_needs_replace(store: Store, other: Input, named: str) -> None:
    first = ingest(store, make_input())
    with pytest.raises(DocumentExists, match=f"{named}.*--replace"):
        other.begin(store)
    with pytest.raises(DocumentExists):
        other.begin(store, restart=True)
    second = ingest(store, other, replace=True)
    assert second != first
    with store.open(NAME) as document:
        assert document.hash == second
    assert store.verify(NAME) == []


def test_the_old_document_is_readable_until_the_new_one_is_finished(store: Store) -> None:
    old, new = make_input(), make_input(salt=1)
    first = ingest(store, old)

    def check(_: int) -> None:
        with store.open(NAME) as document:
            assert document.hash == first
            assert document.verify() == []
        assert store.find(NAME).is_being_replaced

    second = ingest(store, new, replace=True, on_segment=check)
    assert store.find(NAME).document_hash == second
    assert not store.find(NAME).is_being_replaced


def test_a_replacement_waits_for_readers_and_loses_nothing(store: Store) -> None:
    ingest(store, make_input())
    new = make_input(salt=1)
    with store.open(NAME) as document:
        with pytest.raises(DocumentBusy, match="open in another process"):
            ingest(store, new, replace=True)
        assert document.verify() == []
    with new.begin(store, replace=True) as writer:
        assert writer.sealed_segments == 3
        document_hash = writer.finish()
    assert store.find(NAME).document_hash == document_hash


def test_a_replacement_is_resumed(store: Store) -> None:
    ingest(store, make_input())
    new = make_input(salt=1)
    with new.begin(store, replace=True) as writer:
        writer.append_segment(0, new.segment(0))
    with new.begin(store, replace=True) as writer:
        assert writer.sealed_segments == 1
    with make_input(salt=2).begin(store, replace=True) as writer:
        assert writer.sealed_segments == 0


def test_a_damaged_document_is_rebuilt_by_replace(store: Store) -> None:
    given = make_input()
    document_hash = ingest(store, given)
    path = store.root / NAME / "segments/00001/kv001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert ingest(store, given, replace=True) == document_hash
    assert store.verify(NAME) == []
    (store.root / NAME / "manifest.json").write_text("{}")
    with pytest.raises(DocumentDamaged, match="--replace"):
        given.begin(store)
    assert ingest(store, given, replace=True) == document_hash


def test_the_hash_says_what_the_document_is_and_nothing_else(tmp_path: Path) -> None:
    def hash_of(given: Input, place: str) -> str:
        return ingest(Store(tmp_path / place), given)

    base = hash_of(make_input(), "base")
    same = make_input(threads=9, mesh="2x2", machine="x", library_versions={"torch": "9"})
    assert hash_of(same, "same") == base
    others = [
        make_input(salt=1),
        make_input(19),
        make_input(model_fingerprint="m2"),
        make_input(kv_dtype="bfloat16"),
        make_input(selector={"name": "centroid", "keys_per_cluster": 3}),
    ]
    hashes = [hash_of(other, f"other{idx}") for idx, other in enumerate(others)]
    assert len({base, *hashes}) == 1 + len(others)


def test_a_changed_tensor_changes_the_hash(store: Store, tmp_path: Path) -> None:
    given = make_input()
    hashes = {ingest(store, given)}
    for name in given.segment(0)[0]:
        other = Store(tmp_path / name)
        with given.begin(other) as writer:
            for segment_idx in range(3):
                heads = given.segment(segment_idx)
                heads[1][name][-1, -1] += 1
                writer.append_segment(segment_idx, heads)
            hashes.add(writer.finish())
    assert len(hashes) == 1 + len(given.segment(0)[0])


def test_several_writers_leave_the_bytes_of_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, other = make_input(num_kv_heads=5), Store(tmp_path / "other")
    alone = ingest(store, given)
    monkeypatch.setattr(segments, "_SMALL_BYTES", 0)
    monkeypatch.setattr(segments, "_MAX_WRITERS", 3)
    assert ingest(other, given) == alone
    ours, theirs = ([p.read_bytes() for p in document_files(s.root)] for s in (store, other))
    assert ours == theirs


def test_finish_refuses_a_document_with_holes(store: Store) -> None:
    given = make_input()
    with given.begin(store) as writer:
        with pytest.raises(DocumentIncomplete, match="0 segments sealed, limit 3"):
            writer.finish()
        with pytest.raises(InvalidSegment, match="segment 1 out of order; limit 0 of 3"):
            writer.append_segment(1, given.segment(1))


def test_segments_that_do_not_fit_are_refused(store: Store) -> None:
    given = make_input()
    heads = given.segment(0)
    with given.begin(store) as writer:
        with pytest.raises(InvalidSegment, match="1 KV heads, wanted 2"):
            writer.append_segment(0, heads[:1])
        for name, wrong in (
            ("k", heads[0]["k"][:, :-1]),
            ("v", heads[0]["v"].bfloat16()),
            ("positions", heads[0]["positions"].long()),
            ("sliding_k", heads[0]["sliding_k"][:, :-1]),
            ("centroids", heads[0]["centroids"][:, :, :-1]),
            ("radii", heads[0]["radii"][:, :0]),
            ("unheard_of", heads[0]["k"]),
        ):
            with pytest.raises(InvalidSegment, match=name):
                writer.append_segment(0, [{**heads[0], name: wrong}, heads[1]])
        assert writer.sealed_segments == 0


def test_removing(store: Store) -> None:
    ingest(store, make_input())
    with make_input(salt=1).begin(store, replace=True) as writer:
        writer.append_segment(0, make_input(salt=1).segment(0))
    store.remove(NAME)
    assert store.list() == []
    left = [path for path in store.root.rglob("*") if path.is_file()]
    assert all(path.parent.name == ".locks" for path in left)

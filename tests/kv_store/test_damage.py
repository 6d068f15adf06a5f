"""A document with any byte changed or cut: named by verify, refused by every reader."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kv_store import Damage, DocumentDamaged, FormatUnsupported, Store, load_resident
from kv_store.manifest import checksum
from tests.kv_store.tiny import NAME, document_files, ingest, make_input


@contextmanager
def damaged(path: Path, raw: bytes) -> Iterator[None]:
    """Replace a file's bytes for a while."""
    whole = path.read_bytes()
    path.write_bytes(raw)
    try:
        yield
    finally:
        path.write_bytes(whole)


def flips(raw: bytes, rng: random.Random) -> Iterator[bytes]:
    """Every third byte of the file, and its last one, with one of its bits flipped."""
    for idx in [*range(0, len(raw), 3), len(raw) - 1]:
        changed = bytearray(raw)
        changed[idx] ^= 1 << rng.randrange(8)
        yield bytes(changed)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    ingest(store, make_input(12, num_kv_heads=1, num_full_layers=1, head_dim=2))
    return store


def files(store: Store) -> list[str]:
    return [str(p.relative_to(store.root / NAME)) for p in document_files(store.root)]


def use_everything(store: Store) -> None:
    with store.open(NAME) as document:
        assert document.text
        assert document.token_ids
        load_resident(document, dtype=torch.float32, device="cpu", num_threads=1)


def test_the_fixture_is_sound(store: Store) -> None:
    assert store.verify(NAME) == []
    assert len(files(store)) == 5
    use_everything(store)


def test_verify_names_the_file_for_a_flipped_bit(store: Store) -> None:
    rng = random.Random(7)
    for file in files(store):
        path = store.root / NAME / file
        for raw in flips(path.read_bytes(), rng):
            with damaged(path, raw):
                assert {d.file for d in store.verify(NAME)} == {file}


def test_verify_names_the_file_for_a_cut(store: Store) -> None:
    for file in files(store):
        path = store.root / NAME / file
        whole = path.read_bytes()
        for length in [*range(0, len(whole), 7), len(whole) - 1]:
            with damaged(path, whole[:length]):
                assert {d.file for d in store.verify(NAME)} == {file}
        with damaged(path, whole + b"\0"):
            assert {d.file for d in store.verify(NAME)} == {file}


def test_no_reader_gets_bytes_that_fail(store: Store) -> None:
    rng = random.Random(8)
    for file in files(store):
        path = store.root / NAME / file
        raws = list(flips(path.read_bytes(), rng))
        for raw in rng.sample(raws, min(len(raws), 120)):
            with damaged(path, raw), pytest.raises(DocumentDamaged) as caught:
                use_everything(store)
            assert caught.value.file == file


@pytest.mark.parametrize("file", ["manifest.json", "text.txt", "segments/00001/kv000.safetensors"])
def test_missing_and_unknown_files(store: Store, file: str) -> None:
    path = store.root / NAME / file
    aside = store.root / ".aside"
    path.rename(aside)
    assert store.verify(NAME) == [Damage(file, "missing")]
    shutil.copy(aside, path)
    aside.unlink()
    stray = path.with_name("stray.txt")
    with damaged_stray(stray):
        found = store.verify(NAME)
    assert [d.what for d in found] == ["not a file of this document"]


@contextmanager
def damaged_stray(path: Path) -> Iterator[None]:
    path.write_text("x")
    yield
    path.unlink()


def test_damage_beside_a_damaged_manifest_is_found_too(store: Store) -> None:
    directory = store.root / NAME
    text = (directory / "text.txt").read_bytes()
    with damaged(directory / "manifest.json", b"{}"), damaged(directory / "text.txt", text[:-1]):
        assert {d.file for d in store.verify(NAME)} == {"manifest.json", "text.txt"}
        with pytest.raises(DocumentDamaged, match=r"manifest\.json: checksum does not match"):
            store.open(NAME)
        assert store.list()[0].damage == "manifest.json: checksum does not match"


def test_a_whole_file_of_another_document_is_refused(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path)
    ingest(other, make_input(12, salt=1, num_kv_heads=1, num_full_layers=1, head_dim=2))
    file = "segments/00000/kv000.safetensors"
    with damaged(store.root / NAME / file, (tmp_path / NAME / file).read_bytes()):
        assert [d.file for d in store.verify(NAME)] == [file]
        with pytest.raises(DocumentDamaged, match="belongs to another document or version"):
            use_everything(store)


def test_another_format_version_is_refused_by_name(store: Store) -> None:
    path = store.root / NAME / "manifest.json"
    raw = bytearray(path.read_bytes().replace(b'"format_version": 2', b'"format_version": 9'))
    raw[-36:-4] = b"0" * 32
    raw[-36:-4] = checksum(bytes(raw)).encode()
    with damaged(path, bytes(raw)):
        with pytest.raises(FormatUnsupported, match="format version 9, limit 2; ingest"):
            store.open(NAME)
        damage = store.list()[0].damage
        assert damage is not None
        assert "format version 9" in damage

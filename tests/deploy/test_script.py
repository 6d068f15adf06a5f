"""The entry point as a script: exit codes, signals, and answers that are whole or not there.

With a `longspan` that computes nothing; `test_job.py` runs the real one.
"""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.kubelet import Container, prepare
from tests.deploy.manifests import DEPLOY, JOB, built, find_worker
from tests.deploy.stub import Stub

ANSWERS = "/data/answers/book.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A prepared container with a stub in it."""

    container: Container
    stub: Stub

    def answers(self) -> str | None:
        """The answers file, if it is there."""
        file = self.container.at(ANSWERS)
        return file.read_text() if file.exists() else None


def make(tmp_path: Path, **changed: str) -> Run:
    """The Job's container with a stub for `longspan`."""
    stub = Stub.make(tmp_path / "bin")
    container = prepare(
        find_worker(JOB),
        built(JOB),
        tmp_path / "root",
        changed=changed,
        programs=stub.folder,
    )
    return Run(container=container, stub=stub)


def test_it_is_a_script_of_bash() -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "common" / "job.sh")], check=True)


def test_answers_are_there_when_all_is_done(tmp_path: Path) -> None:
    run = make(tmp_path)
    done = run.container.run()
    assert (done.returncode, done.stdout) == (0, "")
    assert run.answers() == '{"answer": "first"}\n'
    assert not run.container.at(f"{ANSWERS}.partial").exists()


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_failed_ingest_ends_it_with_its_code(tmp_path: Path, code: int) -> None:
    run = make(tmp_path, STUB_CODE_INGEST=str(code))
    assert run.container.run().returncode == code
    assert len(run.stub.calls()) == 1
    assert run.answers() is None


def test_half_the_answers_are_no_answers(tmp_path: Path) -> None:
    run = make(tmp_path, STUB_CODE_ASK="1")
    run.container.at(ANSWERS).parent.mkdir()
    run.container.at(ANSWERS).write_text("of an earlier run\n")
    assert run.container.run().returncode == 1
    assert run.answers() == "of an earlier run\n"


@pytest.mark.parametrize("changed", [{"JOB_MODEL": ""}, {"JOB_EXECUTOR": "slurm"}])
def test_what_is_missing_or_unknown_is_wrong_usage(tmp_path: Path, changed: dict[str, str]) -> None:
    run = make(tmp_path, **changed)
    done = run.container.run()
    assert done.returncode == 2
    assert next(iter(changed)) in done.stderr
    assert run.stub.calls() == []


def test_a_signal_reaches_the_command_and_ends_the_rest(tmp_path: Path) -> None:
    run = make(tmp_path, STUB_WAIT="yes")
    process = run.container.start()
    for _ in range(200):
        if run.stub.notes():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    # It waited for the command, which ended in its own time, and did not begin the next one.
    assert run.stub.notes()[1:] == ["SIGTERM", "ended"]
    _, stderr = process.communicate()
    assert "run it again to resume" in stderr
    assert run.answers() is None


@pytest.mark.parametrize("path", ["/etc/longspan/job/more", "/etc/longspan/job/job.sh", "/opt"])
def test_what_a_read_only_file_system_refuses_is_told(tmp_path: Path, path: str) -> None:
    run = make(tmp_path)
    run.container.at(path).parent.mkdir(exist_ok=True)
    assert run.container.changed_elsewhere() == {}
    run.container.at(path).unlink(missing_ok=True)
    run.container.at(path).write_text("x")
    run.container.at("/tmp/x").write_text("x")
    assert run.container.changed_elsewhere() == {run.container.at(path): b"x"}

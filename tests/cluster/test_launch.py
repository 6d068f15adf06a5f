"""`longspan launch`: torchrun's variables, rank 0's output untouched, one error, nobody left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.cli import main
from tests.cluster.programs import (
    WITH_CHILD,
    is_running,
    is_stopped,
    read_pids,
    wait_until,
    wait_until_gone,
)
from tests.source import ROOT

LAUNCH = (sys.executable, "-m", "orchestrator", "launch")
JOINER = (sys.executable, "-m", "tests.cluster.joiner")
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


@contextmanager
def launched(*arguments: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher as a process of its own, killed at the end."""
    process = subprocess.Popen(
        [*LAUNCH, *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run(*arguments: str, given: str = "", **environ: str) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr of a launcher."""
    with launched(*arguments, **environ) as process:
        stdout, stderr = process.communicate(given, timeout=60)
    return process.returncode, stdout, stderr.splitlines()


def test_ranks_find_the_variables_of_torchrun() -> None:
    mesh = ("--nproc", "3", "--mesh", "1x3")
    code, stdout, stderr = run(*mesh, "--", sys.executable, "-c", SHOW, OMP_NUM_THREADS="5")
    assert code == 0
    seen = [json.loads(stdout)]
    for line in sorted(stderr):
        label, _, text = line.partition("] ")
        assert label == f"[rank {len(seen)}"
        seen.append(json.loads(text))
    for rank, environ in enumerate(seen):
        assert environ["RANK"] == environ["LOCAL_RANK"] == str(rank)
        assert environ["WORLD_SIZE"] == environ["LOCAL_WORLD_SIZE"] == "3"
        assert environ["MASTER_ADDR"] == "127.0.0.1"
        assert (environ["LONGSPAN_MESH"], environ["OMP_NUM_THREADS"]) == ("1x3", "5")
    assert len({environ["MASTER_PORT"] for environ in seen}) == 1


def test_threads_share_the_cores_and_no_store_is_expected() -> None:
    environ = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        _, stdout, _ = run("--nproc", "1", sys.executable, "-c", SHOW, **environ)
    seen = json.loads(stdout)
    assert seen["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert "LONGSPAN_MESH" not in seen
    assert "TORCHELASTIC_USE_AGENT_STORE" not in seen


def test_rank_0_has_the_input_and_the_output() -> None:
    code, stdout, stderr = run(
        "--nproc", "2", "--", "sh", "-c", "cat; echo e$RANK >&2", given="one\ntwo"
    )
    assert (code, stdout) == (0, "one\ntwo")
    assert sorted(stderr) == ["[rank 0] e0", "[rank 1] e1"]


@pytest.mark.parametrize(
    ("script", "code", "how"),
    [
        ("echo broken >&2; exit 7", 7, "exit code 7: broken"),
        ("kill -KILL $$", 137, "killed by SIGKILL: it said nothing"),
    ],
)
def test_the_first_failure_is_named_and_gives_the_code(script: str, code: int, how: str) -> None:
    # Rank 0 ends first, but only because a peer was lost.
    lost = "barrier: rank 0 lost rank 1 (closed); limit 3 s an operation; read the log"
    both = f'if [ $RANK = 1 ]; then sleep 0.3; {script}; fi; echo "longspan: {lost}" >&2; exit 1'
    got, stdout, stderr = run("--nproc", "2", "--", "sh", "-c", both)
    assert (got, stdout) == (code, "")
    assert stderr[-1].startswith(f"longspan: launch: rank 1 of 2 failed first, {how}; limit ")


def test_a_lost_peer_is_reported_where_nothing_else_failed() -> None:
    lost = "barrier: rank 0 lost rank 1 (closed)"
    script = f'test $RANK = 1 || {{ echo "{lost}" >&2; exit 3; }}'
    code, _, stderr = run("--nproc", "2", "--", "sh", "-c", script)
    assert code == 3
    assert stderr[-1].startswith(f"longspan: launch: rank 0 of 2 failed first, exit code 3: {lost}")


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--nproc", "0", "true"], "0"),
        (["true"], "--nproc"),
        (["--nproc", "2"], "COMMAND"),
        (["--nproc", "2", "--port", "70000", "true"], "70000"),
        (["--nproc", "2", "--mesh", "1x3", "true"], "1x3"),
        (["--nproc", "2", "--mesh", "auto", "true"], "1x1"),
        (["--nproc", "2", "--mesh", "two", "true"], "'two'"),
        (["--nproc", "2", "--", "no-such-program"], "'no-such-program'"),
    ],
)
def test_misuse_is_one_line_and_starts_nothing(
    arguments: list[str], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("longspan: ")
    assert value in line
    assert captured.out == ""


def test_a_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert main(["launch", "--nproc", "2", "--port", str(port), "echo", "ran"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"longspan: port {port} of 127.0.0.1: in use; limit ")
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_ranks(tmp_path: Path, number: signal.Signals) -> None:
    script = f"trap 'echo caught >&2; exit 9' {number.name[3:]}; {WITH_CHILD} wait"
    with launched("--nproc", "2", "--", "bash", "-c", script, PIDS=str(tmp_path / "p")) as process:
        found = read_pids(tmp_path / "p", num_ranks=2)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 9
    assert {"[rank 0] caught", "[rank 1] caught"} <= set(stderr.splitlines())
    wait_until_gone(found)


def test_a_killed_launcher_leaves_nobody(tmp_path: Path) -> None:
    script = WITH_CHILD + "test $RANK = 0 || kill -STOP $$; wait"
    with launched("--nproc", "2", "--", "bash", "-c", script, PIDS=str(tmp_path / "p")) as process:
        found = read_pids(tmp_path / "p", num_ranks=2)
        wait_until(lambda: is_stopped(found[2]))
        assert all(is_running(pid) for pid in found)
        process.kill()
    wait_until_gone(found)


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [
        # The survivor says whom it lost, at once or after the deadline.
        (signal.SIGKILL, 137, "rank 1 of 2 failed first, killed by SIGKILL: it said nothing"),
        (signal.SIGSTOP, 143, "rank 1 of 2 failed first, killed by SIGTERM after it did not end"),
    ],
)
def test_a_lost_rank_ends_those_that_met_it(
    tmp_path: Path, number: signal.Signals, code: int, text: str
) -> None:
    with launched("--nproc", "2", "--", *JOINER, str(tmp_path / "p")) as process:
        found = read_pids(tmp_path / "p", num_ranks=2)
        os.kill(found[1], number)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (code, "")
    assert "[rank 0] longspan: barrier: rank 0 lost rank 1" in stderr
    assert stderr.splitlines()[-1].startswith(f"longspan: launch: {text}")
    wait_until_gone(found)

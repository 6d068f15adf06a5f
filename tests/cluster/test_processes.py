"""Ranks as child processes: what they print is labelled, and none of them outlives the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.cluster import child, processes
from orchestrator.cluster.child import Command
from orchestrator.cluster.ended import Ended, find_first_failure
from orchestrator.cluster.labels import MAX_LINE_BYTES, LabelledLines
from orchestrator.cluster.processes import Supervisor
from tests.cluster.programs import (
    WITH_CHILD,
    children_of,
    is_running,
    is_stopped,
    read_pids,
    shell,
    wait_until,
    wait_until_gone,
)
from tests.source import ROOT


@pytest.fixture(autouse=True)
def short_graces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds outside takes moments here."""
    monkeypatch.setattr(processes, "GRACE_S", 0.4)
    monkeypatch.setattr(processes, "SIGNAL_GRACE_S", 0.4)
    monkeypatch.setattr(processes, "TERM_S", 0.4)


def run(*scripts: str, **environ: str) -> tuple[list[Ended], list[str]]:
    """How shells ended, and what was echoed."""
    lines: list[str] = []
    commands = [shell(script, rank=rank, **environ) for rank, script in enumerate(scripts)]
    with Supervisor(commands, echo=lines.append) as ranks:
        ended = ranks.wait()
    return ended, lines


def test_output_is_labelled_line_by_line() -> None:
    ended, lines = run("echo one; echo two >&2; printf three", "echo four")
    assert sorted(lines) == ["[rank 0] one", "[rank 0] three", "[rank 0] two", "[rank 1] four"]
    assert {end.rank: end.last_line for end in ended} == {0: "two", 1: ""}


def test_a_command_has_its_environment_alone_and_reads_what_it_is_given() -> None:
    lines: list[str] = []
    command = Command(
        rank=3, argv=("/bin/sh", "-c", "cat; env"), environ={"ONE": "1"}, stdin=b"given\n"
    )
    with Supervisor([command], echo=lines.append) as ranks:
        assert ranks.wait() == [Ended(rank=3, code=0, last_line="")]
    assert lines[0] == "[rank 3] given"
    assert "[rank 3] ONE=1" in lines
    assert not any("HOME" in line or "PYTHON" in line for line in lines)


def test_an_ignored_signal_is_not_inherited() -> None:
    ended, _ = run("kill -PIPE $$")
    assert ended[0].code == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("exec /no/such/program", 127)],
)
def test_codes_are_those_of_a_shell(script: str, code: int) -> None:
    ended, _ = run(script)
    assert [end.code for end in ended] == [code]


@pytest.mark.parametrize(("name", "code"), [("/no/such/program", 127), ("/", 126)])
def test_a_program_that_cannot_be_run_says_so(name: str, code: int) -> None:
    with Supervisor([Command(rank=0, argv=(name,), environ={})], echo=len) as ranks:
        (end,) = ranks.wait()
    assert end.code == code
    assert end.last_line.startswith(f"{name}: ")


def test_others_may_notice_a_failure_by_themselves() -> None:
    ended, _ = run("sleep 0.1; echo lost >&2; exit 1", "exit 3")
    assert [(end.rank, end.code, end.was_stopped) for end in ended] == [
        (1, 3, False),
        (0, 1, False),
    ]


@pytest.mark.parametrize(
    ("script", "code"),
    [("sleep 1000", 143), ("trap '' TERM; sleep 1000", 137), ("kill -STOP $$", 143)],
)
def test_who_does_not_notice_is_made_to_end(script: str, code: int) -> None:
    ended, lines = run(script, "echo broken >&2; exit 3")
    first = find_first_failure(ended)
    assert first == Ended(rank=1, code=3, last_line="broken")
    assert (ended[1].code, ended[1].was_stopped) == (code, True)
    assert "[rank 0] still runs; sent SIGTERM" in lines


def test_a_rank_that_is_killed_takes_its_children_along(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    ended, _ = run(WITH_CHILD + "kill -KILL $$", PIDS=str(pids))
    assert ended[0].code == 137
    wait_until_gone(read_pids(pids))


def test_a_child_that_outlives_a_rank_does_not(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    ended, _ = run(WITH_CHILD + "exit 0", PIDS=str(pids))
    assert ended[0].code == 0
    wait_until_gone(read_pids(pids))


def test_leaving_the_context_ends_all(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    scripts = (WITH_CHILD + "wait", WITH_CHILD + "kill -STOP $$")
    commands = [shell(script, rank=rank, PIDS=str(pids)) for rank, script in enumerate(scripts)]
    with Supervisor(commands, echo=len) as ranks:
        found = read_pids(pids, num_ranks=2)
        wait_until(lambda: is_stopped(found[2]))
        assert all(is_running(pid) for pid in found)
    wait_until_gone(found)
    assert all(end.was_stopped for end in ranks.wait())


def test_who_ends_within_the_grace_was_not_stopped() -> None:
    with Supervisor([shell("sleep 0.2; exit 0")], echo=len) as ranks:
        assert ranks.stop(grace_s=20) == [Ended(rank=0, code=0, last_line="")]


def test_muted_ranks_are_listened_to_and_not_echoed() -> None:
    lines: list[str] = []
    with Supervisor([shell("read x; echo late >&2", rank=1)], echo=lines.append) as ranks:
        ranks.mute()
        assert ranks.wait()[0].last_line == "late"
    assert lines == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_to_all(tmp_path: Path, number: signal.Signals) -> None:
    script = f"trap 'exit 5' {number.name[3:]}; {WITH_CHILD} while :; do wait; done"
    commands = [shell(script, rank=rank, PIDS=str(tmp_path / "pids")) for rank in range(2)]
    with Supervisor(commands, echo=len) as ranks:
        read_pids(tmp_path / "pids", num_ranks=2)
        ranks.forward(number)
        assert {(end.code, end.was_stopped) for end in ranks.wait()} == {(5, False)}


def test_a_signal_that_comes_before_the_start_is_passed_on() -> None:
    ranks = Supervisor([shell("sleep 1000")], echo=len)
    ranks.forward(signal.SIGTERM)
    with ranks:
        assert [(end.code, end.was_stopped) for end in ranks.wait()] == [(143, False)]
    ranks.forward(signal.SIGTERM)


def test_a_second_signal_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SIGNAL_GRACE_S", 1000)
    script = f"trap '' INT TERM; {WITH_CHILD} while :; do wait; done"
    with Supervisor([shell(script, PIDS=str(tmp_path / "pids"))], echo=len) as ranks:
        read_pids(tmp_path / "pids")
        ranks.forward(signal.SIGINT)
        ranks.forward(signal.SIGINT)
        assert [end.code for end in ranks.wait()] == [137]


def test_ranks_outlive_the_thread_that_asked_for_them() -> None:
    ranks = Supervisor([shell("sleep 0.3; exit 4")], echo=len)
    starter = threading.Thread(target=ranks.__enter__)
    starter.start()
    starter.join()
    assert [(end.code, end.was_stopped) for end in ranks.wait()] == [(4, False)]
    ranks.__exit__(None, None, None)


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    commands = [shell(WITH_CHILD + "wait", PIDS=str(pids)), shell("\0", rank=1)]
    with pytest.raises(ValueError, match="null byte"), Supervisor(commands, echo=len):
        pass
    assert not pids.with_name("pids.0").exists() or not any(map(is_running, read_pids(pids)))


@pytest.mark.parametrize("has_guard", [True, False])
def test_no_rank_outlives_a_killed_parent(tmp_path: Path, has_guard: bool) -> None:
    pids = tmp_path / "pids"
    command = [sys.executable, "-m", "tests.cluster.programs", str(pids)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as parent:
        found = read_pids(pids, num_ranks=2)
        wait_until(lambda: is_stopped(found[2]))
        if not has_guard:
            (guard,) = (pid for pid in children_of(parent.pid) if pid not in found)
            os.kill(guard, signal.SIGKILL)
        parent.kill()
    # Without the guard the kernel still ends the ranks, though not their children.
    wait_until_gone(found if has_guard else [found[0], found[2]])
    for pid in found:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_leash_whose_parent_has_gone_runs_nothing() -> None:
    leash = [*child._PYTHON, str(ROOT / "orchestrator" / "cluster" / "leash.py")]
    done = subprocess.run([*leash, "1", "echo", "ran"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (137, b"")


def test_lines_are_cut_where_they_end() -> None:
    seen: list[str] = []
    lines = LabelledLines("rank 7", seen.append)
    for piece in (
        b"a",
        b"b\n[rank7]: c",
        b"\n\n  \n",
        "ü".encode()[:1],
        "ü".encode()[1:],
        b"\r\n1%\r2%\n",
    ):
        lines.feed(piece)
    assert seen == [f"[rank 7] {text}" for text in ("ab", "c", "", "  ", "ü", "2%")]
    lines.feed(b"x" * (MAX_LINE_BYTES + 1))
    lines.feed(b"end")
    lines.finish()
    lines.finish()
    assert seen[-2:] == ["[rank 7] " + "x" * (MAX_LINE_BYTES + 1), "[rank 7] end"]
    assert lines.last_line == "end"

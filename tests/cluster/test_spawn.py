"""Spawned ranks meet rank 0, report their own faults, and are gone afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from collectives import PeerLost, RendezvousFailed
from collectives.bootstrap import NO_MULTICAST
from orchestrator.cluster import processes, spawn
from orchestrator.cluster.ended import Ended
from orchestrator.cluster.spawn import raise_for_rank, spawn_ranks
from orchestrator.config import EngineConfig, resolve
from orchestrator.errors import InputError, RankFailed
from tests.cluster import stand_in
from tests.cluster.programs import (
    children_of,
    find_processes,
    is_running,
    read_words,
    wait_until,
)

SETTINGS = (*NO_MULTICAST, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def nobody_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test this process has the children and the environment that it had before."""
    monkeypatch.setattr(spawn, "GRACE_S", 2.0)
    monkeypatch.setattr(processes, "TERM_S", 0.5)
    environ, before = dict(os.environ), children_of(os.getpid())
    yield
    assert children_of(os.getpid()) == before
    os.environ.clear()
    os.environ.update(environ)


@pytest.fixture(name="config")
def make_config(tmp_path: Path) -> EngineConfig:
    """A configuration whose model the stand-in reads as what to do."""
    return replace(resolve(model="well", store=tmp_path, threads=1), timeout_s=10.0)


def ask(config: EngineConfig, num_ranks: int) -> float:
    """One question of spawned stand-ins."""
    with spawn_ranks(config, num_ranks, entry=stand_in.ENTRY) as rendezvous:
        return stand_in.ask(rendezvous)


def test_ranks_answer_and_go(config: EngineConfig, capfd: pytest.CaptureFixture[str]) -> None:
    assert ask(config, 3) == 10.0 + 11.0 + 12.0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "rank" not in captured.err


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("named", "rank 2 of 3 failed first, exit code 1: model 'nothing' is not here; limit "),
        ("bug", "rank 2 of 3 failed first, exit code 1: ZeroDivisionError: a bug; "),
        ("die", "rank 2 of 3 failed first, killed by SIGKILL: it said nothing; "),
    ],
)
def test_the_rank_that_failed_first_is_reported(config: EngineConfig, what: str, said: str) -> None:
    with pytest.raises(RankFailed) as caught:
        ask(replace(config, model=what), 3)
    assert str(caught.value).startswith(said)
    assert isinstance(caught.value.__cause__, PeerLost)


def test_a_rank_that_never_comes_is_reported(config: EngineConfig) -> None:
    with pytest.raises(
        RankFailed, match=r"rank 1 of 2 failed first.*: cannot even begin;"
    ) as caught:
        ask(replace(config, model="absent", timeout_s=4.0), 2)
    assert isinstance(caught.value.__cause__, RendezvousFailed)


def test_rank_0_does_not_wait_for_a_rank_that_cannot_begin(config: EngineConfig) -> None:
    with (
        pytest.raises(
            RankFailed, match=r"rank 1 of 2 failed first.*: ModuleNotFoundError: "
        ) as caught,
        spawn_ranks(config, 2, entry="tests.cluster.nothing:serve"),
    ):
        pytest.fail("there is nobody to meet")
    assert "not all ranks began" in str(caught.value.__cause__)


def test_a_stopped_rank_is_ended_and_reported(config: EngineConfig) -> None:
    said = "rank 1 of 2 failed first, killed by SIGTERM after it did not end by itself"
    with pytest.raises(RankFailed, match=said):
        ask(replace(config, model="stop", timeout_s=4.0), 2)


def test_a_rank_that_does_not_end_is_made_to(
    config: EngineConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    assert ask(replace(config, model="deaf"), 2) == 21.0
    assert "[rank 1] still runs; sent SIGTERM" in capfd.readouterr().err


def fail_inside(config: EngineConfig, seen: list[int]) -> None:
    with spawn_ranks(config, 2, entry=stand_in.ENTRY):
        seen += find_ranks()
        raise InputError("mine")


def test_an_error_of_rank_0_is_its_own(
    config: EngineConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    seen: list[int] = []
    with pytest.raises(InputError, match="mine"):
        fail_inside(config, seen)
    assert not any(is_running(rank) for rank in seen)
    assert capfd.readouterr().err == ""


def test_ranks_get_what_they_need_and_nothing_on_the_command_line(config: EngineConfig) -> None:
    with spawn_ranks(config, 2, entry=stand_in.ENTRY) as rendezvous:
        (rank,) = find_ranks()
        environ = read_words(rank, "environ").split(" ")
        assert {"RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2", "OMP_NUM_THREADS=1"} <= set(environ)
        assert f"MASTER_PORT={rendezvous.port}" in environ
        assert str(config.store) not in read_words(rank, "cmdline")
        assert stand_in.ask(rendezvous) == 21.0


def find_ranks() -> list[int]:
    """Ids of the spawned ranks, once they are what they will be."""
    found: list[int] = []

    def look() -> bool:
        found[:] = find_processes("orchestrator.cluster.entry")
        return bool(found) and not find_processes("leash.py")

    wait_until(look)
    return found


def test_a_consequence_does_not_replace_the_error() -> None:
    error = PeerLost(rank=0, operation="barrier", peer=1, timeout_s=3.0, cause="timed out")
    lost = PeerLost(rank=1, operation="barrier", peer=0, timeout_s=3.0, cause="closed")
    for ended in ([], [Ended(rank=1, code=1, last_line=f"longspan: {lost}")]):
        with pytest.raises(PeerLost) as caught:
            raise_for_rank(ended, num_ranks=2, error=error)
        assert caught.value is error

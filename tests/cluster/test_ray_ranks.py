"""Ranks as Ray actors: on loopback alone, behind a token, reported in their own words, gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from collectives import PeerLost, join
from collectives.bootstrap import NO_MULTICAST
from orchestrator.cluster.channel import Channel, open_channel
from orchestrator.cluster.ray_ranks import driver_environment, has_own_cluster, ray_ranks
from orchestrator.config import EngineConfig, resolve
from orchestrator.errors import RankFailed, RayUnavailable
from tests.cluster import stand_in
from tests.cluster.programs import (
    find_processes,
    is_stopped,
    read_words,
    wait_until,
    wait_until_gone,
)
from tests.source import ROOT

# A Ray session takes seconds to start and to stop, many of them on a busy machine.
pytestmark = pytest.mark.timeout(300)
LISTENING, LOOPBACK = "0A", ("0100007F", "0000000000000000FFFF00000100007F")
PREFIX = "longspan-ray-"
CONNECTED = "connected to it"
CONNECT = f"import ray; ray.init(log_to_driver=False); print({CONNECTED!r})"


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cluster but those of the tests; `join` leaves its settings in the environment."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    environ = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environ)


@pytest.fixture(name="config")
def make_config(tmp_path: Path) -> EngineConfig:
    """A configuration whose model the stand-in reads as what to do."""
    return replace(resolve(model="well", store=tmp_path, threads=1), timeout_s=60.0)


@pytest.fixture(name="shared", scope="module")
def start_shared() -> Iterator[dict[str, str]]:
    """Variables that lead to a cluster which others have started."""
    environ = driver_environment(os.environ)
    command = [sys.executable, "-m", "tests.cluster.ray_cluster"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        token = {name: environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        yield {"RAY_ADDRESS": address, **token}
        process.communicate(timeout=60)


@pytest.fixture(name="on_shared")
def use_shared(shared: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks go to the shared cluster."""
    for name, value in shared.items():
        monkeypatch.setenv(name, value)


def test_own_cluster_is_private_and_gone_afterwards(config: EngineConfig) -> None:
    with ray_ranks(config, 3, entry=stand_in.ENTRY) as rendezvous:
        assert (rendezvous.rank, rendezvous.size, rendezvous.address) == (0, 3, "127.0.0.1")
        (folder,) = find_folders()
        assert folder.stat().st_mode & 0o777 == 0o700
        found = find_processes("ray")
        actors = find_processes("ray::RankActor")
        assert len(actors) == 2
        check_environment(actors[0])
        listeners = find_listeners(found)
        assert len(listeners) >= 7
        assert set(listeners) <= set(LOOPBACK)
        assert stand_in.ask(rendezvous) == 33.0
    assert not folder.exists()
    wait_until_gone(found)
    assert "ray" not in sys.modules
    assert "RAY_AUTH_TOKEN" not in os.environ


def find_folders(*, below: int | None = None) -> list[Path]:
    """Private folders of the clusters that were started by this process, or by another."""
    daemons = find_processes("gcs_server", below=below)
    words = [word for pid in daemons for word in read_words(pid, "cmdline").split()]
    logs = [Path(word.partition("=")[2]) for word in words if word.startswith("--log_dir=")]
    return [place for log in logs for place in log.parents if place.name.startswith(PREFIX)]


def check_environment(pid: int) -> None:
    """What a rank is started with."""
    environ = read_words(pid, "environ").split(" ")
    assert {f"{name}={value}" for name, value in NO_MULTICAST.items()} <= set(environ)
    assert {"OMP_NUM_THREADS=1", "RAY_AUTH_MODE=token"} <= set(environ)


def find_listeners(pids: list[int]) -> list[str]:
    """Addresses on which processes listen, in the kernel's hexadecimal."""
    sockets = set()
    for link in (link for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()):
        with suppress(FileNotFoundError):
            sockets.add(os.readlink(link))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]
    ]
    return [
        row[1].split(":")[0]
        for row in rows
        if row[3] == LISTENING and f"socket:[{row[9]}]" in sockets
    ]


def connect(address: str, **environ: str) -> str:
    """What a stranger who tries to use a cluster is told."""
    near = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_ADDRESS": address}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT],
        env={**os.environ, **near, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_stranger_without_the_token_is_refused(shared: dict[str, str]) -> None:
    address = shared["RAY_ADDRESS"]
    told = connect(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    assert CONNECTED not in told
    assert "InvalidAuthToken" in told


def ask(config: EngineConfig) -> float:
    """One question of two ranks beside rank 0."""
    with ray_ranks(config, 3, entry=stand_in.ENTRY) as rendezvous:
        return stand_in.ask(rendezvous)


@pytest.mark.usefixtures("on_shared")
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("named", "rank 2 of 3 failed first, exit code 1: model 'nothing' is not here; limit "),
        ("die", "rank 2 of 3 failed first, exit code 1: its Ray actor died ("),
    ],
)
def test_the_rank_that_failed_first_is_reported(
    config: EngineConfig, what: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankFailed) as caught:
        ask(replace(config, model=what))
    assert str(caught.value).startswith(said)
    assert isinstance(caught.value.__cause__, PeerLost)
    assert "Timed out" not in str(caught.value.__cause__)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "(raylet)" not in captured.err


@pytest.mark.usefixtures("on_shared")
def test_no_room_is_an_error_that_says_what_there_is(config: EngineConfig) -> None:
    said = r"^ray: no room for 2 more ranks of {'CPU': 99} within 6 s; limit .*{'CPU': 2.0}; "
    with pytest.raises(RayUnavailable, match=said):
        ask(replace(config, threads=99, timeout_s=6.0))


def kill_driver(config: EngineConfig) -> None:
    """Ranks whose driver is killed while rank 0 waits for them."""
    with ray_ranks(config, 2, entry=stand_in.ENTRY) as rendezvous, join(rendezvous) as group:
        (driver,) = find_processes("ray_driver")
        os.kill(driver, signal.SIGKILL)
        group.broadcast_(torch.ones(1), source=0)
        while True:
            group.all_reduce_(torch.ones(1))
            group.broadcast_(torch.ones(1), source=0)


@pytest.mark.usefixtures("on_shared")
def test_a_lost_driver_is_an_error(config: EngineConfig) -> None:
    with pytest.raises(RayUnavailable, match=r"^ray: its driver ended with code 137 ") as caught:
        kill_driver(config)
    assert isinstance(caught.value.__cause__, PeerLost)


@pytest.mark.slow
def test_nobody_outlives_a_killed_rank_0() -> None:
    command = [sys.executable, "-m", "tests.cluster.ray_cluster", "stop"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        found: list[int] = []

        def is_one_stopped() -> bool:
            found[:] = find_processes("", below=process.pid)
            return any(is_stopped(pid) for pid in found)

        wait_until(is_one_stopped, deadline_s=150)
        (folder,) = find_folders(below=process.pid)
        process.kill()
    wait_until_gone(found)
    remove_leftover(folder)


def remove_leftover(folder: Path) -> None:
    """Remove the folder of a killed cluster, which nobody else can; never anything else."""
    assert folder.name.startswith(PREFIX)
    assert folder.parent == Path(tempfile.gettempdir())
    shutil.rmtree(folder)


def test_addresses_choose_the_cluster() -> None:
    assert has_own_cluster({})
    assert has_own_cluster({"RAY_ADDRESS": "local"})
    assert not has_own_cluster({"RAY_ADDRESS": "10.0.0.1:6379"})
    with pytest.raises(RayUnavailable, match=r"^RAY_ADDRESS: 'ray://10\.0\.0\.1:10001'; limit "):
        has_own_cluster({"RAY_ADDRESS": "ray://10.0.0.1:10001"})


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:six", ":"])
def test_a_cluster_that_cannot_be_reached_is_named(
    config: EngineConfig, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RayUnavailable, match=f"^RAY_ADDRESS: '{address}' cannot be reached "):
        ask(config)


def test_only_an_own_cluster_gets_a_token_of_its_own() -> None:
    own = [driver_environment({"RAY_AUTH_TOKEN": "users", "RAY_ADDRESS": "local"}) for _ in "ab"]
    assert {environ["RAY_AUTH_MODE"] for environ in own} == {"token"}
    assert len({environ["RAY_AUTH_TOKEN"] for environ in own} | {"users"}) == 3
    assert all("RAY_ADDRESS" not in environ for environ in own)
    for address, is_near in (("10.0.0.1:6379", False), ("127.0.0.1:6379", True), ("auto", False)):
        other = driver_environment({"RAY_AUTH_TOKEN": "users", "RAY_ADDRESS": address})
        assert (other["RAY_AUTH_TOKEN"], other["RAY_ADDRESS"]) == ("users", address)
        assert "RAY_AUTH_MODE" not in other
        assert ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in other) == is_near


def test_a_channel_says_when_nothing_more_comes() -> None:
    ours, theirs = open_channel()
    with ours, Channel(theirs) as other:
        assert ours.receive(timeout_s=0.01) is None
        ours.send({"a": [1, "\n"]})
        assert other.receive() == {"a": [1, "\n"]}
        assert not other.is_readable()
        ours.end()
        assert other.is_readable()
        assert other.receive() is None
        other.send({})
        assert ours.receive() == {}
    ours, theirs = open_channel()
    theirs.close()
    with ours:
        ours.send({"nobody": "listens"})
        assert ours.receive() is None

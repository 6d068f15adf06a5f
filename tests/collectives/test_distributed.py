"""Processes over gloo obey the contract, and find out within the deadline that a rank is gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.source import ROOT

DEADLINE_S = 5.0
LOOPBACK = "0100007F"


def start_ranks(
    scenario: str, *, size: int, victim: int = -1, device: str = "cpu"
) -> list[subprocess.Popen[str]]:
    """One process a rank, with a free port of their own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.collectives.worker",
        scenario,
        str(victim),
    ]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [*command, str(30.0 if scenario == "contract" else DEADLINE_S), device],
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def end_ranks(
    processes: Sequence[subprocess.Popen[str]], *, stopped: int = -1
) -> list[tuple[int, dict[str, object], str]]:
    """Exit code, printed object and stderr of each; the stopped one is killed, after the others."""
    try:
        ended = {}
        order = sorted(range(len(processes)), key=lambda rank: rank == stopped)
        for rank in order:
            if rank == stopped:
                assert processes[rank].poll() is None
                processes[rank].kill()
            ended[rank] = processes[rank].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        (process.returncode, json.loads(ended[rank][0] or "{}"), ended[rank][1])
        for rank, process in enumerate(processes)
    ]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_contract_over_gloo_on_loopback_alone(size: int) -> None:
    for code, seen, stderr in end_ranks(start_ranks("contract", size=size)):
        assert code == 0, stderr
        assert seen["device"] == "cpu"
        assert seen["listens"], "gloo listens somewhere"
        assert set(seen["listens"]) == {LOOPBACK}  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "size",
    [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multi_gpu)],
)
def test_contract_over_nccl(size: int) -> None:
    for code, seen, stderr in end_ranks(start_ranks("contract", size=size, device="cuda")):
        assert code == 0, stderr
        assert str(seen["device"]).startswith("cuda:")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("scenario", ["die", "stop", "raise"])
def test_a_rank_lost_over_nccl_is_noticed_and_named(scenario: str) -> None:
    processes = start_ranks(scenario, size=2, victim=1, device="cuda")
    ended = end_ranks(processes, stopped=1 if scenario == "stop" else -1)
    assert (ended[0][0], ended[0][1]["error"], ended[0][1]["peer"]) == (3, "PeerLost", 1)


@pytest.mark.parametrize(
    ("scenario", "size", "victim", "operation", "peer"),
    [
        ("die", 2, 0, "receive_", 0),
        ("die", 3, 2, "all_to_all", 2),
        ("stop", 3, 1, "all_to_all", 1),
        ("raise", 2, 1, "all_to_all", 1),
    ],
)
def test_a_lost_rank_is_noticed_and_named(
    scenario: str, size: int, victim: int, operation: str, peer: int | None
) -> None:
    processes = start_ranks(scenario, size=size, victim=victim)
    ended = end_ranks(processes, stopped=victim if scenario == "stop" else -1)
    for rank, (code, seen, stderr) in enumerate(ended):
        if rank == victim:
            assert code == {"die": 7, "stop": -9, "raise": 1}[scenario], stderr
            continue
        assert (code, seen["error"]) == (3, "PeerLost"), stderr
        assert (seen["rank"], seen["operation"], seen["peer"]) == (rank, operation, peer)
        assert "\n" not in str(seen["text"])
        assert f"limit {DEADLINE_S:g} s" in str(seen["text"])
    assert all(process.returncode is not None for process in processes)

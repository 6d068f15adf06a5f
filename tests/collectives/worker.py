"""One rank of a test: `python -m tests.collectives.worker SCENARIO VICTIM DEADLINE_S DEVICE`.

Its place comes from the environment. It prints one JSON object: what it saw, or the error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from collectives import (
    CollectivesError,
    DistributedGroup,
    PeerLost,
    Pending,
    join,
    read_rendezvous,
    run_pair,
    run_steps,
)
from tests.collectives.contract import CHECKS, CHECKS_ONCE, check_contract
from tests.collectives.overlap_steps import mix, noted

LISTENING = "0A"


def run_contract(group: DistributedGroup, victim: int) -> dict[str, object]:
    """Every check, on the whole group and on subgroups of it."""
    for check in CHECKS:
        check_contract(group, check)
    for once in CHECKS_ONCE:
        once(group)
    check_overlap(group)
    subgroup = group.subgroup([rank for rank in range(group.size) if rank != 1])
    if subgroup is not None:
        for check in CHECKS:
            check(subgroup, (3, 5), torch.float32)
    return {"listens": find_listeners(), "device": str(group.device)}


def check_overlap(group: DistributedGroup) -> None:
    """A pair over gloo computes the bits of each alone, with uneven numbers of steps."""
    for first, second in (("gra" * 20, "ga"), ("r", "agr" * 5), ("", "g")):
        alone = run_steps(mix(group, first, 1.0)), run_steps(mix(group, second, 2.0))
        pair = run_pair(mix(group, first, 1.0), mix(group, second, 2.0))
        assert all(map(torch.equal, alone, pair))
    pause_s = 1e-3 * group.rank
    events: list[str] = []
    run_pair(
        noted("a", 3, events, group=group, pause_s=pause_s), noted("b", 2, events, group=group)
    )
    written = "\n".join(events).encode()
    assert group.control.all_gather_bytes(written) == [written] * group.size


def run_until_lost(group: DistributedGroup, victim: int) -> dict[str, object]:
    """The victim goes away after a barrier; the others find out, in each of their groups."""
    scenario = sys.argv[1]
    part = group.subgroup(range(group.size))
    assert isinstance(part, DistributedGroup)
    group.barrier()
    if group.rank == victim:
        leave(scenario)
    with pytest.raises(PeerLost) as caught:
        wait_for(group, victim)
    with pytest.raises(PeerLost) as again:
        group.barrier()
    assert again.value is caught.value
    assert group.is_broken
    for other in (part, part.control, group.control) if scenario == "die" else ():
        assert not other.is_broken
        with pytest.raises(PeerLost) as known:
            wait_for(other, victim)
        assert (known.value.rank, known.value.peer) == (group.rank, victim)
    raise caught.value


def leave(scenario: str) -> None:
    """End, stop or fail."""
    if scenario == "die":
        os._exit(7)
    if scenario == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise ZeroDivisionError


def wait_for(group: DistributedGroup, victim: int) -> None:
    """Operations that cannot end without the victim; each wait raises the same."""
    if group.size == 2 and sys.argv[1] == "die":
        group.receive_(torch.zeros(3, device=group.device), source=victim)
        group.settle()
        return
    first = group.start_all_to_all(torch.zeros(group.size, 3, device=group.device))
    second = group.start_all_gather(torch.zeros(3, device=group.device))
    with pytest.raises(PeerLost) as caught:
        end(first, group)
    for again in (second, first):
        with pytest.raises(PeerLost) as same:
            end(again, group)
        assert same.value is caught.value
    raise caught.value


def end(pending: Pending, group: DistributedGroup) -> None:
    """Wait on the host, too, which on a GPU alone hears of a loss."""
    pending.wait()
    group.settle()


def find_listeners() -> list[str]:
    """Addresses on which this process listens, in the kernel's hexadecimal."""
    sockets = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{table}").read_text(encoding="ascii").splitlines()[1:]
    ]
    return [
        row[1].split(":")[0]
        for row in rows
        if row[3] == LISTENING and f"socket:[{row[9]}]" in sockets
    ]


def main() -> int:
    """Run the scenario; exit code 0 done, 3 one of our errors."""
    scenario, victim, deadline_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    rendezvous = read_rendezvous(timeout_s=4 * deadline_s, operation_timeout_s=deadline_s)
    device: Literal["cpu", "cuda"] = "cuda" if sys.argv[4] == "cuda" else "cpu"
    torch.set_default_device(device)
    work = run_contract if scenario == "contract" else run_until_lost
    try:
        with join(rendezvous, device=device) as group:
            seen = work(group, victim)
    except CollectivesError as error:
        known = {name: getattr(error, name, None) for name in ("rank", "operation", "peer")}
        print(json.dumps({"error": type(error).__name__, "text": str(error), **known}))
        return 3
    assert not torch.distributed.is_initialized()
    print(json.dumps(seen))
    return 0


if __name__ == "__main__":
    sys.exit(main())

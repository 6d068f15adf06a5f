"""One rank of a test: `python -m tests.collectives.worker SCENARIO VICTIM DEADLINE_S`.

Its place comes from the environment. It prints one JSON object: what it saw, or the error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from collectives import CollectivesError, DistributedGroup, PeerLost, join, read_rendezvous
from tests.collectives.contract import CHECKS, check_contract

LISTENING = "0A"


def run_contract(group: DistributedGroup, victim: int) -> dict[str, object]:
    """Every check, on the whole group and on subgroups of it."""
    for check in CHECKS:
        check_contract(group, check)
    members = [rank for rank in range(group.size) if rank != 1]
    subgroup = group.subgroup(members)
    alone = group.subgroup([1])
    assert (subgroup is None, alone is None) == (group.rank == 1, group.rank != 1)
    if subgroup is not None:
        assert (subgroup.rank, subgroup.size) == (members.index(group.rank), len(members))
        for check in CHECKS:
            check(subgroup, (3, 5), torch.float32)
    return {"listens": find_listeners(), "device": str(group.device)}


def run_until_lost(group: DistributedGroup, victim: int) -> dict[str, object]:
    """The victim goes away after a barrier; the others find out, twice."""
    scenario = sys.argv[1]
    group.barrier()
    if group.rank == victim and scenario == "die":
        os._exit(7)
    if group.rank == victim and scenario == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if group.rank == victim and scenario == "raise":
        raise ZeroDivisionError
    with pytest.raises(PeerLost) as caught:
        wait_for(group, victim)
    with pytest.raises(PeerLost) as again:
        group.barrier()
    assert again.value is caught.value
    assert group.is_broken
    raise caught.value


def wait_for(group: DistributedGroup, victim: int) -> None:
    """An operation that cannot end without the victim."""
    if group.size == 2 and sys.argv[1] == "die":
        group.receive_(torch.zeros(3), source=victim)
    else:
        group.all_gather(torch.zeros(3))


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
    work = run_contract if scenario == "contract" else run_until_lost
    try:
        with join(read_rendezvous(timeout_s=deadline_s)) as group:
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

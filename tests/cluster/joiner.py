"""A rank that joins the others and meets them for ever: `python -m tests.cluster.joiner PIDS`.

It writes its id to PIDS.RANK once it has met them. DEADLINE_S is the deadline of each meeting.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from collectives import CollectivesError, join, read_rendezvous
from orchestrator.cluster.environment import THREADS

DEADLINE_S = 3.0


def meet_for_ever(pids: Path) -> None:
    """Barrier after barrier."""
    with join(read_rendezvous(timeout_s=20.0, operation_timeout_s=DEADLINE_S)) as group:
        group.barrier()
        assert os.environ[THREADS]
        new = pids.with_name(f"{pids.name}.{group.rank}.new")
        new.write_text(str(os.getpid()), encoding="ascii")
        new.rename(new.with_suffix(""))
        while True:
            group.barrier()
            time.sleep(0.02)


def main() -> int:
    """Exit code 3 where a peer was lost."""
    try:
        meet_for_ever(Path(sys.argv[1]))
    except CollectivesError as error:
        sys.stderr.write(f"longspan: {error}\n")
    return 3


if __name__ == "__main__":
    sys.exit(main())

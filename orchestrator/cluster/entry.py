"""What a rank other than rank 0 runs: `python -m orchestrator.cluster.entry ENTRY READY < config`.

Owns the way from a configuration as text to the function that serves as a rank, and from its faults
to one line. Refuses to know who starts it; its place among the ranks is in the environment.
"""

from __future__ import annotations

import os
import sys
import traceback
from pkgutil import resolve_name

from collectives import CollectivesError, Rendezvous, read_rendezvous
from kv_store.errors import StoreError
from orchestrator.config import EngineConfig
from orchestrator.errors import LongspanError
from sparse_attn.errors import AttentionError

# `module:function`, called with the rank's rendezvous and configuration; returns once told to stop.
ENTRY = "orchestrator.cluster.rank:run_rank"
FAULTS = (LongspanError, CollectivesError, StoreError, AttentionError)
READY = b"\n"


def run_entry(entry: str, rendezvous: Rendezvous, config: EngineConfig) -> str:
    """Serve as a rank; returns the fault that ended it as one line, empty where none did.

    What is no fault of a user, file, device or peer is raised as it is.
    """
    try:
        resolve_name(entry)(rendezvous, config)
    except FAULTS as error:
        return " ".join(str(error).split())
    return ""


def main() -> int:
    """Exit code 0: told to stop. Otherwise the process ends here, with code 1 and the fault."""
    entry, ready = sys.argv[1], int(sys.argv[2])
    config = EngineConfig.from_json(sys.stdin.read())
    rendezvous = read_rendezvous(timeout_s=config.timeout_s)
    resolve_name(entry)
    os.write(ready, READY)
    os.close(ready)
    try:
        fault = run_entry(entry, rendezvous, config)
    except Exception:  # noqa: BLE001 - printed whole; it is a fault of ours
        fault = traceback.format_exc().rstrip()
    else:
        fault = fault and f"longspan: {fault}"
    if fault:
        sys.stderr.write(f"{fault}\n")
        # What is left of a broken process group may abort the interpreter on its way out.
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A rank without a model: what it does is in the name of the model that it is given.

Serves until rank 0 broadcasts 0, and adds one to what it is sent otherwise.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch

from collectives import Group, Rendezvous, join
from orchestrator.config import EngineConfig
from orchestrator.errors import ModelNotFound

ENTRY = f"{__name__}:serve"


def serve(rendezvous: Rendezvous, config: EngineConfig) -> None:
    """What `orchestrator.cluster.rank.run_rank` is in earnest."""
    is_victim = rendezvous.rank == rendezvous.size - 1
    if config.model == "absent" and is_victim:
        sys.exit("cannot even begin")
    with join(rendezvous) as group:
        answer(group, FAULTS.get(config.model) if is_victim else None)
    if config.model == "deaf":
        time.sleep(1000)


def answer(group: Group, fault: Callable[[], None] | None) -> None:
    """The loop of a rank; a fault happens once the ranks have met."""
    word = torch.ones(1)
    while True:
        group.broadcast_(word, source=0)
        if word.item() == 0:
            return
        if fault is not None:
            fault()
        total = word + group.rank
        group.all_reduce_(total)


def ask(rendezvous: Rendezvous) -> float:
    """Rank 0: one question of all ranks, then the end."""
    with join(rendezvous) as group:
        word = torch.full((1,), 10.0)
        group.broadcast_(word, source=0)
        group.all_reduce_(word)
        group.broadcast_(torch.zeros(1), source=0)
        return word.item()


def raise_named() -> None:
    """A fault that a user can cause."""
    raise ModelNotFound("model 'nothing' is not here; limit what is; fetch it")


def raise_bug() -> None:
    """A fault of ours."""
    raise ZeroDivisionError("a bug")


def die() -> None:
    """As the kernel's OOM killer does it."""
    os.kill(os.getpid(), 9)


def stop() -> None:
    """Held, alive, silent."""
    os.kill(os.getpid(), 19)


FAULTS = {"named": raise_named, "bug": raise_bug, "die": die, "stop": stop}

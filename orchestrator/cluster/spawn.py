"""Ranks as processes of this machine; the caller is rank 0.

Owns how they are started, and that a lost one is reported in its own words. Refuses to know what a
rank does, and what rank 0 does with the others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from collectives import PeerLost, Rendezvous, RendezvousFailed
from orchestrator.cluster.child import Command
from orchestrator.cluster.ended import Ended, describe_failure, find_first_failure
from orchestrator.cluster.entry import ENTRY
from orchestrator.cluster.environment import THREADS, own_packages, rank_environment
from orchestrator.cluster.ports import LOOPBACK, reserve_port
from orchestrator.cluster.processes import GRACE_S, Supervisor
from orchestrator.cluster.readiness import Readiness
from orchestrator.config import EngineConfig
from orchestrator.errors import RankFailed


@contextmanager
def spawn_ranks(
    config: EngineConfig, num_ranks: int, *, entry: str = ENTRY
) -> Iterator[Rendezvous]:
    """Start ranks 1 and up, which run `entry`; yields the place where rank 0 joins them.

    Leave the context once they were told to stop, or on an error: afterwards they are gone. Raises
    PortTaken; RankFailed for a rank that cannot begin, and in place of the PeerLost or
    RendezvousFailed that a rank caused.
    """
    with reserve_port() as port, Readiness(num_ranks - 1) as readiness:
        rendezvous = Rendezvous(
            rank=0,
            size=num_ranks,
            local_rank=0,
            address=LOOPBACK,
            port=port,
            timeout_s=config.timeout_s,
        )
        commands = [
            _make_command(config, rendezvous, rank=rank, arguments=(entry, str(ready)), fd=ready)
            for rank, ready in enumerate(readiness.writers, start=1)
        ]
        with Supervisor(commands) as ranks:
            try:
                if not readiness.await_all(timeout_s=config.timeout_s):
                    raise RendezvousFailed("spawn: not all ranks began; limit all; see their lines")
                yield rendezvous
            except (PeerLost, RendezvousFailed) as error:
                raise_for_rank(ranks.stop(grace_s=GRACE_S), num_ranks=num_ranks, error=error)
            except BaseException:
                # Whatever they say now follows from what happened here.
                ranks.mute()
                raise


def raise_for_rank(ended: Sequence[Ended], *, num_ranks: int, error: Exception) -> None:
    """Raise RankFailed for the rank that caused rank 0's error, or that error itself."""
    first = find_first_failure(ended)
    if first is None or first.is_consequence:
        raise error
    raise RankFailed(describe_failure(first, num_ranks=num_ranks)) from error


def _make_command(
    config: EngineConfig, rendezvous: Rendezvous, *, rank: int, arguments: tuple[str, ...], fd: int
) -> Command:
    base = {**os.environ, **own_packages(os.environ), THREADS: str(config.threads)}
    return Command(
        rank=rank,
        argv=(sys.executable, "-P", "-m", "orchestrator.cluster.entry", *arguments),
        environ=rank_environment(
            base,
            rank=rank,
            num_ranks=rendezvous.size,
            address=rendezvous.address,
            port=rendezvous.port,
        ),
        stdin=config.to_json().encode(),
        pass_fds=(fd,),
    )

"""Ray's driver, a process beside rank 0: `python -m orchestrator.cluster.ray_driver FD`.

Owns the Ray session: a cluster of its own or the connection to another, the placement group, the
actors, and their end. Refuses to be a rank. It is a process of its own so that what Ray starts,
prints, sets and handles concerns nobody else, and ends with it.

The talk over the channel FD: it hears the job, says the address of its node, hears the port there,
says which GPU is rank 0's, and once the other end has closed, how the ranks ended. Instead of any
of these it may say a fault, and end.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.cluster.channel import Channel
from orchestrator.cluster.ended import Ended
from orchestrator.cluster.ports import LOOPBACK
from orchestrator.cluster.processes import GRACE_S
from orchestrator.cluster.ray_actor import Place, RankActor
from orchestrator.config import EngineConfig
from orchestrator.errors import RayUnavailable

# The least that Ray takes; nothing but names and configurations goes through it.
_OBJECT_STORE_BYTES = 80 << 20
# Some of Ray's functions have no types.
_RAY: Any = ray
_LOOK_S = 0.2
_DEATH = re.compile(r"The actor is dead because (.*?)\. ")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run. settings: variables that each rank has; folder: of a cluster of its own,
    None where another one is used.
    """

    config: EngineConfig
    num_ranks: int
    entry: str
    settings: dict[str, str]
    folder: str | None

    @property
    def has_gpus(self) -> bool:
        """Whether each rank has a GPU, rank 0 included."""
        return self.config.device == "cuda"

    @cached_property
    def deadline_s(self) -> float:
        """When the ranks must have been placed and started, on the monotonic clock."""
        return time.monotonic() + self.config.timeout_s

    @property
    def left_s(self) -> float:
        """Seconds until then."""
        return max(0.0, self.deadline_s - time.monotonic())

    @property
    def share(self) -> dict[str, int]:
        """What one rank takes of its node."""
        return {"CPU": self.config.threads} | ({"GPU": 1} if self.has_gpus else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An actor that serves: its rank, its handle, its process, and what it will return."""

    rank: int
    actor: Any
    pid: int
    result: Any


def main() -> int:
    """Exit code 0: the ranks have ended, whichever way; 1: a fault."""
    with Channel.inherited(int(sys.argv[1])) as channel, open(os.devnull, "w") as nowhere:
        # Ray tells of a lost worker at length on stdout; how the ranks ended says it in a line.
        sys.stdout = nowhere
        try:
            drive(channel)
        except (RayUnavailable, RayError, OSError, RuntimeError, ValueError) as error:
            channel.send({"fault": explain(error)})
            return 1
    return 0


def drive(channel: Channel) -> None:
    """The talk. An end of the other side's input ends it at any place."""
    message = channel.receive()
    if message is None:
        return
    job = Job(**message | {"config": EngineConfig.from_json(message["config"])})
    with connected(job):
        address = _RAY.util.get_node_ip_address()
        if job.folder is not None and address != LOOPBACK:
            raise RayUnavailable(
                f"ray: its own cluster listens on {address}; limit {LOOPBACK}; unset RAY_* "
                "variables that change addresses"
            )
        channel.send({"address": address})
        message = channel.receive()
        if message is None:
            return
        with placed(job, address) as group:
            gpu_idx = find_own_gpu(job, group)
            ranks = start_ranks(job, group, address=address, port=message["port"])
            channel.send({"gpu_idx": gpu_idx})
            ended = watch(ranks, channel)
            ended += stop(ranks, is_local=job.folder is not None)
            channel.send({"ended": [asdict(end) for end in ended]})


@contextmanager
def connected(job: Job) -> Iterator[None]:
    """A Ray session: on a new cluster below `job.folder`, on loopback alone, or on another's."""
    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": True}
    if job.folder is None:
        ray.init(**common)
    else:
        ray.init(
            address="local",
            num_cpus=job.config.threads * job.num_ranks,
            num_gpus=job.num_ranks if job.has_gpus else 0,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _node_ip_address=LOOPBACK,
            _temp_dir=job.folder,
            **common,
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def placed(job: Job, address: str) -> Iterator[PlacementGroup]:
    """Room for the ranks, as close together as can be; the first bundle is rank 0's GPU."""
    own = [{"GPU": 1, f"node:{address}": 0.001}] if job.has_gpus else []
    group = placement_group(own + [job.share] * (job.num_ranks - 1), strategy="PACK")
    try:
        if not group.wait(job.left_s):
            has = {name: _RAY.cluster_resources().get(name, 0) for name in job.share}
            raise RayUnavailable(
                f"ray: no room for {job.num_ranks - 1} more ranks of {job.share} within "
                f"{job.config.timeout_s:g} s; limit the cluster's {has}; use fewer --threads or "
                "ranks, or add nodes"
            )
        yield group
    finally:
        remove_placement_group(group)


def find_own_gpu(job: Job, group: PlacementGroup) -> int:
    """GPU that Ray keeps for rank 0, which is no actor: another actor holds it in its place."""
    if not job.has_gpus:
        return 0
    seat = make_actor(job, group, rank=0, options={"num_cpus": 0, "num_gpus": 1})
    place: Place = ray.get(seat.place.remote(job.entry), timeout=job.left_s)
    return place.gpu_idx


def start_ranks(job: Job, group: PlacementGroup, *, address: str, port: int) -> list[Started]:
    """Actors of ranks 1 and up, each of which serves."""
    options = {"num_cpus": job.config.threads, "num_gpus": 1 if job.has_gpus else 0}
    actors = [
        make_actor(job, group, rank=rank, options=options) for rank in range(1, job.num_ranks)
    ]
    calls = [actor.place.remote(job.entry) for actor in actors]
    places: list[Place] = ray.get(calls, timeout=job.left_s)
    started = []
    for rank, (actor, place) in enumerate(zip(actors, places, strict=True), start=1):
        meeting = {
            "rank": rank,
            "size": job.num_ranks,
            "local_rank": place.gpu_idx if job.has_gpus else rank,
            "address": address,
            "port": port,
            "timeout_s": job.config.timeout_s,
        }
        result = actor.serve.remote(job.entry, meeting, job.config)
        started.append(Started(rank=rank, actor=actor, pid=place.pid, result=result))
    return started


def make_actor(job: Job, group: PlacementGroup, *, rank: int, options: dict[str, Any]) -> Any:
    """Start the actor of a rank in its bundle, never to be restarted."""
    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group,
        placement_group_bundle_index=rank if job.has_gpus else rank - 1,
    )
    remote = ray.remote(RankActor).options(
        **options,
        max_restarts=0,
        scheduling_strategy=strategy,
        runtime_env={"env_vars": job.settings},
    )
    return remote.remote(rank)


def watch(ranks: list[Started], channel: Channel) -> list[Ended]:
    """Take out ranks that end by themselves, until the other end closes and their grace is over."""
    ended: list[Ended] = []
    while ranks and not channel.is_readable():
        ended += take_ended(ranks, wait_s=_LOOK_S)
    channel.receive()
    over_s = time.monotonic() + GRACE_S
    while ranks and time.monotonic() < over_s:
        ended += take_ended(ranks, wait_s=over_s - time.monotonic())
    return ended


def take_ended(ranks: list[Started], *, wait_s: float) -> list[Ended]:
    """Take the first that has ended out of the list, if there is one in time."""
    results, _ = ray.wait([rank.result for rank in ranks], timeout=max(0.0, wait_s))
    ended = [rank for rank in ranks if rank.result in results]
    for rank in ended:
        ranks.remove(rank)
        # Its process would stay, and its peers would go on waiting for it.
        ray.kill(rank.actor)
    return [describe_end(rank) for rank in ended]


def stop(ranks: list[Started], *, is_local: bool) -> list[Ended]:
    """Kill ranks that did not end by themselves."""
    for rank in ranks:
        if is_local:
            # Ray itself takes seconds to kill a stopped process.
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        ray.kill(rank.actor)
    code = 128 + signal.SIGKILL
    return [Ended(rank=rank.rank, code=code, last_line="", was_stopped=True) for rank in ranks]


def describe_end(rank: Started) -> Ended:
    """How a rank ended that did so by itself."""
    try:
        fault: str = ray.get(rank.result)
    except (RayActorError, RayTaskError) as error:
        fault = describe(error)
    return Ended(rank=rank.rank, code=1 if fault else 0, last_line=fault)


def explain(error: Exception) -> str:
    """Why the ranks could not be started, as one line: *what, value, limit, remedy*."""
    if isinstance(error, RayUnavailable):
        return str(error)
    return (
        f"ray: {describe(error)}; limit a cluster that can be reached; check RAY_ADDRESS and "
        "RAY_AUTH_*, or unset RAY_ADDRESS"
    )


def describe(error: Exception) -> str:
    """One line of one of Ray's errors, which are long."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {' '.join(str(error.cause).split())}"
    if isinstance(error, RayActorError):
        found = _DEATH.search(str(error))
        return f"its Ray actor died ({found[1] if found else type(error).__name__})"
    return ", ".join(_shorten(each) for each in (error, error.__cause__) if each is not None)


def _shorten(error: BaseException) -> str:
    text = " ".join(str(error).split()).partition(". ")[0]
    return f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main())

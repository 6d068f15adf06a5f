"""Ranks as Ray actors; the caller is rank 0 and imports no Ray.

Owns the choice of the cluster, its security where it is ours, and that a lost rank is reported in
its own words. Refuses to know Ray's API: `ray_driver.py`, a process of its own, does.

With RAY_ADDRESS set, that cluster is used as it is, with the user's RAY_AUTH_* variables. Else one
is started for these ranks: on loopback alone, with a token that lives as long as it does, without
dashboard and usage statistics.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory

from collectives import PeerLost, Rendezvous, RendezvousFailed
from collectives.bootstrap import NO_MULTICAST
from orchestrator.cluster.channel import Channel, Message, open_channel
from orchestrator.cluster.child import Command
from orchestrator.cluster.ended import Ended
from orchestrator.cluster.entry import ENTRY
from orchestrator.cluster.environment import THREADS, own_packages
from orchestrator.cluster.ports import reserve_port
from orchestrator.cluster.processes import GRACE_S, Supervisor
from orchestrator.cluster.spawn import raise_for_rank
from orchestrator.config import EngineConfig
from orchestrator.errors import RayUnavailable

ADDRESS = "RAY_ADDRESS"
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_COLOR_PREFIX": "0", "RAY_DEDUP_LOGS": "0"}
# Despite its name it decides on Linux too: with 0, Ray takes 127.0.0.1 for what it is, and its
# servers listen there. With anything else it replaces it by an address that others reach.
_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# The ranks' own grace, and as long again for Ray to stop.
_DRIVER_GRACE_S = 2 * GRACE_S
_ANSWER_S = 5.0


@contextmanager
def ray_ranks(config: EngineConfig, num_ranks: int, *, entry: str = ENTRY) -> Iterator[Rendezvous]:
    """Start ranks 1 and up as actors that run `entry`; yields the place where rank 0 joins them.

    Leave the context once they were told to stop, or on an error: afterwards they are gone, and so
    is a cluster that was started here. Raises RayUnavailable, PortTaken, and RankFailed in place of
    the PeerLost or RendezvousFailed that a rank caused.
    """
    is_ours = has_own_cluster(os.environ)
    if not is_ours:
        _check_reachable(os.environ[ADDRESS])
    with ExitStack() as stack:
        folder = stack.enter_context(_private_folder()) if is_ours else None
        channel, driver = stack.enter_context(_driving())
        job = {
            "config": config.to_json(),
            "num_ranks": num_ranks,
            "entry": entry,
            "settings": _rank_settings(config),
            "folder": folder,
        }
        wait_s = config.timeout_s + _ANSWER_S
        try:
            address = _ask(channel, driver, job, wait_s=wait_s)["address"]
            with reserve_port(address) as port:
                own = _ask(channel, driver, {"port": port}, wait_s=wait_s)
                yield Rendezvous(
                    rank=0,
                    size=num_ranks,
                    local_rank=own["gpu_idx"],
                    address=address,
                    port=port,
                    timeout_s=config.timeout_s,
                )
        except (PeerLost, RendezvousFailed) as error:
            ended = _hear_end(channel, driver, error=error)
            raise_for_rank(ended, num_ranks=num_ranks, error=error)
        except BaseException:
            driver.mute()
            raise


def has_own_cluster(environ: Mapping[str, str]) -> bool:
    """Whether a cluster is to be started; raises RayUnavailable for an address of another kind."""
    address = environ.get(ADDRESS, "")
    if "://" in address:
        raise RayUnavailable(
            f"{ADDRESS}: {address!r}; limit HOST:PORT of a cluster that this machine is a node of; "
            "Ray's client protocol has no place for rank 0"
        )
    return address in ("", "local")


def driver_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment of the driver, and so of a cluster that it starts."""
    base = {**environ, **own_packages(environ), **_QUIET}
    if has_own_cluster(environ):
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        return {name: text for name, text in base.items() if name != ADDRESS} | _ON_LOOPBACK | token
    return base | _ON_LOOPBACK if _is_loopback(environ[ADDRESS]) else base


def _rank_settings(config: EngineConfig) -> dict[str, str]:
    # All ranks of a node see all its GPUs, so that they can reach each other's memory.
    sight = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    return NO_MULTICAST | sight | {THREADS: str(config.threads)}


def _check_reachable(address: str) -> None:
    """Ray itself tries for a minute."""
    host, has_port, port = address.rpartition(":")
    if not has_port:
        return  # "auto": Ray looks for the cluster that this machine is a node of
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise RayUnavailable(
            f"{ADDRESS}: {address!r} cannot be reached ({error}); limit HOST:PORT where a cluster "
            f"answers within {_ANSWER_S:g} s; correct it, or unset it to start one here"
        ) from error


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _private_folder() -> Iterator[str]:
    """A folder for Ray's sockets and logs below one that is closed to others: Ray opens its own."""
    with TemporaryDirectory(prefix="longspan-ray-") as closed:
        # Short: the path of a socket below it must fit into 107 bytes.
        yield os.path.join(closed, "r")


@contextmanager
def _driving() -> Iterator[tuple[Channel, Supervisor]]:
    """A driver and the channel to it; on leaving, it has ended the ranks and itself."""
    channel, theirs = open_channel()
    with channel, theirs:
        command = Command(
            rank=0,
            label="ray",
            argv=(
                *(sys.executable, "-P", "-m", "orchestrator.cluster.ray_driver"),
                str(theirs.fileno()),
            ),
            environ=driver_environment(os.environ),
            pass_fds=(theirs.fileno(),),
        )
        with Supervisor([command]) as driver:
            theirs.close()
            try:
                yield channel, driver
            finally:
                _let_go(channel, driver)


def _let_go(channel: Channel, driver: Supervisor) -> Ended:
    channel.end()
    (end,) = driver.stop(grace_s=_DRIVER_GRACE_S)
    return end


def _ask(channel: Channel, driver: Supervisor, message: Message, *, wait_s: float) -> Message:
    """The driver's answer; raises RayUnavailable where it has none."""
    channel.send(message)
    answer = channel.receive(timeout_s=wait_s)
    if answer is None:
        raise _silence(_let_go(channel, driver))
    if "fault" in answer:
        raise RayUnavailable(answer["fault"])
    return answer


def _hear_end(channel: Channel, driver: Supervisor, *, error: Exception) -> list[Ended]:
    """How the ranks ended; raises RayUnavailable where their driver went before them."""
    end = _let_go(channel, driver)
    answer = channel.receive()
    if answer is None:
        raise _silence(end) from error
    return [Ended(**rank) for rank in answer["ended"]]


def _silence(driver: Ended) -> RayUnavailable:
    return RayUnavailable(
        f"ray: its driver ended with code {driver.code} ({driver.last_line or 'it said nothing'}); "
        "limit a driver that lives as long as the ranks; start all of them again"
    )

"""How ranks find each other: the one place for environment variables and the rendezvous deadline.

Owns which variables are read and set, which addresses are accepted, and the life of the process
group. Refuses to know the mesh and what the ranks do. The connections between ranks are neither
encrypted nor authenticated (PyTorch's design), so they never leave loopback or a private network.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from collectives import backend
from collectives.distributed import DistributedGroup
from collectives.errors import GroupMisuse, PeerLost, RendezvousFailed, RendezvousInvalid
from collectives.liveness import describe_process

Device = Literal["cpu", "cuda"]
DEFAULT_TIMEOUT_S = 30.0
# A rank that is lost is known to the others soon enough to have ended within 30 s.
MAX_OPERATION_TIMEOUT_S = 20.0
# NVLink multicast is never used: it needs rights that containers do not have.
NO_MULTICAST = {
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
}
_ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
# A wait orders streams and does not hold up the host; `settle` watches in its place. An error makes
# NCCL's watchdog free the GPU (2), not end the process (3), for the process has an error to name.
# Launchers set these by themselves (torchrun does), so what is set gives way.
_STREAM_WAIT = {"TORCH_NCCL_BLOCKING_WAIT": "0", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
_COUNT = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks meet and who this one is. `address` is an IP address, loopback or private.

    `timeout_s` is the deadline for meeting, `operation_timeout_s` afterwards that of each
    operation: a rank may compute no longer than that between two of them. None is `timeout_s`, and
    no more than 20 s. `is_hosted` says that the launcher already serves the store at that place, as
    torchrun does.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    timeout_s: float = DEFAULT_TIMEOUT_S
    operation_timeout_s: float | None = None
    is_hosted: bool = False

    def __post_init__(self) -> None:
        _check_range("WORLD_SIZE", self.size, 1, 65536)
        _check_range("RANK", self.rank, 0, self.size - 1)
        _check_range("LOCAL_RANK", self.local_rank, 0, self.size - 1)
        _check_range("MASTER_PORT", self.port, 1, 65535)
        _check_address(self.address)
        _check_deadline("timeout_s", self.timeout_s)
        _check_deadline("operation_timeout_s", self.operation_limit_s)

    @property
    def is_loopback(self) -> bool:
        """Whether all ranks are on this machine."""
        return ipaddress.ip_address(self.address).is_loopback

    @property
    def operation_limit_s(self) -> float:
        """Deadline of each operation, resolved."""
        if self.operation_timeout_s is None:
            return min(self.timeout_s, MAX_OPERATION_TIMEOUT_S)
        return self.operation_timeout_s


def read_rendezvous(
    environ: Mapping[str, str] = os.environ,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    operation_timeout_s: float | None = None,
) -> Rendezvous:
    """Rendezvous from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets.

    A host name is resolved here, once. Raises RendezvousInvalid, which names the variable.
    """
    return Rendezvous(
        rank=_read_count(environ, "RANK"),
        size=_read_count(environ, "WORLD_SIZE"),
        local_rank=_read_count(environ, "LOCAL_RANK"),
        address=_resolve(_read(environ, "MASTER_ADDR")),
        port=_read_count(environ, "MASTER_PORT"),
        timeout_s=timeout_s,
        operation_timeout_s=operation_timeout_s,
        is_hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def required_settings(rendezvous: Rendezvous) -> dict[str, str]:
    """Variables that every rank must have, with the only value of each that is accepted."""
    return NO_MULTICAST | (_ON_LOOPBACK if rendezvous.is_loopback else {}) | _STREAM_WAIT


def apply_settings(environ: MutableMapping[str, str], settings: Mapping[str, str]) -> None:
    """Set what is not set; RendezvousInvalid, and nothing set, where a contrary value is that
    somebody must have meant.
    """
    for name, value in settings.items():
        if name not in _STREAM_WAIT and environ.get(name, value) != value:
            raise RendezvousInvalid(
                f"{name}: {environ[name]!r} is set; limit {value!r}; unset it or set that value"
            )
    environ.update(settings)


@contextmanager
def join(rendezvous: Rendezvous, *, device: Device = "cpu") -> Iterator[DistributedGroup]:
    """Meet the other ranks over gloo (cpu) or NCCL (cuda); every rank must call it.

    Sets this process's environment and, on cuda, its current device. At a clean exit the ranks wait
    for each other; whatever happens, the process groups are destroyed. Raises RendezvousInvalid,
    RendezvousFailed when not all ranks came in time, GroupMisuse in a process that has joined.
    """
    if dist.is_initialized():
        raise GroupMisuse("join: a process group exists; limit one a process; leave it first")
    settings = required_settings(rendezvous)
    apply_settings(os.environ, settings)
    place = _pick_device(rendezvous, device)
    is_clean = False
    group: DistributedGroup | None = None
    try:
        group = _meet(rendezvous, place)
        assert all(os.environ.get(name) == value for name, value in settings.items())
        yield group
        if not (group.is_broken or group.control.is_broken):
            group.settle()
            # Rank 0 serves the store: it must not be gone while another still needs it.
            group.control.barrier()
            is_clean = True
    finally:
        if dist.is_initialized():
            backend.leave(device=place, is_clean=is_clean)
        if group is not None:
            group.forget()


def _meet(rendezvous: Rendezvous, device: torch.device) -> DistributedGroup:
    ranks = range(rendezvous.size)
    limit_s = rendezvous.operation_limit_s

    def make(
        handle: dist.ProcessGroup,
        at: torch.device,
        processes: Sequence[bytes] = (),
        control: DistributedGroup | None = None,
    ) -> DistributedGroup:
        return DistributedGroup(
            handle, ranks=ranks, device=at, timeout_s=limit_s, processes=processes, control=control
        )

    try:
        handle = backend.meet(
            _open_store(rendezvous),
            rank=rendezvous.rank,
            size=rendezvous.size,
            device=device,
            timeout_s=rendezvous.timeout_s,
        )
        beside = backend.make_handle(ranks, device=backend.CPU, timeout_s=limit_s)
        assert beside is not None
        backend.set_deadline(handle, device=device, timeout_s=limit_s)
        processes = make(beside, backend.CPU).all_gather_bytes(describe_process())
        control = make(beside, backend.CPU, processes)
        group = make(handle, device, processes, control)
        for each in (control, group):
            each.find_neighbours()
    except (RuntimeError, OSError, PeerLost) as error:
        place = f"{rendezvous.address}:{rendezvous.port}"
        raise RendezvousFailed(
            f"join: rank {rendezvous.rank} of {rendezvous.size} at {place} "
            f"({backend.first_sentence(error)}); limit {rendezvous.timeout_s:g} s; check that all "
            "ranks were started and that the port is free"
        ) from error
    return group


def _open_store(rendezvous: Rendezvous) -> Store:
    """Key-value store of the rendezvous; rank 0 serves it, on the rendezvous address alone."""
    is_server = rendezvous.rank == 0 and not rendezvous.is_hosted
    listener = None
    if is_server:
        # TCPStore by itself would listen on every interface.
        family = socket.AF_INET6 if ":" in rendezvous.address else socket.AF_INET
        listener = socket.create_server((rendezvous.address, rendezvous.port), family=family)
    store = TCPStore(
        rendezvous.address,
        rendezvous.port,
        rendezvous.size,
        is_server,
        timeout=timedelta(seconds=rendezvous.timeout_s),
        master_listen_fd=None if listener is None else listener.detach(),
    )
    return PrefixStore("longspan", store)


def _pick_device(rendezvous: Rendezvous, device: Device) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    _check_range("LOCAL_RANK", rendezvous.local_rank, 0, torch.cuda.device_count() - 1)
    torch.cuda.set_device(rendezvous.local_rank)
    return torch.device("cuda", rendezvous.local_rank)


def _read(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:
        raise RendezvousInvalid(
            f"{name}: {'missing' if value is None else 'empty'}; limit a value on every rank; "
            "start the ranks with longspan launch or torchrun"
        )
    return value


def _read_count(environ: Mapping[str, str], name: str) -> int:
    text = _read(environ, name)
    if _COUNT.fullmatch(text) is None:
        raise RendezvousInvalid(
            f"{name}: {text!r}; limit a count in decimal digits; set it to a number"
        )
    return int(text)


def _resolve(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:
        raise RendezvousInvalid(
            f"MASTER_ADDR: {host!r} has no address ({error}); limit a name that resolves; "
            "give an IP address"
        ) from error


def _check_address(address: str) -> None:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        is_accepted = False
    else:
        is_special = parsed.is_unspecified or parsed.is_reserved or parsed.is_multicast
        is_accepted = parsed.is_loopback or (parsed.is_private and not is_special)
    if not is_accepted:
        raise RendezvousInvalid(
            f"MASTER_ADDR: {address!r}; limit a loopback or private address, for ranks speak "
            "unencrypted; use 127.0.0.1 or an address of the private network"
        )


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RendezvousInvalid(f"{name}: {value}; limit {low} to {high}; correct the variable")


def _check_deadline(name: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise RendezvousInvalid(
            f"{name}: {seconds}; limit a finite number above 0; give it in seconds"
        )

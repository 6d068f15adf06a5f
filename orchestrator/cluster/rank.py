"""One rank, from the rendezvous to the last step: the same on every rank but for who speaks first.

Owns how a rank comes to have groups, weights and a worker, and the loop of those that follow.
Refuses to know who started the process (`spawn.py`, `ray_ranks.py`, a launcher) and what is asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from collectives import Group, Rendezvous, SoloGroup, join, parse_mesh
from orchestrator.capacity import measure_free_bytes
from orchestrator.config import EngineConfig
from orchestrator.errors import RankMismatch, UsageError
from orchestrator.model.load import LoadedModel, Loading, load_model
from orchestrator.place import take_place
from orchestrator.steps import Chain, Stop, decode
from orchestrator.worker import AgreedFault, Worker
from sparse_attn.api import find_backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A worker; load_s: seconds that its weights took; free_bytes: what the rank with the least
    memory has for documents and questions.
    """

    worker: Worker
    load_s: float
    free_bytes: int


def load_worker(config: EngineConfig, group: Group) -> Loaded:
    """This rank's worker, with its weights; every rank must call it.

    Raises UsageError for a device that is not there, a ModelError, MeshInvalid.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was asked for; this process sees 0 GPUs; use --device cpu")
    backend = find_backend(config.backend)
    torch.set_num_threads(config.threads)
    mesh = parse_mesh(config.mesh)
    began = time.perf_counter()
    model = load_model(
        config.model,
        Loading(
            dtype=getattr(torch, config.dtype),
            device=_device_of(config, group),
            linear=backend.linear,
            linear_split=backend.linear_split if config.is_deterministic else None,
            mesh=mesh,
            group=group,
            fused=backend.fused_for(getattr(torch, config.dtype)),
        ),
    )
    cfg, load_s = model.cfg, time.perf_counter() - began
    place = take_place(mesh, group, num_heads=cfg.num_heads, num_kv_heads=cfg.num_kv_heads)
    return Loaded(
        worker=Worker(config, model, backend, place),
        load_s=load_s,
        free_bytes=measure_free_bytes(place, model.decoder.device),
    )


def run_rank(rendezvous: Rendezvous, config: EngineConfig) -> None:
    """Follow rank 0 until it says stop. Prints nothing.

    Raises RankMismatch where this rank was started differently, PeerLost where another is gone.
    """
    with joined(rendezvous, config) as group:
        worker = load_worker(config, group).worker
        chain = Chain(identity_of(config, worker.model))
        while follow(worker, group, chain):
            pass


def follow(worker: Worker, group: Group, chain: Chain) -> bool:
    """Carry out the next step of rank 0; False after the last."""
    data = group.control.broadcast_bytes(None)
    compare(chain.add(data), group)
    action = decode(data).action
    try:
        worker.execute(action)
    except AgreedFault:
        return True  # every rank knows, and rank 0 tells
    return not isinstance(action, Stop)


def compare(digest: bytes, group: Group) -> None:
    """Raise RankMismatch on every rank unless all have the same digest."""
    own = torch.tensor(list(digest), dtype=torch.uint8)
    digests = group.control.all_gather(own)
    differing = [r for r in range(group.size) if not torch.equal(digests[r], digests[0])]
    if differing:
        raise RankMismatch(
            f"rank {group.rank}: ranks {differing} follow another plan than rank 0; limit one "
            "model, dtype, mesh, store and version on all ranks; start all of them the same way"
        )


def identity_of(config: EngineConfig, model: LoadedModel) -> dict[str, Any]:
    """What all ranks must have in common."""
    return {
        "version": version("longspan"),
        "torch": torch.__version__,
        "model": model.fingerprint,
        "dtype": config.dtype,
        "device": config.device,
        "backend": config.backend,
        "mesh": config.mesh,
        "threads": config.threads,
        "deterministic": config.is_deterministic,
    }


@contextmanager
def joined(rendezvous: Rendezvous, config: EngineConfig) -> Iterator[Group]:
    """The group of all ranks; one rank alone needs none."""
    if rendezvous.size == 1:
        yield SoloGroup()
        return
    with join(rendezvous, device="cuda" if config.device == "cuda" else "cpu") as group:
        yield group


def _device_of(config: EngineConfig, group: Group) -> torch.device:
    if config.device == "cuda" and group.size > 1:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(config.device)

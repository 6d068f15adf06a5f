"""What is called of torch.distributed beyond its documented calls, in torch 2.11 and 2.13 alike.

Owns the names that changed, how process groups are made and left, and what is kept of an error's
text. Refuses to know what the groups are for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

# torch 2.13 gave the two new names, and warns about the old ones; 2.11 has only those.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
CPU = torch.device("cpu")
# `settle` comes first. NCCL's watchdog is for a host that waits for the GPU without it: it frees
# the GPU, and the next call of the group raises.
_LAST_RESORT = 3.0
_ABORT_TIMEOUT = timedelta(seconds=5)
_SUCCESS = 0  # of torch's WorkResult
_SOURCE_LINE = re.compile(r"^\[[^\]]*\] ?")


def meet(
    store: Store, *, rank: int, size: int, device: torch.device, timeout_s: float
) -> dist.ProcessGroup:
    """Process group of the whole job over gloo (cpu) or NCCL (cuda); RuntimeError when late."""
    dist.init_process_group(
        _name_backend(device),
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        # With a device NCCL connects here and now, so that a rank which cannot says so here.
        device_id=device if device.type == "cuda" else None,
    )
    handle = dist.group.WORLD
    assert handle is not None
    return handle


def set_deadline(handle: dist.ProcessGroup, *, device: torch.device, timeout_s: float) -> None:
    """Change the deadline of each operation of a group."""
    dist.distributed_c10d._set_pg_timeout(_watchdog_timeout(device, timeout_s), handle)


def make_handle(
    ranks: Sequence[int], *, device: torch.device, timeout_s: float
) -> dist.ProcessGroup | None:
    """New process group of some ranks; None on the others. Every rank of the job must call it."""
    made = dist.new_group(
        list(ranks), backend=_name_backend(device), timeout=_watchdog_timeout(device, timeout_s)
    )
    return made if dist.get_rank() in ranks else None


def leave(*, device: torch.device, is_clean: bool) -> None:
    """Destroy all process groups; after a loss NCCL's are aborted, so that none waits for a peer.

    Then kernels that wait for a lost rank leave the GPU. What the backend says against that is not
    raised: there is an error on its way already.
    """
    if device.type != "cuda" or is_clean:
        dist.destroy_process_group()
        return
    with suppress(RuntimeError):
        for handle in list(dist.distributed_c10d._world.pg_map):
            # An abort waits for kernels as long as an operation may, and a GPU may hang by itself.
            dist.distributed_c10d._set_pg_timeout(_ABORT_TIMEOUT, handle)
        dist.distributed_c10d._abort_process_group()


class NcclWork:
    """An operation on NCCL's stream, as `watch` sees it."""

    __slots__ = ("_result", "_work")

    def __init__(self, work: Any) -> None:
        self._work = work
        self._result = work.get_future_result()

    def is_completed(self) -> bool:
        """Whether its kernels have ended, or an error was found."""
        return bool(self._work.is_completed())

    def has_failed(self) -> bool:
        """Whether the watchdog has found an error; it says so before it frees the GPU."""
        return bool(self._result.done() and self._result.value() != _SUCCESS)


class StreamEnd:
    """All that was launched on the current stream until now, as `watch` sees it."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = torch.Event(device="cuda")
        self._event.record()

    def is_completed(self) -> bool:
        """Whether the stream has come so far."""
        return self._event.query()

    def has_failed(self) -> bool:
        """Never: a kernel's error is raised where CUDA is called next."""
        return False


def first_sentence(error: Exception) -> str:
    """What a library's error says, without its source line, stack and advice."""
    text = _SOURCE_LINE.sub("", " ".join(str(error).split()))
    return text.split(". ", maxsplit=1)[0].rstrip(".") or type(error).__name__


def _name_backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _watchdog_timeout(device: torch.device, timeout_s: float) -> timedelta:
    """Gloo's deadline is ours; NCCL's watchdog comes after `settle` has had its turn."""
    return timedelta(seconds=timeout_s * (_LAST_RESORT if device.type == "cuda" else 1))

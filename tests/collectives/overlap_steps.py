"""Computations for tests of the schedule: one that notes what it does, one that computes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from collectives import Group, Pending, SoloGroup, Steps


class _Noted:
    """A collective that notes when it is waited for."""

    def __init__(self, pending: Pending, event: str, events: list[str]) -> None:
        self._pending = pending
        self._event = event
        self._events = events

    def wait(self) -> torch.Tensor:
        self._events.append(self._event)
        return self._pending.wait()


def noted(
    name: str,
    num_collectives: int,
    events: list[str],
    *,
    fails_at: int = -1,
    group: Group | None = None,
    pause_s: float = 0.0,
) -> Steps[str]:
    """Computes, starts, and so on; notes each; may fail while it computes a step."""
    group = SoloGroup() if group is None else group
    try:
        for step in range(num_collectives + 1):
            events.append(f"{name} computes {step}")
            time.sleep(pause_s)
            if step == fails_at:
                raise ZeroDivisionError
            if step < num_collectives:
                events.append(f"{name} starts {step}")
                pending = group.start_all_gather(torch.full((1,), step))
                received = yield _Noted(pending, f"{name} waits {step}", events)
                assert received.flatten().tolist() == [step] * group.size
    finally:
        events.append(f"{name} ends")
    return f"{name}{num_collectives}"


def mix(group: Group, sequence: Sequence[str], seed: float) -> Steps[torch.Tensor]:
    """A number that depends on every collective's result and on their order."""
    tensor = torch.arange(1.0, group.size + 1) * seed + group.rank
    for step in sequence:
        if step == "g":
            tensor = (yield group.start_all_gather(tensor)).sum(0) % 97
        elif step == "r":
            tensor = (yield group.start_all_reduce_(tensor)) % 89
        else:
            tensor = (yield group.start_all_to_all(tensor)) * 3 % 83
    return tensor

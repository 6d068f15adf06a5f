"""Seconds of one operation on a machine that others may be using too.

Owns the clock of every probe. The least of several repeats is taken: what disturbs a measurement
only ever adds to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Repeats go on until this much time is spent, within the two limits.
_BUDGET_S = 0.25
_MIN_REPEATS, _MAX_REPEATS = 3, 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopwatch:
    """Times functions on one device. effort: multiplies how long each probe is repeated."""

    device: torch.device
    effort: float = 1.0

    def best_s(self, work: Callable[[], object]) -> float:
        """Least seconds of `work`, which runs once before it is timed."""
        self.once_s(work)
        best, spent, count = float("inf"), 0.0, 0
        while count < _MIN_REPEATS or (spent < _BUDGET_S * self.effort and count < _MAX_REPEATS):
            seconds = self.once_s(work)
            best, spent, count = min(best, seconds), spent + seconds, count + 1
        return best

    def once_s(self, work: Callable[[], object]) -> float:
        """Seconds of one run, until the device has finished it."""
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

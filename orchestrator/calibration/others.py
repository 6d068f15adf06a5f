"""How much of the machine other programs used while something was measured.

Owns reading the kernel's counters. A measurement beside others is too slow, and nobody can tell
afterwards; so it is said with the result.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
# Columns of the first line of /proc/stat that are time in which a core did nothing.
_IDLE = (3, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Seconds of cores: all, those that did something, and those of this process and its children
    that have ended.
    """

    total_s: float
    busy_s: float
    own_s: float

    @classmethod
    def now(cls) -> Usage:
        """Since the machine and this process started."""
        ticks = os.sysconf("SC_CLK_TCK")
        counts = [int(word) for word in _STAT.read_text(encoding="ascii").split()[1:9]]
        total, idle = sum(counts) / ticks, sum(counts[i] for i in _IDLE) / ticks
        return cls(total_s=total, busy_s=total - idle, own_s=sum(os.times()[:4]))

    def others_share(self, before: Usage) -> float:
        """Share of all cores, from 0 to 1, that others used since `before`."""
        busy_s, own_s = self.busy_s - before.busy_s, self.own_s - before.own_s
        return min(1.0, max(0.0, busy_s - own_s) / max(1e-9, self.total_s - before.total_s))

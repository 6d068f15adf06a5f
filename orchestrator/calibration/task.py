"""What ranks beside each other are asked to measure, as plain data and as a command line.

Owns the two spellings. Refuses to know how it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """sizes: a key of `arithmetic.SIZES`; threads: of each rank on a CPU."""

    device: str
    dtype: str
    backend: str
    sizes: str
    threads: int

    def arguments(self) -> tuple[str, ...]:
        """As a child's command line has it."""
        return (self.device, self.dtype, self.backend, self.sizes, str(self.threads))

    @classmethod
    def read(cls, arguments: Sequence[str]) -> Task:
        """Inverse of `arguments`."""
        device, dtype, backend, sizes, threads = arguments
        return cls(device=device, dtype=dtype, backend=backend, sizes=sizes, threads=int(threads))

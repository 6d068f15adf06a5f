"""Tensors of all ranks side by side, in terms of a gather of equal ones.

Owns the padding to the widest and the cut. Refuses to know how a group moves anything; one that can
write each rank's columns where they belong does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collectives.group import Group, Pending


class SideBySide:
    """A gather that was started, and that becomes `[T, sum(widths)]` in `wait`."""

    __slots__ = ("_gathered", "_result", "_widths")

    def __init__(self, group: Group, tensor: torch.Tensor, widths: Sequence[int]) -> None:
        missing = max(widths) - tensor.shape[1]
        padded = functional.pad(tensor, (0, missing)) if missing else tensor
        self._gathered: Pending | None = group.start_all_gather(padded)
        self._widths = widths
        self._result: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """Result, once it may be used; raises PeerLost. A second call gives the same."""
        if self._gathered is not None:
            rows = zip(self._gathered.wait(), self._widths, strict=True)
            self._result = torch.cat([columns[:, :width] for columns, width in rows], dim=1)
            self._gathered = None
        assert self._result is not None
        return self._result

"""An operation that was started and not yet waited for.

Owns what keeps its tensors alive meanwhile. Refuses to know how it is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(slots=True, kw_only=True)
class Flight:
    """A `Pending` that holds what it reads and writes until it is waited for.

    finish: waits, once; raises PeerLost.
    """

    result: torch.Tensor
    held: torch.Tensor | None
    finish: Callable[[], None] | None

    def wait(self) -> torch.Tensor:
        """Result, once it may be used; raises PeerLost. A second call gives the same."""
        if self.finish is not None:
            self.finish()
            self.finish = self.held = None
        return self.result

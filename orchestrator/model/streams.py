"""What a step does that nothing waits for: work beside the forward, and numbers sent to the device.

Owns the second stream and the waits around it, and pinned memory that copies read while the host
goes on. Both can be captured in a graph or not, and on a CPU both are plain calls in the same
order. Refuses to know what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_cuda: Any = torch.cuda  # streams and events have no types


class Beside:
    """A second stream. What runs on it starts after all that was launched before `fork`, and is
    over for what is launched after `join`; in between, nobody overwrites what it reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _cuda.Stream(device) if device.type == "cuda" else None
        self._kept: list[Tensor] = []
        self._is_forked = False

    @contextmanager
    def fork(self, *read: Tensor) -> Iterator[None]:
        """Launches within go beside; tensors `read` there stay alive until `join`."""
        if self._stream is None:
            yield
            return
        self._kept += read
        self._is_forked = True
        self._stream.wait_stream(_cuda.current_stream(self._stream.device))
        with _cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from now on comes after what went beside; the host waits for nothing."""
        if self._stream is not None and self._is_forked:
            _cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._is_forked = False
        self._kept.clear()


class Mark:
    """A place among what was launched, for which the host can wait."""

    def __init__(self, device: torch.device) -> None:
        self._event = _cuda.Event() if device.type == "cuda" else None

    def put(self) -> None:
        """Behind all that was launched on the current stream."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until the device has come to where it was put last."""
        if self._event is not None:
            self._event.synchronize()


class Upload:
    """there: a tensor on the device, written through pinned memory without waiting."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.there = torch.zeros(*shape, dtype=dtype, device=device)
        self._here = pinned(shape, dtype, device)
        self._sent = Mark(device)

    def send(self, values: Tensor) -> None:
        """Launch the copy of values on the CPU; waits if the last one has not left."""
        self._sent.wait()
        self._here.copy_(values)
        self.there.copy_(self._here, non_blocking=True)
        self._sent.put()


def pinned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros on the CPU that a device's copies can read and write while the host goes on."""
    return torch.zeros(*shape, dtype=dtype, pin_memory=device.type == "cuda")

"""Files of a sealed segment, written beside the computation of the next one on a GPU.

Owns the one segment that is on its way to the disk. Refuses to know what is in it, and when it
counts as sealed: that is when whoever waits for it has told the manifest.

On a GPU a segment of gigabytes leaves through a stream and a buffer of its own; a thread has it
checked, written and synced. On a CPU whoever waits writes: there cores are needed for computing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kv_store import FileEntry, SegmentFiles
from kv_store.staging import Staging

Heads = Mapping[int, Mapping[str, Tensor]]
Entries = dict[int, FileEntry]


class SegmentWriting:
    """Writes one segment at a time: `start`, then `wait`, then the next."""

    def __init__(self, files: SegmentFiles, device: torch.device) -> None:
        self.files = files
        self._device = device
        self._thread = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._staging = Staging(is_locked=device.type == "cuda")
        self._stream: Any = None
        self._pending: Callable[[], Entries] | None = None

    def start(self, segment_idx: int, heads: Heads) -> None:
        """Begin to write some KV heads of a segment, which nobody changes until `wait` returns."""
        assert self._pending is None
        if self._thread is None:
            self._pending = partial(self.files.write, segment_idx, heads)
            return
        built = torch.cuda.current_stream(self._device).record_event()
        self._pending = self._thread.submit(self._write, segment_idx, heads, built).result

    def wait(self) -> Entries:
        """What the manifest lists of the segment that was started. Raises what writing raised."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        return pending()

    def close(self) -> None:
        """Let what was started end; nothing is written afterwards."""
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, segment_idx: int, heads: Heads, built: Any) -> Entries:
        if self._stream is None:  # one for all segments, so that its memory is used again
            cuda: Any = torch.cuda
            self._stream = cuda.Stream(self._device)
        self._stream.wait_event(built)
        with torch.cuda.stream(self._stream):
            host = self._staging.copy(heads)
        self._stream.synchronize()
        return self.files.write(segment_idx, host)

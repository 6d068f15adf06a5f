"""Bytes/s of the store's disk, as segments are written (checksums, fsync) and read (checksums).

Owns one file like a segment's. Reading finds it in the kernel's cache, as a document that was just
ingested is found: a cold disk is slower.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from kv_store.disk import TensorFile, encode_tensors
from orchestrator.calibration.timing import Stopwatch
from orchestrator.planner.topology import Disk


def measure_disk(directory: Path, *, num_bytes: int = 64 << 20) -> Disk:
    """Write and read a file of that size below `directory`; nothing stays."""
    stopwatch = Stopwatch(device=torch.device("cpu"))
    tensors = {name: torch.randn(num_bytes // 8) for name in ("k", "v")}
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".calibrate-") as folder:
        place = Path(folder)
        write_s = stopwatch.best_s(lambda: encode_tensors(tensors, {}).write(place, "segment"))

        def read() -> None:
            with TensorFile(place, "segment", expected=None) as file:
                file.read_all()

        read_s = stopwatch.best_s(read)
    return Disk(write_bytes_per_s=num_bytes / write_s, read_bytes_per_s=num_bytes / read_s)

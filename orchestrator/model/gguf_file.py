"""Opens a GGUF file with the `gguf` package and gives its metadata and tensors by name.

Owns what a cut or foreign file looks like, and dequantisation in pieces of bounded size. Refuses
to know what the names mean (`gguf_config.py`, `gguf_weights.py`, `gguf_tokenizer.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.errors import ModelDamaged, ModelNotFound, ModelUnsupported

_PIECE_BYTES = 1 << 26


class _ArrayReader(gguf.GGUFReader):
    """GGUFReader over a plain array view of the mapped file.

    The package slices its `np.memmap` several times for each of some 100,000 vocabulary strings;
    a memmap slice costs three times an array slice, and together that was most of loading a model.
    """

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, np.asarray(value) if key == "data" else value)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A readable GGUF file: `metadata` by key, `tensors` by name; data stays mapped on disk."""

    name: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, gguf.ReaderTensor]

    def shape(self, tensor_name: str) -> tuple[int, ...]:
        """Shape of a tensor in the order of torch: the file lists the fastest dimension first."""
        return tuple(int(n) for n in reversed(self.tensors[tensor_name].shape))

    def read(self, tensor_name: str, rows: slice | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, float32 rows) of a tensor, dequantised some 64 MiB at a time.

        rows: those that are wanted, None for all; the first row counts from the first of them.

        Raises ModelUnsupported for a quantisation that the `gguf` package cannot undo.
        """
        tensor = self.tensors[tensor_name]
        data: NDArray[Any] = np.atleast_1d(tensor.data)
        row_bytes = 4 * (int(tensor.shape[0]) if data.ndim > 1 else 1)
        step = max(1, _PIECE_BYTES // row_bytes)
        if rows is not None:
            data = data[rows]
        if data.ndim == 1:
            step = max(1, len(data))
        for start in range(0, len(data), step):
            try:
                piece = dequantize(data[start : start + step], tensor.tensor_type)
            except NotImplementedError as error:
                raise ModelUnsupported(
                    f"tensor {tensor_name} of {self.name} is quantised as "
                    f"{tensor.tensor_type.name}; supported: what the gguf package dequantises; "
                    "choose another quantisation"
                ) from error
            # Stored float32 comes as a view of the read-only file, anything else as a fresh array.
            yield start, torch.from_numpy(piece if piece.flags.writeable else piece.copy())


def open_gguf(path: Path) -> GgufFile:
    """Return the file at `path`; raises ModelNotFound, or ModelDamaged for cut or foreign bytes."""
    if not path.is_file():
        raise ModelNotFound(f"model file {path} does not exist; check the path")
    try:
        reader = _ArrayReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise ModelDamaged(
            f"{path.name} is cut or is no GGUF file, at {path.stat().st_size} bytes ({error}); "
            "fetch the model again"
        ) from error
    if reader.byte_order == "S":
        raise ModelUnsupported(
            f"{path.name} is written for the other byte order; this machine's order is needed; "
            "choose another file"
        )
    return GgufFile(
        name=path.name,
        metadata=metadata,
        tensors={tensor.name: tensor for tensor in reader.tensors},
    )

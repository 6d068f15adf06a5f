"""Safetensors files that vouch for themselves: tensors and header carry xxh3-128 checksums.

Owns the byte layout of one file, and the rule that bytes are checked before they are used. Refuses
to know which tensors a document has. The format: docs/disk_format.md.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import xxhash
from torch import Tensor

from kv_store.errors import DocumentDamaged
from kv_store.files import write_atomic
from kv_store.manifest import FileEntry, checksum

CHUNK_BYTES = 1 << 20

_CODES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "float8_e4m3fn": "F8_E4M3",
}
_NAMES = {code: name for name, code in _CODES.items()}

# The header checksum stands at a fixed place, so it can be blanked without parsing the header.
_HEADER_START = b'{"__metadata__":{"header_checksum":"'
_HEX_DIGITS = 32
_HEX_SPAN = slice(8 + len(_HEADER_START), 8 + len(_HEADER_START) + _HEX_DIGITS)
_HEADER_ALIGNMENT = 64
_MAX_HEADER_BYTES = 16 << 20
_CHECKSUM_PREFIX = "checksum."
_MAX_PIECES = 512


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a layout's dtype name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The layout's name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def byte_rows(tensor: Tensor) -> list[memoryview]:
    """The bytes of a CPU tensor whose rows tensor[i] are contiguous, one shared view a row."""
    if not tensor.numel():
        return []
    rows = tensor if tensor.dim() > 2 else tensor.unsqueeze(-1)
    return [row.reshape(-1).data for row in rows.view(torch.uint8).numpy()]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies in its file, in bytes from the file's start, one checksum per MiB."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    checksums: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedFile:
    """A safetensors file ready to be written: header first, then tensor bytes in file order."""

    digest: str
    pieces: tuple[bytes | memoryview, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        return sum(len(piece) for piece in self.pieces)

    def write(self, directory: Path, file: str) -> FileEntry:
        """Write it atomically under `directory`; return what the manifest lists.

        Errors: StoreFull, StoreNotWritable, StoreError.
        """
        write_atomic(directory / file, self.pieces)
        return FileEntry(path=file, size_bytes=self.size_bytes, digest=self.digest)


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> EncodedFile:
    """Lay out `tensors` (any device and strides) with their checksums and some metadata.

    Order in the file: wider dtypes first so that every tensor is aligned, then by name; equal
    content gives equal bytes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    views = {name: byte_view(tensors[name].detach().cpu().contiguous()) for name in order}
    entries: dict[str, object] = {}
    sums: dict[str, str] = {}
    offset = 0
    for name, view in views.items():
        dtype = _CODES[dtype_name(tensors[name].dtype)]
        span = [offset, offset + len(view)]
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        sums[_CHECKSUM_PREFIX + name] = " ".join(
            checksum(view[a:b]) for a, b in _chunk_spans(len(view))
        )
        offset = span[1]
    head = {"header_checksum": "0" * _HEX_DIGITS, **metadata, **sums}
    raw = json.dumps({"__metadata__": head, **entries}, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % _HEADER_ALIGNMENT)
    header = bytearray(struct.pack("<Q", len(raw)) + raw)
    digest = checksum(bytes(header))
    header[_HEX_SPAN] = digest.encode()
    return EncodedFile(digest=digest, pieces=(bytes(header), *views.values()))


def _chunk_spans(num_bytes: int) -> list[tuple[int, int]]:
    """Start and end of each run of CHUNK_BYTES; one empty run for no bytes."""
    edges = [*range(0, num_bytes, CHUNK_BYTES), num_bytes] if num_bytes else [0, 0]
    return list(pairwise(edges))


class TensorFile:
    """One open safetensors file of a document; whatever is read is checked first.

    Errors of every method: DocumentDamaged, naming the file.
    """

    def __init__(
        self, directory: Path, file: str, *, expected: FileEntry | None, verify: bool = True
    ) -> None:
        """Open `file` of the document in `directory` and check its header.

        `expected` is what the manifest says; None accepts any file that is whole in itself.
        `verify=False` skips tensor checksums, to measure what they cost.
        """
        self._document = directory.name
        self._file = file
        self._verify = verify
        self._fd = -1
        try:
            self._fd = os.open(directory / file, os.O_RDONLY | os.O_CLOEXEC)
            self._size_bytes = os.fstat(self._fd).st_size
            self._read_header(expected)
        except FileNotFoundError:
            raise self._damaged("missing") from None
        except OSError as error:
            self.close()
            raise self._damaged(f"cannot be read: {error.strerror}") from error
        except DocumentDamaged:
            self.close()
            raise

    def _read_header(self, expected: FileEntry | None) -> None:
        if expected is not None and expected.size_bytes != self._size_bytes:
            raise self._damaged(f"{self._size_bytes} bytes, wanted {expected.size_bytes}")
        prefix = os.pread(self._fd, 8, 0)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        limit = min(_MAX_HEADER_BYTES, self._size_bytes - 8)
        if not _HEX_SPAN.stop - 8 <= length <= limit:
            raise self._damaged(f"header of {length} bytes, limit {limit}")
        raw = bytearray(prefix + os.pread(self._fd, length, 8))
        self.digest = raw[_HEX_SPAN].decode("latin-1")
        raw[_HEX_SPAN] = b"0" * _HEX_DIGITS
        if self.digest != checksum(bytes(raw)):
            raise self._damaged("header checksum does not match")
        if expected is not None and expected.digest != self.digest:
            raise self._damaged("belongs to another document or version")
        self._parse(json.loads(raw[8:]), data_start=len(raw))

    def _parse(self, header: dict[str, dict[str, object]], *, data_start: int) -> None:
        self.metadata = {k: str(v) for k, v in header.pop("__metadata__").items()}
        self.entries = {
            name: _parse_entry(fields, self.metadata[_CHECKSUM_PREFIX + name], data_start)
            for name, fields in header.items()
        }
        end = max((entry.end for entry in self.entries.values()), default=data_start)
        if end != self._size_bytes:
            raise self._damaged(f"{self._size_bytes} bytes, wanted {end}")

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        return self._size_bytes

    def read_into(self, name: str, pieces: Sequence[memoryview]) -> None:
        """Read a tensor into writable byte views that together have exactly its size.

        On an error the views hold bytes that must not be used.
        """
        entry = self.entries[name]
        for chunk_idx, run in enumerate(_runs(pieces)):
            self._read_chunk(name, entry, chunk_idx, run)

    def read(self, name: str) -> Tensor:
        """One tensor, in host memory."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
        self.read_into(name, [byte_view(tensor)])
        return tensor

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor by name, in host memory."""
        return {name: self.read(name) for name in self.entries}

    def check_all(self) -> None:
        """Read every byte of the file and check it."""
        scratch = memoryview(bytearray(CHUNK_BYTES))
        for name, entry in self.entries.items():
            for chunk_idx, (start, end) in enumerate(_chunk_spans(entry.end - entry.start)):
                self._read_chunk(name, entry, chunk_idx, [scratch[: end - start]])

    def _read_chunk(
        self, name: str, entry: TensorEntry, chunk_idx: int, run: Sequence[memoryview]
    ) -> None:
        offset = entry.start + chunk_idx * CHUNK_BYTES
        try:
            for first in range(0, len(run), _MAX_PIECES):
                batch = run[first : first + _MAX_PIECES]
                num_bytes = sum(len(piece) for piece in batch)
                if os.preadv(self._fd, batch, offset) != num_bytes:
                    raise self._damaged(f"tensor {name}: ends early")
                offset += num_bytes
        except OSError as error:
            raise self._damaged(f"tensor {name} cannot be read: {error.strerror}") from error
        if self._verify and _hash_run(run) != entry.checksums[chunk_idx]:
            raise self._damaged(f"tensor {name}: checksum of MiB {chunk_idx} does not match")

    def _damaged(self, what: str) -> DocumentDamaged:
        return DocumentDamaged(document=self._document, file=self._file, what=what)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _parse_entry(fields: Mapping[str, object], sums: str, data_start: int) -> TensorEntry:
    shape, offsets = fields["shape"], fields["data_offsets"]
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    return TensorEntry(
        dtype=_NAMES[str(fields["dtype"])],
        shape=tuple(shape),
        start=data_start + offsets[0],
        end=data_start + offsets[1],
        checksums=tuple(sums.split(" ")),
    )


def _runs(pieces: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Cut `pieces` where the checksums are cut: runs of CHUNK_BYTES, the last shorter."""
    run: list[memoryview] = []
    room = CHUNK_BYTES
    for piece in pieces:
        rest = piece
        while len(rest) >= room:
            yield [*run, rest[:room]]
            rest, run, room = rest[room:], [], CHUNK_BYTES
        if len(rest):
            run.append(rest)
            room -= len(rest)
    if run or not any(len(piece) for piece in pieces):
        yield run


def _hash_run(run: Sequence[memoryview]) -> str:
    if len(run) == 1:
        return checksum(run[0])
    state = xxhash.xxh3_128()
    for piece in run:
        state.update(piece)
    return state.hexdigest()

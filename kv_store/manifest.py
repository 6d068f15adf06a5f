"""What a document was made from and which files it consists of: dataclasses to JSON and back.

Owns the manifest's fields, its own checksum, the source digest and the document hash. Refuses to
know tensors, directories and locks. `partial.json` of an unfinished document is the same codec
without a hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import xxhash

from kv_store.errors import DocumentDamaged, FormatUnsupported
from kv_store.layout import Layout

FORMAT = "longspan-document"
FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
PARTIAL_FILE = "partial.json"
TEXT_FILE = "text.txt"
TOKENS_FILE = "tokens.safetensors"

# Where a document was made. A resume must find the same; a finished document stays what was asked
# for under any of them, so they are in neither the source digest nor the document hash.
ENVIRONMENT_FIELDS = ("threads", "mesh", "machine", "library_versions")

# The file ends with `"checksum": "<32 hex digits>"\n}\n`.
_HEX_DIGITS = 32
_ENDING = b'"\n}\n'
_HEX_SPAN = slice(-len(_ENDING) - _HEX_DIGITS, -len(_ENDING))


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentParams:
    """Everything besides text and tokens that decides the bytes of a document.

    `rope`, `selector` and `library_versions` hold plain JSON values.
    """

    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    rope: Mapping[str, Any]
    dtype: str
    kv_dtype: str
    segment_tokens: int
    frame_tokens: int
    sinks: int
    window: int
    num_full_layers: int
    num_sliding_layers: int
    sliding_window: int
    num_kv_heads: int
    head_dim: int
    selector: Mapping[str, Any]
    chunk_tokens: int
    prefill: str
    threads: int
    mesh: str
    machine: str
    library_versions: Mapping[str, str]

    def layout(self, *, num_tokens: int) -> Layout:
        """The shapes of a document of `num_tokens` tokens, frame included."""
        return Layout(
            num_tokens=num_tokens,
            segment_tokens=self.segment_tokens,
            sinks=self.sinks,
            window=self.window,
            num_full_layers=self.num_full_layers,
            num_sliding_layers=self.num_sliding_layers,
            sliding_window=self.sliding_window,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            kv_dtype=self.kv_dtype,
            dtype=self.dtype,
        )

    def plain(self) -> dict[str, Any]:
        """The fields as JSON gives them back, so that two sets compare by value."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a document: path relative to its directory, and what vouches for its bytes.

    `digest` is the header digest of a safetensors file (the header lists every tensor's checksums),
    or the checksum of the whole content of any other file.
    """

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A document as its manifest describes it; `document_hash` is None while it is unfinished."""

    params: DocumentParams
    num_tokens: int
    files: tuple[FileEntry, ...]
    document_hash: str | None

    @property
    def is_complete(self) -> bool:
        """Whether every segment is sealed and the document may be asked."""
        return self.document_hash is not None

    @property
    def layout(self) -> Layout:
        """The shapes of this document."""
        return self.params.layout(num_tokens=self.num_tokens)

    @property
    def source(self) -> str:
        """Digest of text, tokens and parameters: equal if two ingests mean the same document."""
        params = {k: v for k, v in self.params.plain().items() if k not in ENVIRONMENT_FIELDS}
        inputs = {e.path: e.digest for e in self.files if e.path in (TEXT_FILE, TOKENS_FILE)}
        return checksum(canonical([FORMAT_VERSION, params, self.num_tokens, inputs]))

    def segment_entry(self, segment_idx: int, kv_head_idx: int) -> FileEntry:
        """The entry of one KV head's file of one segment of a finished document."""
        return self.segment_files[segment_idx * self.params.num_kv_heads + kv_head_idx]

    @property
    def segment_files(self) -> tuple[FileEntry, ...]:
        """Entries of the segment files, by segment, then by KV head."""
        return self.files[len((TEXT_FILE, TOKENS_FILE)) :]

    def file(self, path: str) -> FileEntry:
        """The entry of one file.

        Errors: KeyError if the manifest does not list it.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        raise KeyError(path)


def checksum(data: bytes | memoryview) -> str:
    """xxh3-128 of some bytes, 32 lower-case hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def canonical(value: object) -> bytes:
    """One spelling of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def compute_document_hash(source: str, segment_files: tuple[FileEntry, ...]) -> str:
    """The document hash: source digest and the header digests of all segment files, in order.

    A header digest covers the ordered tensor names, dtypes, shapes and checksums of its file. No
    clock, host, library version or path outside the document enters.
    """
    lines = [source, *(f"{entry.path} {entry.digest}" for entry in segment_files)]
    return checksum("\n".join([f"{FORMAT} {FORMAT_VERSION}", *lines]).encode())


def describe_differences(held: Manifest, wanted: Manifest) -> str:
    """Which inputs differ, for an error message; empty when none does."""
    ours, theirs = wanted.params.plain(), held.params.plain()
    found = [f"{k} {theirs[k]!r}, asked {ours[k]!r}" for k in ours if ours[k] != theirs[k]]
    if held.file(TEXT_FILE).digest != wanted.file(TEXT_FILE).digest:
        found.insert(0, "other text")
    elif held.file(TOKENS_FILE).digest != wanted.file(TOKENS_FILE).digest:
        found.insert(0, "other token ids or spans")
    return "; ".join(found)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json or partial.json; the last field is the checksum of the rest."""
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "params": manifest.params.plain(),
        "num_tokens": manifest.num_tokens,
        "num_segments": manifest.layout.num_segments,
        "files": [asdict(entry) for entry in manifest.files],
        "document_hash": manifest.document_hash,
        "checksum": "0" * _HEX_DIGITS,
    }
    raw = bytearray(json.dumps(body, indent=1, allow_nan=False).encode() + b"\n")
    raw[_HEX_SPAN] = checksum(bytes(raw)).encode()
    return bytes(raw)


def decode_manifest(raw: bytes, *, document: str, file: str) -> Manifest:
    """The manifest in `raw`, its checksum verified before anything in it is believed.

    `document` and `file` only name the source in errors. Errors: DocumentDamaged; FormatUnsupported
    for another format version.
    """
    blanked = bytearray(raw)
    blanked[_HEX_SPAN] = b"0" * _HEX_DIGITS
    if not raw.endswith(_ENDING) or raw[_HEX_SPAN] != checksum(bytes(blanked)).encode():
        raise DocumentDamaged(document=document, file=file, what="checksum does not match")
    body = json.loads(raw)
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatUnsupported(
            f"document {document!r}: format version {version!r}, limit {FORMAT_VERSION}; "
            "ingest its text again with --replace"
        )
    return Manifest(
        params=DocumentParams(**{f.name: body["params"][f.name] for f in fields(DocumentParams)}),
        num_tokens=body["num_tokens"],
        files=tuple(FileEntry(**entry) for entry in body["files"]),
        document_hash=body["document_hash"],
    )

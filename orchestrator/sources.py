"""Reads the text of a document from a file or standard input; knows no tokens and no store.

UTF-8 text and Markdown are taken as they are: spans in answers refer to exactly these characters.
"""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.errors import InputError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", "")


def read_text(source: str | Path) -> str:
    """The text of a file, or of standard input for "-".

    Raises InputError when it is missing, unreadable, empty, or not UTF-8 text.
    """
    data = sys.stdin.buffer.read() if str(source) == "-" else _read_file(Path(source))
    return decode_text(data, what="standard input" if str(source) == "-" else f"file {source}")


def decode_text(data: bytes, *, what: str) -> str:
    """The text in bytes of unknown origin; `what` names them in a message.

    Raises InputError when they are binary, empty, or not UTF-8.
    """
    if b"\x00" in data[:8192]:
        raise InputError(
            f"{what} is binary (a NUL byte in its first 8192); only UTF-8 text is read; convert "
            f"it first"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}; "
            "only UTF-8 is read; convert it, for example with iconv"
        ) from error
    if not text.strip():
        raise InputError(
            f"{what} is empty ({len(data)} bytes); a document needs at least one character; give "
            f"another"
        )
    return text


def default_name(source: str | Path) -> str:
    """The document's name when none is given: the file's name without its suffix."""
    if str(source) == "-":
        raise InputError(
            "a document from standard input has no name; names come from --name; add --name NAME"
        )
    return Path(source).stem


def _read_file(path: Path) -> bytes:
    if not path.exists():
        raise InputError(
            f"file {path} does not exist; a document is a UTF-8 text file or '-'; check the path"
        )
    if path.is_dir():
        raise InputError(
            f"{path} is a directory; one file at a time is ingested; name a file in it"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"file {path} cannot be read ({error.strerror}); needs read permission; check it"
        ) from error

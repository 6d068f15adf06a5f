"""Entries of the lists of kernels, launched early (`kernels/early.py`) or not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Entry = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]


def launched(entries: Iterable[Entry], *, is_early: bool) -> list[Entry]:
    """The same, with what `early_launch` gives to each kernel that takes it."""
    options = {"launch_pdl": True} if is_early else {}
    return [
        (kernel, signature, {**constants, "EARLY": is_early}, {**own, **options})
        if "EARLY" in kernel.arg_names
        else (kernel, signature, constants, own)
        for kernel, signature, constants, own in entries
    ]

"""Entries of the lists of kernels as they are launched where one may start before another is over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Entry = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]


def started_early(entries: Iterable[Entry]) -> list[Entry]:
    """The same, each kernel that knows about it (`sparse_attn/kernels/early.py`) started early."""
    return [
        (kernel, signature, {**constants, "EARLY": True}, {**options, "launch_pdl": True})
        if "EARLY" in kernel.arg_names
        else (kernel, signature, constants, options)
        for kernel, signature, constants, options in entries
    ]

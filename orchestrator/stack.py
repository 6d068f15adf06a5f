"""What computed an answer, as plain values, and its hash (row A11).

Owns the list of facts that may change an answer's bits: weights, libraries, dtype, device, backend,
selector, mesh, determinism, threads. Clock, paths, host names, question and document are left out.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import xxhash

LIBRARIES = ("longspan", "numpy", "tokenizers", "torch", "transformers")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that take part in an answer."""
    return {name: version(name) for name in LIBRARIES}


def stack_manifest(
    *,
    weights: str,
    dtype: str,
    device: str,
    backend: str,
    selector: Mapping[str, Any],
    mesh: str,
    threads: int,
    is_deterministic: bool,
    libraries: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest with its own `hash`, xxh3-128 over the sorted JSON of everything else."""
    facts: dict[str, Any] = {
        "weights": weights,
        "libraries": dict(libraries),
        "python": platform.python_version(),
        "dtype": dtype,
        "device": device,
        "backend": backend,
        "selector": dict(selector),
        "mesh": mesh,
        "deterministic": is_deterministic,
        "threads": threads,
    }
    packed = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**facts, "hash": xxhash.xxh3_128_hexdigest(packed.encode())}

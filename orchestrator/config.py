"""The common options of a command or an `Engine`, resolved once into explicit values.

Owns defaults and their checks; knows no model. `auto` never survives `resolve`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from orchestrator.errors import UsageError

DEFAULT_MODEL = "smollm2-135m"
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine runs with. threads: of torch, on the CPU."""

    model: str
    store: Path
    device: str
    dtype: str
    backend: str
    threads: int
    mesh: str
    is_deterministic: bool


def resolve(
    *,
    model: str = DEFAULT_MODEL,
    store: str | Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    mesh: str = "auto",
    deterministic: bool = True,
) -> EngineConfig:
    """Explicit values for the common options. Raises UsageError for a value that does not exist."""
    _check_choice("device", device, DEVICES)
    if device != "cpu" and backend == "native":
        raise UsageError(
            f"backend 'native' computes on the CPU, not on device {device!r}; use --backend torch"
        )
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    _check_choice("dtype", dtype, DTYPES)
    if mesh not in ("auto", "1x1"):
        raise UsageError(
            f"mesh {mesh!r} needs more than one rank; this process has 1; leave it at auto"
        )
    if threads is not None and threads < 1:
        raise UsageError(
            f"threads {threads} is below 1; give the number of CPU threads, such as {_cores()}"
        )
    return EngineConfig(
        model=model,
        store=Path(store) if store is not None else default_store(),
        device=device,
        dtype=dtype,
        backend=backend or ("native" if device == "cpu" else "torch"),
        threads=threads or _cores(),
        mesh="1x1",
        is_deterministic=deterministic,
    )


def default_store() -> Path:
    """$LONGSPAN_STORE, else the user's data directory."""
    chosen = os.environ.get("LONGSPAN_STORE")
    return Path(chosen) if chosen else Path(platformdirs.user_data_dir("longspan")) / "store"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{what} {value!r} does not exist; choose one of {', '.join(choices)}")

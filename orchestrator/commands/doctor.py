"""`longspan doctor`: what this machine has, and what would stop a first ingest."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from orchestrator.commands.common import JSON, echo_json, store_option, store_path

_LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "faiss-cpu",
    "ray",
    "transformers",
    "safetensors",
    "gguf",
    "xxhash",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding: what, what was seen, and whether a first ingest can go on."""

    what: str
    seen: str
    is_fine: bool


@click.command()
@JSON
@store_option
@click.pass_context
def doctor(context: click.Context, as_json: bool, store: Path | None) -> None:
    """Check Python, libraries, memory, GPUs, the store and the default model; exit code 1 if one
    is missing.
    """
    checks = [
        _python(),
        *(_library(name) for name in _LIBRARIES),
        _native(),
        _memory(),
        _gpus(),
        _store(store_path(store)),
        _model(),
    ]
    if as_json:
        echo_json({"schema": 1, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            click.echo(f"{'ok ' if check.is_fine else 'BAD'}  {check.what:14} {check.seen}")
    context.exit(0 if all(check.is_fine for check in checks) else 1)


def _python() -> Check:
    return Check(what="python", seen=platform.python_version(), is_fine=sys.version_info >= (3, 11))


def _library(name: str) -> Check:
    try:
        return Check(what=name, seen=version(name), is_fine=True)
    except PackageNotFoundError:
        return Check(what=name, seen=f"not installed; run: pip install {name}", is_fine=False)


def _native() -> Check:
    from sparse_attn.api import find_backend
    from sparse_attn.errors import BackendUnknown

    try:
        find_backend("native")
    except BackendUnknown as error:
        return Check(what="native backend", seen=str(error), is_fine=False)
    return Check(what="native backend", seen="compiled", is_fine=True)


def _memory() -> Check:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return Check(what="machine", seen=f"{cores} cores, {gib:.1f} GiB of memory", is_fine=gib >= 4)


def _gpus() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check(what="gpu", seen="unknown without torch", is_fine=False)
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check(
        what="gpu", seen=", ".join(names) or "none (everything runs on the CPU)", is_fine=True
    )


def _store(path: Path) -> Check:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    is_writable = os.access(existing, os.W_OK)
    return Check(
        what="store", seen=f"{path}{'' if is_writable else ' is not writable'}", is_fine=is_writable
    )


def _model() -> Check:
    return _guarded("default model", _find_default_model)


def _find_default_model() -> str:
    from orchestrator.config import DEFAULT_MODEL
    from orchestrator.model.registry import find_model

    return f"{DEFAULT_MODEL} at {find_model(DEFAULT_MODEL)}"


def _guarded(what: str, find: Callable[[], str]) -> Check:
    from orchestrator.errors import ModelError

    try:
        return Check(what=what, seen=find(), is_fine=True)
    except ModelError as error:
        return Check(what=what, seen=str(error), is_fine=False)

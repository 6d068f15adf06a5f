"""The common options of a command or an `Engine`, resolved once into explicit values.

Owns defaults and their checks; knows no model. `auto` never survives `resolve`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from orchestrator.errors import UsageError

DEFAULT_MODEL = "smollm2-135m"
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
EXECUTORS = ("local", "spawn", "ray")
TIMEOUT_S = 60.0
# Set by `longspan launch` or torchrun: the ranks are there already, this process is one of them.
EXTERNAL = "external"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine runs with. threads: of torch, on the CPU, for each rank; mesh: HxC; executor:
    local, spawn, ray, or external where ranks were started before; timeout_s: for ranks to meet.
    """

    model: str
    store: Path
    device: str
    dtype: str
    backend: str
    threads: int
    mesh: str
    executor: str
    is_deterministic: bool
    timeout_s: float

    def to_json(self) -> str:
        """The values for another process of this engine."""
        return json.dumps({**asdict(self), "store": str(self.store)})

    @staticmethod
    def from_json(text: str) -> EngineConfig:
        """What `to_json` wrote."""
        values = json.loads(text)
        return EngineConfig(**{**values, "store": Path(values["store"])})


def resolve(
    *,
    model: str = DEFAULT_MODEL,
    store: str | Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    executor: str | None = None,
    mesh: str = "auto",
    deterministic: bool = True,
    environ: Mapping[str, str] = os.environ,
) -> EngineConfig:
    """Explicit values for the common options. Raises UsageError for a value that does not exist."""
    _check_choice("device", device, DEVICES)
    if device != "cpu" and backend == "native":
        raise UsageError(
            f"backend 'native' computes on the CPU, not on device {device!r}; use --backend triton"
        )
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    _check_choice("dtype", dtype, DTYPES)
    if threads is not None and threads < 1:
        raise UsageError(
            f"threads {threads} is below 1; give the number of CPU threads, such as {_cores()}"
        )
    chosen = _choose_executor(executor, environ)
    mesh = _choose_mesh(mesh, chosen, environ)
    return EngineConfig(
        model=model,
        store=Path(store) if store is not None else default_store(),
        device=device,
        dtype=dtype,
        backend=backend or _default_backend(device, mesh),
        threads=threads or max(1, _cores() // num_ranks(mesh)),
        mesh=mesh,
        executor=chosen,
        is_deterministic=deterministic,
        timeout_s=TIMEOUT_S,
    )


def default_store() -> Path:
    """$LONGSPAN_STORE, else the user's data directory."""
    chosen = os.environ.get("LONGSPAN_STORE")
    return Path(chosen) if chosen else Path(platformdirs.user_data_dir("longspan")) / "store"


def num_ranks(mesh: str) -> int:
    """Ranks of a mesh HxC; raises UsageError where it is none."""
    heads, _, context = mesh.partition("x")
    if not all(part.isdecimal() and len(part) < 6 and int(part) > 0 for part in (heads, context)):
        raise UsageError(
            f"mesh {mesh!r} is not a grid; it must be HxC with two counts from 1, or auto; "
            "give 1x2, for example"
        )
    return int(heads) * int(context)


def is_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher made this process one of several ranks."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def _choose_executor(asked: str | None, environ: Mapping[str, str]) -> str:
    if asked is not None:
        _check_choice("executor", asked, EXECUTORS)
    if not is_launched(environ):
        return asked or "local"
    if asked is not None:
        raise UsageError(
            f"executor {asked!r} was asked for under a launcher (RANK is set); the ranks that it "
            "started are the only ones; leave --executor out"
        )
    return EXTERNAL


def _choose_mesh(asked: str, executor: str, environ: Mapping[str, str]) -> str:
    """The mesh: as asked, else as launched, else every rank on the context axis."""
    launched = environ.get("LONGSPAN_MESH") if executor == EXTERNAL else None
    world = environ.get("WORLD_SIZE", "1") if executor == EXTERNAL else "1"
    if launched and asked not in ("auto", launched):
        raise UsageError(
            f"mesh {asked!r} differs from the launcher's {launched!r}; ranks have one mesh; "
            "give it to longspan launch alone"
        )
    mesh = launched or (f"1x{world}" if asked == "auto" else asked)
    ranks = num_ranks(mesh)
    if executor == EXTERNAL and str(ranks) != world:
        raise UsageError(
            f"mesh {mesh!r} has {ranks} ranks; {world} were started; give a mesh of that many"
        )
    if executor == "local" and ranks > 1:
        raise UsageError(
            f"mesh {mesh!r} needs {ranks} ranks; this process is 1; add --executor spawn, or start "
            f"the command with longspan launch --nproc {ranks}"
        )
    return mesh


def _default_backend(device: str, mesh: str) -> str:
    """Kernels on one GPU; over several ranks the operators that compute the bits of one rank."""
    if device == "cpu":
        return "native"
    return "triton" if num_ranks(mesh) == 1 else "torch"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{what} {value!r} does not exist; choose one of {', '.join(choices)}")

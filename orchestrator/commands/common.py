"""The options that every command shares, and what is made from them.

Owns the click declarations and the construction of an engine. Loads torch only when an engine is
made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from orchestrator.config import (
    DEFAULT_MODEL,
    DEVICES,
    DTYPES,
    EXECUTORS,
    EXTERNAL,
    EngineConfig,
    default_store,
    resolve,
)

if TYPE_CHECKING:
    from orchestrator.engine import Engine

Command = TypeVar("Command", bound=Callable[..., object])

_STORE = click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Directory of documents [$LONGSPAN_STORE or the data directory].",
)
_ENGINE_OPTIONS = (
    click.option(
        "--model", default=DEFAULT_MODEL, show_default=True, help="Name, path, or shape:NAME."
    ),
    click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True),
    click.option(
        "--dtype", type=click.Choice(DTYPES), help="Of weights [float32 on cpu, bfloat16 on cuda]."
    ),
    click.option(
        "--backend",
        help="Of attention: native, torch, triton or reference [native on cpu, triton on cuda].",
    ),
    click.option(
        "--threads", type=int, help="CPU threads of each rank [all cores over the ranks]."
    ),
    click.option(
        "--executor",
        type=click.Choice(EXECUTORS),
        help="Who starts the ranks [local, one process; under a launcher, its ranks].",
    ),
    click.option("--mesh", default="auto", show_default=True, help="HEADSxCONTEXT ranks."),
    click.option(
        "--deterministic/--no-deterministic",
        default=True,
        show_default=True,
        help="Same bits on every run.",
    ),
)
JSON = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout and nothing else."
)


def store_option(command: Command) -> Command:
    """Add --store."""
    return _STORE(command)


def engine_options(command: Command) -> Command:
    """Add --store, --model and how to compute; the command receives them as **options."""
    for option in reversed((_STORE, *_ENGINE_OPTIONS)):
        command = option(command)
    return command


def load_engine(options: dict[str, Any]) -> Engine:
    """An engine from the options of `engine_options`; the default model is fetched once.

    On a rank above 0 of a launcher's it does not return: the rank follows rank 0 until that stops,
    prints nothing, and the command ends.
    """
    from orchestrator.engine import Engine
    from orchestrator.model.registry import fetch, is_fetched

    config = resolve(**options)
    if config.executor == EXTERNAL and os.environ["RANK"] != "0":
        _follow(config)
    if config.model == DEFAULT_MODEL and not is_fetched(DEFAULT_MODEL):
        click.echo(f"fetching {DEFAULT_MODEL}, once", err=True)
        fetch(DEFAULT_MODEL)
    return Engine.load(**options)


def _follow(config: EngineConfig) -> NoReturn:
    from collectives import read_rendezvous
    from orchestrator.cluster.rank import run_rank

    run_rank(read_rendezvous(timeout_s=config.timeout_s), config)
    raise click.exceptions.Exit(0)


def store_path(store: Path | None) -> Path:
    """The store that was asked for, or the default one."""
    return store if store is not None else default_store()


def echo_json(value: dict[str, Any]) -> None:
    """Print the one JSON object of --json."""
    click.echo(json.dumps(value, ensure_ascii=False))

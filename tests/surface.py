"""What users and other packages may rely on: CLI flags, and the public names of each package.

`python -m tests.surface` freezes the present surface into `tests/surface.json`; a change of that
file is a change of the public surface and is reviewed as one.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import click

from tests.source import PACKAGES, ROOT

FROZEN = Path(__file__).resolve().parent / "surface.json"
Surface = dict[str, dict[str, list[str]]]


def read_surface() -> Surface:
    """The present surface, sorted."""
    return {"flags": list_flags(), "names": list_names()}


def read_frozen() -> Surface:
    """The surface that was frozen last."""
    frozen: Surface = json.loads(FROZEN.read_text(encoding="utf-8"))
    return frozen


def list_names() -> dict[str, list[str]]:
    """`__all__` of each package."""
    return {
        package: sorted(getattr(importlib.import_module(package), "__all__", []))
        for package in PACKAGES
    }


def list_flags() -> dict[str, list[str]]:
    """Flags and arguments of each command, `docs ls` for a nested one; empty before the CLI."""
    if not (ROOT / "orchestrator" / "cli.py").exists():
        return {}
    cli = importlib.import_module("orchestrator.cli")
    groups = [value for value in vars(cli).values() if isinstance(value, click.Group)]
    # The root is the group that no other group holds.
    nested = {id(command) for group in groups for command in group.commands.values()}
    flags: dict[str, list[str]] = {}
    for root in (group for group in groups if id(group) not in nested):
        _collect_flags(root, "", flags)
    return dict(sorted(flags.items()))


def _collect_flags(command: click.Command, path: str, flags: dict[str, list[str]]) -> None:
    flags[path or "longspan"] = sorted(
        name for parameter in command.params for name in _parameter_names(parameter)
    )
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            _collect_flags(child, f"{path} {name}".strip(), flags)


def _parameter_names(parameter: click.Parameter) -> list[str]:
    if isinstance(parameter, click.Argument):
        return [parameter.name.upper() if parameter.name else "ARGUMENT"]
    return [*parameter.opts, *parameter.secondary_opts]


def main() -> None:
    """Write the present surface."""
    FROZEN.write_text(json.dumps(read_surface(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

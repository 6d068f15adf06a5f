"""`longspan models`: list models, fetch the default one."""

from __future__ import annotations

import click

from orchestrator.commands.common import JSON, echo_json


@click.group()
def models() -> None:
    """Models on this machine."""


@models.command("ls")
@JSON
def ls(as_json: bool) -> None:
    """List the models known by name; a path or shape:NAME works too."""
    from orchestrator.model.registry import list_models

    entries = [
        {
            "name": status.name,
            "path": None if status.path is None else str(status.path),
            "license": status.license,
            "origin": status.origin,
        }
        for status in list_models()
    ]
    if as_json:
        echo_json({"schema": 1, "models": entries})
        return
    for entry in entries:
        place = entry["path"] or f"not fetched; run: longspan models fetch {entry['name']}"
        click.echo(f"{entry['name']:16} {entry['license']:12} {entry['origin']}: {place}")


@models.command()
@click.argument("name")
def fetch(name: str) -> None:
    """Fetch a model once; its checksum is pinned."""
    from orchestrator.model.registry import fetch as fetch_model

    path = fetch_model(name)
    click.echo(f"{name}: {path}")

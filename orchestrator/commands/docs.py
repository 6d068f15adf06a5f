"""`longspan docs`: list, show, verify and remove documents. Loads no model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.common import JSON, echo_json, store_option, store_path

if TYPE_CHECKING:
    from kv_store import DocumentInfo, Store


@click.group()
def docs() -> None:
    """Documents in the store."""


@docs.command("ls")
@JSON
@store_option
def ls(as_json: bool, store: Path | None) -> None:
    """List documents; incomplete ones can be resumed by ingesting the same source again."""
    infos = _open_store(store).list()
    if as_json:
        echo_json({"schema": 1, "documents": [asdict(info) for info in infos]})
        return
    for info in infos:
        click.echo(_line(info))
    if not infos:
        click.echo("no documents; add one with: longspan ingest PATH", err=True)


@docs.command()
@click.argument("name")
@JSON
@store_option
def show(name: str, as_json: bool, store: Path | None) -> None:
    """Show what a document was made from."""
    with _open_store(store).open(name) as document:
        manifest = document.manifest
        facts = {
            "name": name,
            "hash": document.hash,
            "num_tokens": manifest.num_tokens,
            "num_segments": manifest.layout.num_segments,
            "disk_bytes": sum(entry.size_bytes for entry in manifest.files),
            **manifest.params.plain(),
        }
    if as_json:
        echo_json({"schema": 1, **facts})
        return
    for key, value in facts.items():
        click.echo(f"{key:22} {value}")


@docs.command()
@click.argument("name")
@JSON
@store_option
@click.pass_context
def verify(context: click.Context, name: str, as_json: bool, store: Path | None) -> None:
    """Read every byte of a document and name each damaged file; exit code 1 if there is one."""
    damages = _open_store(store).verify(name)
    if as_json:
        echo_json({"schema": 1, "name": name, "damaged": [asdict(damage) for damage in damages]})
    else:
        for damage in damages:
            click.echo(f"{name}/{damage.file}: {damage.what}")
        click.echo(
            f"{name}: "
            + (f"{len(damages)} damaged files" if damages else "every byte is as written")
        )
    context.exit(1 if damages else 0)


@docs.command()
@click.argument("name")
@store_option
def rm(name: str, store: Path | None) -> None:
    """Remove a document, finished or not."""
    _open_store(store).remove(name)
    click.echo(f"{name}: removed")


def _open_store(store: Path | None) -> Store:
    from kv_store import Store

    return Store(store_path(store))


def _line(info: DocumentInfo) -> str:
    state = "complete" if info.is_complete else f"incomplete ({info.sealed_tokens} tokens sealed)"
    size_mib = info.disk_bytes / 2**20
    return f"{info.name:24} {info.num_tokens:>9} tokens  {size_mib:8.1f} MiB  {info.model}  {state}"

"""`longspan serve`: an OpenAI-compatible service around one engine, on loopback unless told.

Owns the order of a start: key and address are checked before weights are loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from orchestrator.commands.common import engine_options, load_engine
from orchestrator.config import EXTERNAL, resolve


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="A file with the key that requests must carry; needed beyond loopback.",
)
@engine_options
def serve(host: str, port: int, api_key_file: Path | None, **options: Any) -> None:
    """Serve documents and questions over HTTP until interrupted."""
    from orchestrator.serving.auth import read_key
    from orchestrator.serving.server import bind, find_url
    from orchestrator.serving.server import serve as serve_engine
    from orchestrator.serving.settings import ServiceSettings

    if resolve(**options).executor == EXTERNAL and os.environ["RANK"] != "0":
        load_engine(options)  # follows rank 0, which alone listens, and does not return
    api_key = None if api_key_file is None else read_key(api_key_file)
    with bind(host, port, api_key=api_key) as listener, load_engine(options) as engine:
        settings = ServiceSettings(model=engine.config.model, api_key=api_key)
        line = (
            f"longspan: serving {settings.model} at {find_url(listener)}, mesh "
            f"{engine.config.mesh}, key {'not needed' if api_key is None else 'needed'}"
        )
        serve_engine(engine, settings, listener, on_start=lambda: click.echo(line, err=True))
        if engine.executor.failure is not None:
            raise engine.executor.failure

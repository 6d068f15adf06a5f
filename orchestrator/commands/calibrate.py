"""`longspan calibrate`: measure this machine once, so that plans stand on what it does."""

from __future__ import annotations

import os
from pathlib import Path

import click

from orchestrator.commands.common import JSON, echo_json, store_option, store_path
from orchestrator.config import DEVICES


@click.command()
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)
@click.option("--backend", help="Of attention [native on cpu, torch on cuda].")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Topology file [in the data directory]."
)
@store_option
@JSON
def calibrate(
    device: str, backend: str | None, output: Path | None, store: Path | None, as_json: bool
) -> None:
    """Measure this machine: arithmetic, memory, disk, and ranks beside each other.

    Loads no model. Best done while nothing else computes: a plan is as good as this is quiet.
    """
    from orchestrator.calibration import calibrate as measure
    from orchestrator.errors import UsageError
    from orchestrator.planner import encode_topology
    from orchestrator.planning import default_topology_file

    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError(
                "device 'cuda' was asked for; this process sees 0 GPUs; use --device cpu"
            )
    topology = measure(
        device=device,
        backend=backend or ("native" if device == "cpu" else "torch"),
        store=store_path(store),
        note=lambda text: click.echo(f"measuring {text}", err=True),
    )
    file = output or default_topology_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(encode_topology(topology), encoding="utf-8")
    temporary.replace(file)
    if as_json:
        echo_json(
            {
                "schema": 1,
                "file": str(file),
                "kind": topology.kind,
                "num_devices": topology.num_devices,
            }
        )
    else:
        click.echo(f"{topology.num_devices} {topology.kind}: {file}")

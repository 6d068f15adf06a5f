"""`longspan ingest`: read a document once."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click

from orchestrator.commands.common import JSON, echo_json, engine_options, load_engine
from orchestrator.console import progress_bar

if TYPE_CHECKING:
    from orchestrator.ingest import IngestReport


@click.command()
@click.argument("path")
@click.option("--name", help="Name in the store [the file's name without its suffix].")
@click.option(
    "--segment-tokens", type=int, default=8192, show_default=True, help="A multiple of 256."
)
@click.option(
    "--window", type=int, default=64, show_default=True, help="Last tokens that are always read."
)
@click.option(
    "--kv-dtype",
    type=click.Choice(["float32", "bfloat16", "fp8"]),
    help="Of stored KV [that of --dtype]; fp8: one byte a number.",
)
@click.option(
    "--prefill",
    type=click.Choice(["exact", "sparse"]),
    default="exact",
    show_default=True,
    help="What a token attends to of earlier segments: all, or a budget, the rest estimated.",
)
@click.option(
    "--prefill-budget", metavar="N|P%", help="Of sparse prefill: keys, or a percentage [10%]."
)
@click.option("--replace", is_flag=True, help="Replace a finished document of this name.")
@click.option("--restart", is_flag=True, help="Discard a partial ingest instead of resuming it.")
@JSON
@engine_options
def ingest(
    path: str,
    name: str | None,
    segment_tokens: int,
    window: int,
    kv_dtype: str | None,
    prefill: Literal["exact", "sparse"],
    prefill_budget: str | None,
    replace: bool,
    restart: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Read PATH (a UTF-8 text or Markdown file, or - for standard input) once, and keep its KV and
    index.
    """
    from orchestrator import sources
    from orchestrator.ingest import IngestOptions

    name = name or sources.default_name(path)
    text = sources.read_text(path)
    ingest_options = IngestOptions(
        segment_tokens=segment_tokens,
        window=window,
        kv_dtype=kv_dtype,
        prefill=prefill,
        prefill_budget=prefill_budget,
        replace=replace,
        restart=restart,
    )
    with load_engine(options) as engine, progress_bar("ingest") as show:
        report = engine.ingest(text=text, name=name, options=ingest_options, on_progress=show)
    if as_json:
        echo_json({"schema": 1, "prefill": prefill, **asdict(report)})
    else:
        click.echo(_sentence(report))


def _sentence(report: IngestReport) -> str:
    if report.was_complete:
        return (
            f"{report.name}: already ingested, {report.num_tokens} tokens, "
            f"hash {report.document_hash}"
        )
    resumed = report.num_tokens - report.computed_tokens
    note = f", {resumed} of them from an earlier run" if resumed else ""
    return (
        f"{report.name}: {report.num_tokens} tokens{note} in {report.total_s:.1f} s (prefill "
        f"{report.prefill_s:.1f} s, "
        f"clusters {report.cluster_s:.1f} s, disk {report.write_s:.1f} s), hash "
        f"{report.document_hash}"
    )

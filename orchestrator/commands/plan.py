"""`longspan plan`: what ingesting and asking a document would take, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.common import JSON, echo_json
from orchestrator.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from orchestrator.planner import Plan, PlanReport
    from orchestrator.planning import PlanRequest

_GIB = 1 << 30
_COLUMNS = "  {:<6} {:>6} {:>6}  {:<8} {:>10} {:>9} {:>12} {:>10} {:>11}"


@click.command()
@click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="Name, path, or shape:NAME."
)
@click.option("--gpus", required=True, help="Machine: 2xH100, 4xH200, or cpu:CORES.")
@click.option("--context", "tokens", type=int, required=True, help="Tokens of the document.")
@click.option("--mode", default="auto", show_default=True, help="exact, centroid, or the faster.")
@click.option("--budget", help="Keys that centroid reads, such as 2048 or 12.5%.")
@click.option("--segment-tokens", type=int, default=8192, show_default=True)
@click.option(
    "--kv-dtype",
    type=click.Choice(["float32", "bfloat16", "fp8"]),
    help="Of stored KV, as ingest takes it [the machine's].",
)
@click.option(
    "--topology", type=click.Path(path_type=Path), help="File of longspan calibrate [the default]."
)
@JSON
def plan(
    model: str,
    gpus: str,
    tokens: int,
    mode: str,
    budget: str | None,
    segment_tokens: int,
    kv_dtype: str | None,
    topology: Path | None,
    as_json: bool,
) -> None:
    """Predict times and memory of a document of that many tokens, and find the best way to run it.

    Reads the model's configuration alone. Exit code 1 where nothing fits; the error says what
    would.
    """
    from orchestrator.planning import PlanRequest, make_plan

    request = PlanRequest(
        model=model,
        machine=gpus,
        num_tokens=tokens,
        segment_tokens=segment_tokens,
        mode=mode,
        budget=budget,
        kv_dtype=kv_dtype,
    )
    report = make_plan(request, topology)
    if as_json:
        stated = {"model": model, "machine": gpus, "tokens": tokens, "mode": mode, "budget": budget}
        echo_json(
            {
                "schema": 1,
                **stated,
                "segment_tokens": segment_tokens,
                "kv_dtype": kv_dtype,
                **report.to_json(),
            }
        )
    else:
        click.echo("\n".join(_lines(request, report)))


def _lines(request: PlanRequest, report: PlanReport) -> list[str]:
    """The report for a person: the best plan first, then what it is made of."""
    heads = ("mesh", "chunk", "split", "mode", "ingest", "open", "first token", "a token")
    best = report.best.prediction
    parts, memory = (
        best.ingest,
        max((best.ingest_memory, best.question_memory), key=lambda use: use.total),
    )
    return [
        f"{request.model}: {request.num_tokens} tokens in segments of {request.segment_tokens} on "
        f"{request.machine} ({report.origin})",
        _COLUMNS.format(*heads, "memory/rank"),
        *(_row(each) for each in (report.best, *report.runners_up)),
        f"  ingest of the first: prefill {parts.prefill_s:.1f} s, clusters {parts.cluster_s:.1f} s,"
        f" disk {parts.write_s:.1f} s, start {parts.start_s:.1f} s",
        "  memory of the first: "
        + ", ".join(
            f"{name} {num_bytes / _GIB:.2f}"
            for name, num_bytes in (
                ("weights", memory.weights),
                ("KV", memory.kv),
                ("clusters", memory.tables),
                ("open segment", memory.open_segment),
                ("temporary", memory.temporary),
                ("process", memory.process),
            )
        )
        + " GiB",
    ]


def _row(each: Plan) -> str:
    choice, predicted = each.choice, each.prediction
    return _COLUMNS.format(
        str(choice.mesh),
        choice.chunk_tokens,
        choice.split_tokens or "no",
        choice.reading.mode,
        f"{predicted.ingest.total_s:.1f} s",
        f"{predicted.open_s:.2f} s",
        f"{predicted.first_token_s * 1e3:.0f} ms",
        f"{predicted.token_s * 1e3:.1f} ms",
        f"{predicted.memory_bytes / _GIB:.2f} GiB",
    )

"""`longspan bench`: speed, with the limit first and a strong peer in the same run."""

from __future__ import annotations

from typing import Any

import click

from orchestrator.commands.common import JSON, echo_json, engine_options, load_engine
from orchestrator.config import DEFAULT_MODEL


@click.group()
def bench() -> None:
    """Benchmarks; the last line of stdout is one JSON object."""


@bench.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"))
@click.option("--tokens", type=int, default=6500, show_default=True)
@click.option("--questions", type=int, default=24, show_default=True)
@click.option("--long-repeats", type=int, default=3, show_default=True)
def amortised(
    model: str, dtypes: tuple[str, ...], tokens: int, questions: int, long_repeats: int
) -> None:
    """Ingest once and ask many times, against transformers with and without a cache in memory."""
    from orchestrator.evaluation.amortised import measure

    results = [
        measure(
            model,
            dtype,
            num_tokens=tokens,
            num_questions=questions,
            num_long=long_repeats,
            note=_note,
        ).as_json()
        for dtype in dtypes
    ]
    echo_json({"schema": 1, "benchmark": "amortised", "results": results})


@bench.command()
@click.option("--tokens", type=int, default=32768, show_default=True)
@click.option("--segment-tokens", type=int, default=8192, show_default=True)
@click.option("--budget", default="2048", show_default=True)
@click.option("--repeats", type=int, default=20, show_default=True)
@click.option(
    "--kv-dtype",
    type=click.Choice(["float32", "bfloat16", "fp8"]),
    help="Of the document's KV [that of --dtype].",
)
@click.option("--keys-per-cluster", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--clusters-per-group", type=click.IntRange(1), help="[by length: 8 at 8,192 tokens, or more]"
)
@click.option("--questions", type=int, default=1, show_default=True)
@click.option("--documents", type=int, default=1, show_default=True)
@click.option("--profile", is_flag=True, help="Time per kernel, launches and waits (a GPU).")
@JSON
@engine_options
def decode(
    tokens: int,
    segment_tokens: int,
    budget: str,
    repeats: int,
    kv_dtype: str | None,
    keys_per_cluster: int,
    clusters_per_group: int | None,
    questions: int,
    documents: int,
    profile: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """One decode step on synthetic documents, of one or several questions; made for --model
    shape:NAME[@LAYERS].
    """
    from orchestrator.evaluation.decode_bench import measure_decode
    from sparse_attn.select.centroid_build import CentroidParams

    with load_engine(options) as engine:
        timings = measure_decode(
            engine.model,
            engine.backend,
            num_tokens=tokens,
            segment_tokens=segment_tokens,
            modes=("exact", "centroid"),
            budget=budget,
            repeats=repeats,
            kv_dtype=kv_dtype,
            clusters=CentroidParams(
                keys_per_cluster=keys_per_cluster, clusters_per_group=clusters_per_group
            ),
            num_questions=questions,
            num_documents=documents,
            is_profiled=profile,
        )
    if not as_json:
        click.echo(timings[0].notice)
        for timing in timings:
            click.echo(
                f"{timing.mode:9} limit {timing.limit_s * 1e3:8.2f} ms  "
                f"median {timing.median_s * 1e3:8.2f} ms  "
                f"({timing.min_s * 1e3:.2f} to {timing.max_s * 1e3:.2f}), "
                f"{timing.limit_s / timing.median_s:.0%} of the limit, "
                f"{timing.tokens_per_s:.1f} tokens/s"
            )
            for line in timing.profile.lines() if timing.profile else ():
                click.echo(line)
    echo_json({"schema": 1, "benchmark": "decode", "results": [t.as_json() for t in timings]})


@bench.command()
@click.option("--tokens", "lengths", type=int, multiple=True, default=(8192, 131072, 1048576))
@click.option("--budget", "budgets", multiple=True, default=("2048", "2%"), show_default=True)
@click.option("--levels", type=click.Choice(["1", "2"]), default="2", show_default=True)
@JSON
def attention(
    lengths: tuple[int, ...], budgets: tuple[str, ...], levels: str, as_json: bool
) -> None:
    """Decode attention of one layer of the 8B shape on a GPU, beside the best dense peers."""
    from orchestrator.evaluation.attention_bench import measure_attention

    timings = []
    for timing in measure_attention(lengths, budgets, levels=int(levels)):
        timings.append(timing)
        if not as_json:
            click.echo(
                f"{timing.num_tokens:8} {timing.name:14} limit {timing.limit_s * 1e6:8.1f} us  "
                f"median {timing.median_s * 1e6:8.1f} us  "
                f"({timing.min_s * 1e6:.1f} to {timing.max_s * 1e6:.1f}), "
                f"{timing.ratio_to_dense:.2f}x the best dense peer"
            )
    echo_json({"schema": 1, "benchmark": "attention", "results": [t.as_json() for t in timings]})


def _note(text: str) -> None:
    click.echo(text, err=True)

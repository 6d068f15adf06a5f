"""`longspan eval`: made-up documents with known answers, on this machine and with this model.

Owns the options and what is printed; the runs are in `evaluation/`. Progress goes to stderr, the
table or the JSON object to stdout.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.commands.common import JSON, echo_json, engine_options, load_engine
from orchestrator.errors import UsageError
from orchestrator.evaluation.haystacks import HAYSTACKS, Haystack, NiahCase, build_cases
from orchestrator.evaluation.niah import (
    NiahComparison,
    NiahMode,
    NiahRow,
    compare_with_baseline,
    run_niah,
)

if TYPE_CHECKING:
    from orchestrator.engine import Engine

Number = TypeVar("Number", int, float)


@click.group(name="eval")
def evaluate() -> None:
    """Measure answers, evidence and recall on documents whose answers are known."""


@evaluate.command()
@click.option("--lengths", default="1024,2048,4096", show_default=True, help="Tokens a document.")
@click.option(
    "--depths",
    default="0.1,0.3,0.5,0.7,0.9",
    show_default=True,
    help="Shares of the document before the needle.",
)
@click.option(
    "--haystacks", default=",".join(HAYSTACKS), show_default=True, help="What hides the needle."
)
@click.option(
    "--modes",
    default="exact,centroid:12.5%",
    show_default=True,
    help="MODE, MODE:BUDGET, MODE:mass=M or MODE:levels=N; the first is the baseline.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of documents and needles.")
@click.option("--audit", is_flag=True, help="Also compute the true recall with exact attention.")
@click.option("--segment-tokens", type=int, default=1024, show_default=True)
@JSON
@engine_options
def niah(
    lengths: str,
    depths: str,
    haystacks: str,
    modes: str,
    seed: int,
    audit: bool,
    segment_tokens: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Find a needle: one planted sentence with a random seven-digit number.

    Documents are ingested once, asked in every mode and removed, in a store of their own unless
    --store is given.
    """
    asked = [NiahMode.parse(text) for text in _split(modes, "modes")]
    grid: dict[str, Any] = {
        "lengths_tokens": _numbers(lengths, "lengths", int),
        "depths": _numbers(depths, "depths", float),
        "haystacks": _haystacks(haystacks),
        "seed": seed,
    }
    with _own_store(options) as engine:
        rows = _run(engine, grid, asked, audit=audit, segment_tokens=segment_tokens)
    compared = list(_compare(rows, asked, grid["haystacks"]))
    if as_json:
        echo_json(
            {
                "schema": 1,
                "suite": "niah",
                "grid": grid,
                "segment_tokens": segment_tokens,
                "rows": [row.as_json() for row in rows],
                "summary": [found.as_json() for found in compared],
            }
        )
    else:
        click.echo("\n".join(_table(compared)))


def _run(
    engine: Engine,
    grid: dict[str, Any],
    modes: Sequence[NiahMode],
    *,
    audit: bool,
    segment_tokens: int,
) -> list[NiahRow]:
    from orchestrator.ingest import IngestOptions

    num_rows = len(modes) * len(grid["haystacks"]) * len(grid["lengths_tokens"])
    rows: list[NiahRow] = []

    def show(row: NiahRow) -> None:
        rows.append(row)
        click.echo(f"{len(rows)}/{num_rows * len(grid['depths'])}  {describe_row(row)}", err=True)

    return run_niah(
        engine,
        _cases(engine, grid),
        modes,
        audit=audit,
        options=IngestOptions(segment_tokens=segment_tokens),
        on_row=show,
    )


def _cases(engine: Engine, grid: dict[str, Any]) -> Iterator[NiahCase]:
    tokenizer = engine.model.tokenizer
    try:
        yield from build_cases(count_tokens=lambda text: len(tokenizer.encode(text)[0]), **grid)
    except ValueError as error:
        raise UsageError(str(error)) from error


def describe_row(row: NiahRow) -> str:
    """One row for whoever watches."""
    audited = "" if row.audited_mass is None else f" (truly {row.audited_mass:.3f})"
    return (
        f"{row.haystack} {row.length_tokens} tokens, depth {row.depth:g}, {row.mode}: "
        f"{'found' if row.is_found else 'missed'}, nll {row.nll_per_token:.3f}, "
        f"evidence {'on' if row.is_evidence_on_needle else 'off'} the needle, "
        f"recall {row.mass_mean:.3f}{audited}"
    )


def _compare(
    rows: Sequence[NiahRow], modes: Sequence[NiahMode], haystacks: Sequence[Haystack]
) -> Iterator[NiahComparison]:
    for mode in modes:
        for haystack in (*haystacks, None):
            yield compare_with_baseline(
                rows, mode=mode.label, baseline=modes[0].label, haystack=haystack
            )


def _table(compared: Sequence[NiahComparison]) -> Iterator[str]:
    width = max(len(found.mode) for found in compared)
    yield f"{'mode':<{width}}  {'haystack':<9}  cases  found   kept  evidence     nll     gap"
    for found in compared:
        yield (
            f"{found.mode:<{width}}  {found.haystack or 'all':<9}  {found.num_cases:>5}  "
            f"{found.found_share:>5.0%}  {found.kept_share:>5.0%}  {found.evidence_share:>8.0%}  "
            f"{found.nll_mean:>6.3f}  {found.nll_gap:>+6.3f}"
        )
    for found in compared:
        if found.haystack is None:
            yield from (f"lost by {found.mode}: {describe_row(miss)}" for miss in found.misses)


@contextmanager
def _own_store(options: dict[str, Any]) -> Iterator[Engine]:
    """An engine on --store, or on a temporary one."""
    if options["store"] is not None:
        with load_engine(options) as engine:
            yield engine
        return
    with (
        tempfile.TemporaryDirectory(prefix="longspan-eval-") as folder,
        load_engine({**options, "store": Path(folder)}) as engine,
    ):
        yield engine


def _split(text: str, what: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items or len(set(items)) < len(items):
        raise UsageError(
            f"{what} {text!r} is empty or names one twice; at least one of each is needed; "
            "separate them by commas"
        )
    return items


def _numbers(text: str, what: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(item) for item in _split(text, what)]
    except ValueError as error:
        raise UsageError(
            f"{what} {text!r} holds something that is no number; numbers separated by commas are "
            "read; correct it"
        ) from error


def _haystacks(text: str) -> list[Haystack]:
    names = _split(text, "haystacks")
    unknown = [name for name in names if name not in HAYSTACKS]
    if unknown:
        raise UsageError(
            f"haystack {unknown[0]!r} does not exist; choose among {', '.join(HAYSTACKS)}"
        )
    return [haystack for haystack in HAYSTACKS if haystack in names]

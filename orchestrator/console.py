"""What a person sees: progress bars, answers with highlighted evidence. Writes text, computes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from orchestrator.ingest import Progress as IngestProgress
    from orchestrator.types import Answer

_CONTEXT_CHARS = 60


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[IngestProgress], None]]:
    """A progress bar on stderr with tokens/s and time left; yields what to call with each
    progress.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} tokens"),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=None, rate=0.0, visible=False)

        def show(progress: IngestProgress) -> None:
            bar.update(
                task,
                total=progress.num_tokens,
                completed=progress.done_tokens,
                rate=progress.tokens_per_s,
                visible=True,
            )

        try:
            yield show
        except BaseException:
            # An error is one line on stderr: the bar goes, or is not printed where nobody watches.
            bar.live.transient = True
            console.quiet = not console.is_terminal
            raise


def describe(answer: Answer) -> str:
    """Selection, recall, timing in three lines; milliseconds and megabytes only here."""
    selection, usage, timing, recall = answer.selection, answer.usage, answer.timing, answer.recall
    low, high = recall.ci95
    lines = [
        f"selection  {selection.mode} ({selection.reason}); "
        f"{usage.attended_keys_mean:.0f} of {usage.prompt_tokens} keys a query, "
        f"{usage.bytes_read / 1e6:.1f} MB read",
        f"recall     {recall.mass_mean:.3f} of attention was read exactly "
        f"(95% interval {low:.3f} to {high:.3f}; weakest tenth of heads {recall.mass_p10:.3f}; "
        f"bound says nothing for {recall.bound.vacuous_share:.0%})",
        f"timing     open {timing.open_s * 1e3:.0f} ms, first token {timing.ttft_s * 1e3:.0f} ms, "
        f"then {timing.tpot_s * 1e3:.0f} ms a token",
    ]
    if recall.audit is not None:
        lines.insert(
            2,
            f"audit      {recall.audit.mass_mean:.3f} truly read; worst miss "
            f"{recall.audit.miss_max:.3f}",
        )
    return "\n".join(lines)


def print_evidence(answer: Answer, text: str, *, limit: int = 2) -> None:
    """Each piece of evidence inside its surroundings, highlighted."""
    console = Console(highlight=False, soft_wrap=True)
    for span in answer.evidence[:limit]:
        before = text[max(0, span.start_char - _CONTEXT_CHARS) : span.start_char].replace("\n", " ")
        after = text[span.end_char : span.end_char + _CONTEXT_CHARS].replace("\n", " ")
        line = Text(
            f"evidence   {span.score:5.1%} of attention, characters "
            f"{span.start_char}-{span.end_char}: ..."
        )
        line.append(before).append(span.text.replace("\n", " "), style="bold reverse").append(
            after
        ).append("...")
        console.print(line)


def echo_piece(piece: str) -> None:
    """Print a piece of a streamed answer at once."""
    click.echo(piece, nl=False)

"""`make demo`: what Longspan is for, shown on one real document in about two minutes.

Owns a document (Python's language reference with three invented facts in it), four questions and
the words around them. Everything else is the public API: `Engine` here, and the command
`longspan ask` in a second process. The document stays: a second run begins at the questions.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kv_store import StoreError
from orchestrator import Engine
from orchestrator.console import progress_bar
from orchestrator.errors import LongspanError
from orchestrator.evaluation.haystacks import reference_paragraphs
from orchestrator.ingest import IngestOptions
from orchestrator.types import Answer, Mode

STORE = Path(__file__).resolve().parent.parent / ".demo" / "store"
# Another Python has another language reference, so it gets a document of its own.
NAME = f"python-{sys.version_info.major}.{sys.version_info.minor}-reference"
MODES: tuple[Mode, ...] = ("exact", "centroid")
NUM_TOKENS, MAX_ANSWER_TOKENS = 6_500, 24
EVIDENCE_CHARS, AROUND_CHARS = 120, 30


# What no model has ever read, and the share of the document before it.
FACTS = (
    (0.2, "The phone number of the cheese shop in Brindlemoor is: 6640915."),
    (0.5, "Captain Marlow is famous for his green honey."),
    (0.8, "The village of Zanthor is famous for its singing bridge."),
)
# Each with what a right answer contains.
QUESTIONS = (
    ("What is the phone number of the cheese shop in Brindlemoor?", "6640915"),
    ("What is Captain Marlow famous for?", "green honey"),
    ("What is the village of Zanthor famous for?", "singing bridge"),
    ("Which exception does Python raise when an attribute is missing?", "AttributeError"),
)


def build_document(count_tokens: Callable[[str], int], *, num_tokens: int = NUM_TOKENS) -> str:
    """Up to `num_tokens` of the language reference by paragraphs, and each fact at its depth."""
    paragraphs = reference_paragraphs()
    totals = accumulate(count_tokens(paragraph + "\n\n") for paragraph in paragraphs)
    num_paragraphs = next((i for i, n in enumerate(totals) if n > num_tokens), len(paragraphs))
    kept = paragraphs[:num_paragraphs]
    for depth, fact in reversed(FACTS):
        kept.insert(round(depth * num_paragraphs), fact)
    return "\n\n".join(kept)


def read_once(engine: Engine, console: Console, *, is_fresh: bool) -> float:
    """Ingest the document unless it is there; returns the seconds that the model read."""
    console.rule("1. Read the document once", align="left")
    text = build_document(lambda piece: len(engine.model.tokenizer.encode(piece)[0]))
    console.print("Python's language reference. Three invented facts stand in it:")
    for depth, fact in FACTS:
        console.print(f"  at {depth:.0%}: [bold]{fact}[/]")
    if is_fresh and any(info.name == NAME for info in engine.docs()):
        engine.remove(NAME)
    options = IngestOptions(segment_tokens=1024)
    with progress_bar("reading") as show:
        report = engine.ingest(text=text, name=NAME, options=options, on_progress=show)
    if report.was_complete:
        console.print(
            f"Already ingested by an earlier run: its {report.num_tokens:,} tokens are in the "
            "store, nothing was computed. (--fresh reads them again.)"
        )
        return 0.0
    console.print(
        f"{report.num_tokens:,} tokens in {report.total_s:.0f} s. What the model computed for them "
        "is on disk now, with an index. It is never computed again."
    )
    return report.prefill_s


def ask_in_both_modes(engine: Engine, console: Console) -> list[Answer]:
    """Every question in both modes, side by side."""
    console.rule("2. Ask: reading everything, and reading an eighth", align="left")
    console.print(
        "[bold]exact[/] attends to every stored key of the document. [bold]centroid[/] looks up "
        "which clusters of keys matter to each token, attends to those, estimates the rest, and "
        "says which share of the attention it has read: the recall, from a sample of what it has "
        "not read. Evidence is the sentence that the answer attended to most, found without "
        "looking at words. A small share means that no single sentence carried the answer."
    )
    answers = []
    for question, gold in QUESTIONS:
        pair = [
            engine.ask(NAME, question, mode=mode, max_tokens=MAX_ANSWER_TOKENS) for mode in MODES
        ]
        console.print(_table(question, gold, pair, engine.text(NAME)))
        answers += pair
    return answers


def come_back(store: Path, console: Console) -> None:
    """Ask from another process, which shares nothing with this one but the store."""
    console.rule("3. Come back later", align="left")
    console.print(
        "A second process asks again. It does not read the document: it opens the store, checks "
        "every byte against its checksum, and answers."
    )
    arguments = ["ask", NAME, QUESTIONS[0][0], "--mode", "centroid", "--store", str(store)]
    console.print(Text(f"$ longspan {shlex.join(arguments)}", style="bold"))
    subprocess.run([sys.executable, "-m", "orchestrator", *arguments], check=True)


def sum_up(answers: Sequence[Answer], prefill_s: float, store: Path, console: Console) -> None:
    """What the numbers above mean, and what to do next."""
    console.rule("What you have seen", align="left")
    first_s = sum(answer.timing.ttft_s for answer in answers) / len(answers)
    line = f"Answers began {first_s:.1f} s after their question, on average"
    if prefill_s:
        line += f". Reading the document anew takes {prefill_s:.0f} s, before every answer"
    console.print(f"{line}. Ask something yourself:")
    longspan = os.path.relpath(Path(sys.executable).parent / "longspan")
    question = f"{longspan} ask {NAME} 'What is an attribute?' --store {os.path.relpath(store)}"
    for command in (question, f"{longspan} ingest YOUR.txt", f"{longspan} ask YOUR 'Who ...?'"):
        console.print(Text(f"$ {command}", style="bold"))


def _table(question: str, gold: str, answers: Sequence[Answer], text: str) -> Table:
    table = Table("", *MODES, title=f"\n{question}", title_justify="left", title_style="bold")
    table.add_row("answer", *(_judged(answer.text, gold) for answer in answers))
    table.add_row("evidence", *(_evidence(answer, text) for answer in answers))
    table.add_row("recall", *(_recall(answer) for answer in answers))
    table.add_row("keys read", *(f"{answer.usage.attended_keys_mean:,.0f}" for answer in answers))
    table.add_row("time", *(_time(answer) for answer in answers))
    return table


def _judged(answer: str, gold: str) -> Text:
    verdict = " (right)" if gold in answer else f" (wrong: {gold})"
    return Text(" ".join(answer.split())).append(verdict, style="dim")


def _evidence(answer: Answer, text: str) -> Text:
    """The first span in its surroundings; marks show it where there are no colours."""
    if not answer.evidence:
        return Text("none")
    span = answer.evidence[0]
    before = text[max(0, span.start_char - AROUND_CHARS) : span.start_char]
    after = text[span.end_char : span.end_char + AROUND_CHARS]
    shown = " ".join(span.text.split())
    if len(shown) > EVIDENCE_CHARS:
        shown, after = shown[:EVIDENCE_CHARS] + "...", ""
    line = Text(f"{span.score:.0%} in: ...{' '.join(before.split())} ")
    return line.append(f">{shown}<", style="bold reverse").append(" " + " ".join(after.split()))


def _recall(answer: Answer) -> str:
    recall, (low, high) = answer.recall, answer.recall.ci95
    if answer.selection.mode == "exact":
        return "1.000 (all was read)"
    return f"{recall.mass_mean:.3f} (95 % sure: {low:.3f} to {high:.3f})"


def _time(answer: Answer) -> str:
    timing = answer.timing
    return f"first token {timing.ttft_s:.2f} s, then {timing.tpot_s * 1e3:.0f} ms a token"


@click.command()
@click.option("--fresh", is_flag=True, help="Read the document again, though it is in the store.")
@click.option("--store", type=click.Path(path_type=Path), default=STORE, help="Where it is kept.")
def main(fresh: bool, store: Path) -> None:
    """Show what Longspan is for."""
    console = Console(highlight=False)
    console.print(
        "[bold]Longspan[/]: a language model reads a long document once; every later question "
        "reads only what matters, shows where its answer came from, and says how much it may have "
        "missed. This model is small (135 million parameters): it answers simple questions."
    )
    try:
        with Engine.load(store=store) as engine:
            prefill_s = read_once(engine, console, is_fresh=fresh)
            answers = ask_in_both_modes(engine, console)
        come_back(store, console)
    except (LongspanError, StoreError, subprocess.CalledProcessError) as error:
        raise click.ClickException(str(error)) from error
    sum_up(answers, prefill_s, store, console)


if __name__ == "__main__":
    main()

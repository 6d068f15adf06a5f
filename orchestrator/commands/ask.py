"""`longspan ask`: answer questions about an ingested document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands.common import JSON, echo_json, engine_options, load_engine
from orchestrator.console import describe, echo_piece, print_evidence
from orchestrator.errors import InputError, UsageError
from orchestrator.selection import check_request
from orchestrator.sources import read_text
from orchestrator.types import MODES, AskOptions, Sampling

if TYPE_CHECKING:
    from orchestrator.engine import Engine
    from orchestrator.types import Answer


@click.command()
@click.argument("name")
@click.argument("question", required=False)
@click.option(
    "--questions",
    help="A file with one question a line, or - for standard input; answers as JSON lines.",
)
@click.option("--mode", default="auto", show_default=True, help=f"One of {', '.join(MODES)}.")
@click.option("--budget", help="Document keys read per query: a number, or a share such as 12.5%.")
@click.option(
    "--mass", type=float, help="Read enough clusters for this share of attention, such as 0.95."
)
@click.option("--max-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--system", help="An instruction that goes before the question.")
@click.option(
    "--audit", is_flag=True, help="Also compute exact attention and report the true recall."
)
@click.option("--stream/--no-stream", default=True, show_default=True)
@JSON
@engine_options
def ask(
    name: str,
    question: str | None,
    questions: str | None,
    stream: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer QUESTION about the document NAME, with evidence and recall."""
    ask_options = {key: options.pop(key) for key in _ASK_OPTIONS}
    if (question is None) == (questions is None):
        raise UsageError(
            "ask needs a question or --questions FILE, and exactly one of them; give one"
        )
    _check(ask_options)
    if questions is not None:
        lines = _read_questions(questions)
        with load_engine(options) as engine:
            for line in lines:
                click.echo(
                    json.dumps(_answer_line(engine, name, line, ask_options), ensure_ascii=False)
                )
        return
    assert question is not None
    with load_engine(options) as engine:
        is_streamed = stream and not as_json
        on_token = echo_piece if is_streamed else None
        answer = engine.ask(name, question, on_token=on_token, **ask_options)
        if as_json:
            echo_json(answer.to_json())
        else:
            _print(engine, answer, is_streamed=is_streamed)


_ASK_OPTIONS = (
    "mode",
    "budget",
    "mass",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "system",
    "audit",
)


def _check(ask_options: dict[str, Any]) -> None:
    """Wrong usage is found before seconds are spent on loading weights."""
    names = ("mode", "budget", "mass", "max_tokens")
    sampling = Sampling(**{name: ask_options[name] for name in ("temperature", "top_p", "seed")})
    check_request(AskOptions(sampling=sampling, **{name: ask_options[name] for name in names}))


def _read_questions(source: str) -> list[str]:
    if source != "-" and not Path(source).exists():
        raise InputError(
            f"questions file {source} does not exist; one question a line is read; check the path"
        )
    return [line.strip() for line in read_text(source).splitlines() if line.strip()]


def _answer_line(
    engine: Engine, name: str, question: str, ask_options: dict[str, Any]
) -> dict[str, Any]:
    return {"question": question, **engine.ask(name, question, **ask_options).to_json()}


def _print(engine: Engine, answer: Answer, *, is_streamed: bool) -> None:
    click.echo("" if is_streamed else answer.text)
    click.echo(describe(answer))
    print_evidence(answer, engine.text(answer.document_name))

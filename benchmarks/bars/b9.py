"""Row B9, service: eight questions at once over two ranks, asked by the official client.

Owns the questions and the verdict. `longspan serve` runs as a process of its own; a document is
uploaded, followed, asked and deleted through it. `--executor` and `--mesh` choose its ranks (with
`local` and `1x1` everything but the number of ranks is judged), `--tokens` the document's length.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
from openai import OpenAI

from benchmarks.faults import SEGMENT_TOKENS, reference_text
from benchmarks.harness import note, print_row
from benchmarks.service import Served, serving
from orchestrator import Client
from orchestrator.serving.errors import IngestBusy, RemoteFault
from orchestrator.serving.wire import IngestProgress

BAR = (
    "8 questions at once over 2 ranks: the same tokens as one at a time; the openai package works "
    "unmodified (chat, stream, usage); upload with progress, a second one refused, delete"
)
NAME, ANSWER_TOKENS = "reference", 24
TOPICS = ("with", "return", "lambda", "import", "while", "try", "class", "assert")
MODES = ("exact", "centroid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back for one question."""

    text: str
    finish_reason: str | None
    completion_tokens: int
    cached_tokens: int


class Asker:
    """Asks through the official client, plain or as a stream."""

    def __init__(self, official: OpenAI, model: str) -> None:
        self._official, self._model = official, model

    def ask(self, number: int, *, is_stream: bool) -> Reply:
        """One question; every second one by selection, every fourth one drawn with a seed."""
        request: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": f"What does {TOPICS[number]} do?"}],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0.8 if number % 4 == 3 else 0.0,
            "seed": number,
            "extra_body": {
                "documents": [NAME],
                "selection": {"mode": MODES[number % len(MODES)]},
            },
        }
        return self._stream(request) if is_stream else self._plain(request)

    def _plain(self, request: dict[str, Any]) -> Reply:
        answer = self._official.chat.completions.create(**request)
        return _reply(answer.choices[0].message.content, answer.choices[0].finish_reason, answer)

    def _stream(self, request: dict[str, Any]) -> Reply:
        stream = self._official.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
        text, reason, last = "", None, None
        for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
            last = chunk
        return _reply(text, reason, last)


def _reply(text: str | None, reason: str | None, counted: Any) -> Reply:
    return Reply(
        text=text or "",
        finish_reason=reason,
        completion_tokens=counted.usage.completion_tokens,
        cached_tokens=counted.usage.prompt_tokens_details.cached_tokens,
    )


def upload(client: Client, num_tokens: int) -> dict[str, Any]:
    """Upload with progress, and try the same name again meanwhile."""
    told: list[IngestProgress] = []
    refused: list[str] = []

    def follow(progress: IngestProgress) -> None:
        told.append(progress)
        if not refused:
            try:
                client.ingest(text="another", name=NAME)
            except IngestBusy as error:
                refused.append(str(error))

    report = client.ingest(
        text=reference_text(num_tokens),
        name=NAME,
        segment_tokens=SEGMENT_TOKENS,
        on_progress=follow,
    )
    listed = {document.name: document.state for document in client.docs()}
    done = [progress.done_tokens for progress in told]
    return {
        "num_tokens": report.num_tokens,
        "progress_events": len(told),
        "progress_grows": done == sorted(done) and done[-1:] == [report.num_tokens],
        "second_upload_refused": bool(refused),
        "listed": listed == {NAME: "complete"},
        "ingest_s": round(report.total_s, 3),
    }


def ask_all(asker: Asker) -> dict[str, Any]:
    """All questions one at a time, and then at once, half of them as streams."""
    numbers = range(len(TOPICS))
    started = time.perf_counter()
    alone = [asker.ask(number, is_stream=False) for number in numbers]
    alone_s = time.perf_counter() - started
    started = time.perf_counter()
    with ThreadPoolExecutor(len(TOPICS)) as pool:
        together = list(
            pool.map(lambda number: asker.ask(number, is_stream=number % 3 != 0), numbers)
        )
    together_s = time.perf_counter() - started
    for one, other in zip(alone, together, strict=True):
        note(f"{'same' if one == other else 'OTHER'}: {one.text[:60]!r} {other.text[:60]!r}")
    return {
        "questions": len(TOPICS),
        "same": sum(one == other for one, other in zip(alone, together, strict=True)),
        "distinct_texts": len({reply.text for reply in alone}),
        "one_at_a_time_s": round(alone_s, 3),
        "at_once_s": round(together_s, 3),
        "answers": [asdict(reply) for reply in alone],
    }


def delete(client: Client, asker: Asker) -> bool:
    """Whether a deleted document is gone for the official client too."""
    try:
        client.remove(NAME)
        asker.ask(0, is_stream=True)
    except RemoteFault as error:
        note(f"not deleted: {error}")
    except openai.NotFoundError:
        return client.docs() == []
    return False


@contextmanager
def clients(served: Served) -> Iterator[tuple[Client, Asker]]:
    """Our client and the official one, as anybody would make it."""
    with (
        Client(served.url) as client,
        OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as official,
    ):
        yield client, Asker(official, next(iter(official.models.list())).id)


def main() -> int:
    """Measure the row."""
    parser = argparse.ArgumentParser(prog="bar B9")
    parser.add_argument("--executor", default="spawn")
    parser.add_argument("--mesh", default="1x2")
    parser.add_argument("--tokens", type=int, default=2600)
    chosen, _ = parser.parse_known_args()
    options = ("--executor", chosen.executor, "--mesh", chosen.mesh)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder) / "store", *options) as served,
        clients(served) as (client, asker),
    ):
        note(served.line.strip())
        uploaded = upload(client, chosen.tokens)
        answers = ask_all(asker)
        is_deleted = delete(client, asker)
        ranks = len(client.health().ranks)
    measured = {
        "executor": chosen.executor,
        "mesh": served.mesh,
        "ranks": ranks,
        "upload": uploaded,
        "answers": answers,
        "deleted": is_deleted,
        "exit_code": served.code,
    }
    holds = (
        answers["same"] == len(TOPICS)
        and answers["distinct_texts"] > 1
        and all(uploaded[name] for name in ("progress_grows", "second_upload_refused", "listed"))
        and is_deleted
        and served.code == 0
        and ranks >= 2
    )
    return print_row(row="B9", measured=measured, bar=BAR, holds=holds)

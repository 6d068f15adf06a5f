"""Row B4, several GPUs: the demo's document and a 64K-token document of the 8B shape on 1, 2 and 4.

Ranks are spawned, with the torch backend: equality is judged here, and times are kept, not judged.
Owns the two documents and the verdict; without 4 GPUs it measures what there is and does not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import note, print_row
from examples.demo import QUESTIONS, build_document
from orchestrator.config import DEFAULT_MODEL
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from orchestrator.types import Mode

BAR = (
    "2 and 4 H200 through spawn: demo answers equal one GPU's; times of a 64K-token document of "
    "the 8B shape in exact and centroid for 1, 2, 4 committed"
)
WANTED = (1, 2, 4)
MODES: tuple[Mode, ...] = ("exact", "centroid")
LONG_MODEL, LONG_TOKENS = "shape:llama-3.1-8b", 65_000


def main() -> int:
    """Measure the row on the GPUs that this machine has."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--long-model", default=LONG_MODEL)
    parser.add_argument("--long-tokens", type=int, default=LONG_TOKENS)
    parser.add_argument("--counts", type=int, nargs="+", default=list(WANTED))
    arguments, _ = parser.parse_known_args()
    present = torch.cuda.device_count() if arguments.device == "cuda" else 2
    counts = [count for count in arguments.counts if count <= present]
    demo, long = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            note(f"{count} of {present} devices")
            demo[count] = _demo(count, arguments.device, Path(folder) / f"demo-{count}")
            long[count] = time_long(count, arguments, Path(folder) / f"long-{count}")
    is_equal = all(own["answers"] == demo[1]["answers"] for own in demo.values())
    measured = {
        "device_count": present,
        "counts": counts,
        "answers_equal": is_equal,
        "demo": {str(count): own for count, own in demo.items()},
        "long": {str(count): own for count, own in long.items()},
        "long_model": arguments.long_model,
    }
    holds = is_equal and set(WANTED) <= set(counts) and arguments.device == "cuda"
    return print_row(row="B4", measured=measured, bar=BAR, holds=holds)


def _engine(model: str, count: int, device: str, store: Path) -> Engine:
    return Engine.load(
        model,
        store=store,
        device=device,
        mesh=f"1x{count}",
        executor="local" if count == 1 else "spawn",
    )


def _demo(count: int, device: str, store: Path) -> dict[str, Any]:
    """The demo's answers in every mode, from a document that these ranks ingested."""
    with _engine(DEFAULT_MODEL, count, device, store) as engine:
        encode = engine.model.tokenizer.encode
        text = build_document(lambda piece: len(encode(piece)[0]))
        options = IngestOptions(segment_tokens=512)
        report = engine.ingest(text=text, name="demo", options=options)
        answers = [
            engine.ask("demo", question, mode=mode, max_tokens=24).text
            for mode in MODES
            for question, _ in QUESTIONS
        ]
    return {"answers": answers, "ingest_s": report.total_s}


def time_long(count: int, arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Seconds of a long document of random weights: ingest, first token, one more, by mode."""
    with _engine(arguments.long_model, count, arguments.device, store) as engine:
        text = "".join(chr(97 + i * 7919 % 26) for i in range(arguments.long_tokens))
        options = IngestOptions(chunk_tokens=8192)
        report = engine.ingest(text=text, name="long", options=options)
        times: dict[str, Any] = {"ingest_s": report.total_s, "num_tokens": report.num_tokens}
        for mode in MODES:
            engine.ask("long", "What is it?", mode=mode, budget=_budget(mode), max_tokens=4)
            answer = engine.ask(
                "long", "What is it?", mode=mode, budget=_budget(mode), max_tokens=32
            )
            times[mode] = {"first_s": answer.timing.ttft_s, "token_s": answer.timing.tpot_s}
    return times


def _budget(mode: Mode) -> str | None:
    return "2048" if mode == "centroid" else None


if __name__ == "__main__":
    sys.exit(main())

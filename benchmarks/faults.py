"""What the rows about restarts, damage, kills and bad input share: text, child processes, tracing.

Owns the programs that those rows start as processes of their own (`python -m benchmarks.faults`),
so that a kill or a restart is a real one. Refuses to know any bar.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.harness import ROOT

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from orchestrator.engine import Engine
    from orchestrator.ingest import Progress
    from orchestrator.types import Mode, Sampling

SEGMENT_TOKENS = 1024
QUESTION = "What does the return statement do?"
# Of the default model, over Python's language reference.
_CHARS_PER_TOKEN = 4.25


def reference_text(num_tokens: int) -> str:
    """Some of Python's language reference, of about `num_tokens` tokens of the default model."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return text[: int(num_tokens * _CHARS_PER_TOKEN)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One answer, watched: sha256 of the first step's logits (float32 bytes), tokens, open time."""

    mode: str
    document_hash: str
    logits_sha256: str
    tokens: list[int]
    open_s: float


def trace_answer(
    engine: Engine, name: str, question: str, *, mode: Mode, num_tokens: int = 64
) -> Trace:
    """Answer as every question is answered, watching what the sampler is given and returns.

    Stop tokens get no chance, so that exactly `num_tokens` come. The document is opened anew.
    """
    from orchestrator.model.sampler import sample

    digests: list[str] = []
    tokens: list[int] = []
    stops = sorted(engine.model.tokenizer.stop_ids)

    def watch(logits: Tensor, sampling: Sampling, generator: Generator) -> int:
        digests.append(hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest())
        endless = logits.clone()
        endless[stops] = -float("inf")
        tokens.append(sample(endless, sampling, generator))
        return tokens[-1]

    engine.release(name)
    with patch("orchestrator.answering.sample", watch):
        answer = engine.ask(name, question, mode=mode, max_tokens=num_tokens)
    return Trace(
        mode=mode,
        document_hash=answer.document_hash,
        logits_sha256=digests[0],
        tokens=tokens,
        open_s=answer.timing.open_s,
    )


def forget_cached(directory: Path) -> None:
    """Ask the kernel to drop the files below `directory` from its page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def start(*arguments: str, module: str = "benchmarks.faults") -> subprocess.Popen[str]:
    """Start `python -m module` with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A program that has ended."""

    code: int
    stdout: str
    stderr: str


def finish(process: subprocess.Popen[str], *, timeout_s: float = 600) -> Done:
    """Wait for a program and take what it printed."""
    stdout, stderr = process.communicate(timeout=timeout_s)
    return Done(code=process.returncode, stdout=stdout, stderr=stderr)


def start_cli(*arguments: str, max_file_bytes: int | None = None) -> subprocess.Popen[str]:
    """Start the command `longspan`; a file-size limit is what a full disk looks like."""
    process = start(*arguments, module="orchestrator")
    if max_file_bytes is not None:
        # Set from outside, long before the process has loaded what it needs to write anything.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    return process


def run_cli(*arguments: str) -> Done:
    """Run the command `longspan` to its end."""
    return finish(start_cli(*arguments))


def run_child(*arguments: str) -> list[dict[str, Any]]:
    """Run a program of this file to its end; its JSON lines. A failure ends the row."""
    done = finish(start(*arguments))
    if done.code:
        raise SystemExit(f"{' '.join(arguments)} ended with code {done.code}: {done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _open_engine(arguments: argparse.Namespace) -> Engine:
    from orchestrator.engine import Engine

    return Engine.load(arguments.model, store=arguments.store, threads=arguments.threads)


def _ingest(arguments: argparse.Namespace) -> None:
    """Ingest, a JSON line for each chunk and one for the report."""
    from orchestrator.ingest import IngestOptions

    def show(progress: Progress) -> None:
        _say({"done_tokens": progress.done_tokens})

    options = IngestOptions(
        segment_tokens=arguments.segment_tokens, chunk_tokens=arguments.chunk_tokens
    )
    with _open_engine(arguments) as engine:
        report = engine.ingest(
            arguments.path, name=arguments.name, options=options, on_progress=show
        )
        _say(asdict(report))


def _trace(arguments: argparse.Namespace) -> None:
    """Answer once in each mode, a JSON line each."""
    with _open_engine(arguments) as engine:
        for mode in arguments.modes:
            if arguments.cold:
                engine.release()
                forget_cached(engine.store.root / arguments.name)
            trace = trace_answer(
                engine, arguments.name, QUESTION, mode=mode, num_tokens=arguments.num_tokens
            )
            _say(asdict(trace))


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run one of the programs."""
    parser = argparse.ArgumentParser(prog="benchmarks.faults")
    programs = parser.add_subparsers(required=True)
    ingest = _add_program(programs, "ingest", _ingest)
    ingest.add_argument("path", type=Path)
    ingest.add_argument("--segment-tokens", type=int, default=SEGMENT_TOKENS)
    ingest.add_argument("--chunk-tokens", type=int, default=SEGMENT_TOKENS)
    trace = _add_program(programs, "trace", _trace)
    trace.add_argument("modes", nargs="+")
    trace.add_argument("--num-tokens", type=int, default=64)
    trace.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    arguments.run(arguments)


def _add_program(
    programs: Any, name: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = programs.add_parser(name)
    parser.set_defaults(run=run)
    parser.add_argument("store", type=Path)
    parser.add_argument("name")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int)
    return parser


if __name__ == "__main__":
    main()

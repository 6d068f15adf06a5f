"""`python -m benchmarks.prediction_rows`: the cases of row B6, run by real commands.

Owns the run of a case (ingest, then a few questions in each mode, every command in a process of its
own) and the file that carries what was found to the row. Refuses to judge.

    --machine KIND   cpu [default], or the GPU that this machine has
    --only NAME...   these cases
    --out FILE       where rows are kept; those of other machines stay
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.faults import finish, reference_text, start
from benchmarks.harness import RESULTS, environment, note
from benchmarks.predictions import ANSWER_TOKENS, BUDGET, CASES, QUESTION_TOKENS, Case

FILE = RESULTS / "prediction_rows.json"
QUESTION = "What does the return statement do, and when?"
# The first question opens the document and compiles what it needs; the others are counted.
NUM_QUESTIONS = 4


def run_watched(*arguments: str) -> dict[str, Any]:
    """A command of longspan and the memory it took; a failure ends the run."""
    done = finish(start(*arguments, module="benchmarks.watched"), timeout_s=3600)
    if done.code:
        raise SystemExit(f"longspan {' '.join(arguments)} ended with {done.code}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_case(case: Case, folder: Path) -> dict[str, float]:
    """What the predictions of a case are compared with, under the same names."""
    source, questions = folder / "document.txt", folder / "questions.txt"
    source.write_text(_text(case), encoding="utf-8")
    questions.write_text(f"{QUESTION}\n" * NUM_QUESTIONS, encoding="utf-8")
    common = _options(case, folder)
    segment = ("--segment-tokens", str(case.segment_tokens))
    ingested = run_watched("ingest", str(source), "--name", "b6", "--json", *segment, *common)
    memory = "peak_bytes" if case.machine == "cpu" else "gpu_bytes"
    report = ingested["lines"][-1]
    found = {
        "num_tokens": report["num_tokens"],
        "ingest_s": report["total_s"],
        "ingest_bytes": ingested[memory],
    }
    for mode in ("exact", "centroid"):
        budget = ("--budget", BUDGET) if mode == "centroid" else ()
        limit = ("--max-tokens", str(ANSWER_TOKENS))
        asked = run_watched(
            "ask", "b6", "--questions", str(questions), "--mode", mode, *budget, *limit, *common
        )
        answers = asked["lines"][-NUM_QUESTIONS:]
        for answer in answers:
            _check_question(case, answer)
        later = [answer["timing"] for answer in answers[1:]]
        found[f"{mode}_first_token_s"] = statistics.median(t["ttft_s"] for t in later)
        found[f"{mode}_token_s"] = statistics.median(t["tpot_s"] for t in later)
        found[f"{mode}_bytes"] = asked[memory]
    return found


def read_rows(file: Path = FILE) -> dict[str, Any]:
    """What was written: by case, what was measured, when and where."""
    if not file.exists():
        return {}
    written: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return written


def measure_all(machine: str, only: list[str] | None = None) -> dict[str, Any]:
    """Run the cases of a machine; by name, with the environment."""
    cases = [case for case in CASES if case.machine == machine and (not only or case.name in only)]
    found: dict[str, Any] = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure_case(case, Path(folder))
        note(f"{case.name}: {json.dumps(measured)}")
        found[case.name] = {"measured": measured, "environment": environment()}
    return found


def main() -> int:
    """Run the cases and put them into the file."""
    parser = argparse.ArgumentParser(prog="benchmarks.prediction_rows")
    parser.add_argument("--machine", default="cpu")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args()
    rows = {**read_rows(arguments.out), **measure_all(arguments.machine, arguments.only)}
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _text(case: Case) -> str:
    """A document of the case's tokens, to within a few."""
    if case.model.startswith("shape:"):  # one token a byte
        return (reference_text(100_000) * 8)[: case.num_tokens]
    return reference_text(case.num_tokens)


def _options(case: Case, folder: Path) -> tuple[str, ...]:
    """Where and how to compute."""
    device = "cpu" if case.machine == "cpu" else "cuda"
    threads = ("--threads", str(case.threads)) if case.threads else ()
    ranks = ("--executor", "spawn", "--mesh", case.mesh) if case.num_ranks > 1 else ()
    where = ("--store", str(folder / "store"), "--model", case.model, "--device", device)
    return (*where, *threads, *ranks)


def _check_question(case: Case, answer: dict[str, Any]) -> None:
    """The question must be as long as it was predicted to be, or nothing can be compared."""
    tokens, wanted = answer["usage"]["question_tokens"], QUESTION_TOKENS[case.model]
    if tokens != wanted:
        raise SystemExit(f"{case.name}: a question of {tokens} tokens; {wanted} were predicted")


if __name__ == "__main__":
    sys.exit(main())

"""Row B2, one document through every executor: the demo's questions, asked of ranks that came to be
in every way there is, of documents that other meshes ingested.

Every command is the real one, in a process of its own. Owns the commands and the comparison.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import ROOT, note, print_row
from examples.demo import QUESTIONS, build_document
from orchestrator.config import DEFAULT_MODEL
from orchestrator.model.load import load_model

BAR = (
    "make demo's questions through local, spawn, torchrun and ray; ingest under 1x1, ask under "
    "1x2, 3x1, Ray, and the other way round: identical answers"
)
MAX_TOKENS = 24
MODES = ("exact", "centroid")
TIMEOUT_S = 900
_OURS = ("-m", "orchestrator")
_TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
# How ranks come to be: words before the command's own, and options after them.
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "local 1x1": (_OURS, ()),
    "spawn 1x2": (_OURS, ("--executor", "spawn", "--mesh", "1x2")),
    "spawn 3x1": (_OURS, ("--executor", "spawn", "--mesh", "3x1")),
    "launch 1x2": (
        (*_OURS, "launch", "--nproc", "2", "--mesh", "1x2", "--", sys.executable, *_OURS),
        (),
    ),
    "torchrun 1x2": ((*_TORCHRUN, *_OURS), ("--mesh", "1x2")),
    "ray 1x2": (_OURS, ("--executor", "ray", "--mesh", "1x2")),
}
INGESTED_UNDER = ("local 1x1", "spawn 1x2", "spawn 3x1", "ray 1x2")


def main() -> int:
    """Measure the row."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = load_model(DEFAULT_MODEL).tokenizer
        text = build_document(lambda piece: len(tokenizer.encode(piece)[0]))
        (root / "document.txt").write_text(text, encoding="utf-8")
        questions = "\n".join(question for question, _ in QUESTIONS)
        (root / "questions.txt").write_text(questions, encoding="utf-8")
        for way in INGESTED_UNDER:
            note(f"ingest under {way}")
            _run(way, ["ingest", str(root / "document.txt"), "--segment-tokens", "1024"], root)
        answers = {
            f"{document} asked by {way} in {mode}": _ask(way, _name(document), mode, root)
            for mode in MODES
            for document, way in _pairs()
        }
    wanted = {mode: answers[f"local 1x1 asked by local 1x1 in {mode}"] for mode in MODES}
    differing = [
        label for label, own in answers.items() if own != wanted[label.rpartition(" in ")[2]]
    ]
    is_right = [
        all(part in own for own, (_, part) in zip(wanted[mode], QUESTIONS, strict=True))
        for mode in MODES
    ]
    measured = {
        "num_comparisons": len(answers),
        "differing": differing,
        "answers": wanted,
        "demo_answers_right": dict(zip(MODES, is_right, strict=True)),
    }
    return print_row(row="B2", measured=measured, bar=BAR, holds=not differing)


def _pairs() -> list[tuple[str, str]]:
    """(document, way of asking): one rank's document by every way, every document by one rank."""
    ways = [("local 1x1", way) for way in WAYS]
    return ways + [(document, "local 1x1") for document in INGESTED_UNDER[1:]]


def _ask(way: str, name: str, mode: str, root: Path) -> list[str]:
    note(f"ask {name} by {way} in {mode}")
    command = ["ask", name, "--questions", str(root / "questions.txt"), "--mode", mode]
    lines = _run(way, [*command, "--max-tokens", str(MAX_TOKENS), "--json"], root, named=False)
    return [json.loads(line)["answer"] for line in lines]


def _run(way: str, command: list[str], root: Path, *, named: bool = True) -> list[str]:
    """Lines on stdout of one command; `named` adds the document's own name."""
    before, after = WAYS[way]
    name = ["--name", _name(way)] if named else []
    done = subprocess.run(
        [sys.executable, *before, *command, *name, *after, "--store", str(root / "store")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        note(done.stderr[-2000:])
        raise RuntimeError(f"{way}: {command[0]} ended with {done.returncode}")
    return done.stdout.splitlines()


def _name(way: str) -> str:
    return way.replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())

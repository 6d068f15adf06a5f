"""Row B1, equality: one document under every mesh, over threads and over gloo.

Real weights (smollm2-135m: 3 KV heads) for the context axis and 3x1, a tiny model with 2 KV heads
for 2x1 and 2x2. Owns the meshes, the limits and the verdict; `benchmarks/meshes.py` runs them.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import note, print_row
from benchmarks.meshes import MODES, difference, ingest, run_over, trace
from orchestrator.config import DEFAULT_MODEL
from orchestrator.types import AskOptions
from orchestrator.worker import Worker
from tests.mesh import LONG_TEXT, Choice, Choices, run_mesh, save_long_model

BAR = (
    "exact logits within 1e-4 of one rank; ask on one stored document bitwise equal for context "
    "1, 2, 4; sparse modes bitwise there, elsewhere within 1e-4 with the one-rank selection "
    "replayed, own selections differing only where scores are within 1e-5 of the cut"
)
CLOSE, AT_THE_CUT = 1e-4, 1e-5
BITWISE = ("1x2", "1x4")
CASES = {"smollm2-135m": ("1x2", "1x3", "1x4", "3x1"), "tiny": ("1x2", "2x1", "2x2")}


@dataclass(slots=True)
class Found:
    """Largest differences from one rank, by what they are of."""

    bitwise_exact: float = 0.0
    bitwise_sparse: float = 0.0
    exact: float = 0.0
    ingest: float = 0.0
    replayed: float = 0.0
    gloo_and_threads: float = 0.0
    num_selections: int = 0
    num_differing: int = 0
    num_beyond_the_cut: int = 0
    fewest_segments: int = 99
    fewest_segments_of_a_document: int = 99
    meshes: list[str] = field(default_factory=list)

    def raise_to(self, name: str, value: float) -> None:
        """Keep the larger."""
        setattr(self, name, max(getattr(self, name), value))

    @property
    def holds(self) -> bool:
        """The row's verdict."""
        return (
            self.bitwise_exact == self.bitwise_sparse == 0.0
            and max(self.exact, self.ingest, self.replayed) <= CLOSE
            and self.num_beyond_the_cut == 0
            and self.fewest_segments >= 2
            and self.fewest_segments_of_a_document >= 6
        )


def main() -> int:
    """Measure the row; with `--tiny`, which leaves the real model out, it cannot hold."""
    found = Found()
    cases = ["tiny"] if "--tiny" in sys.argv else list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            tiny = save_long_model(Path(folder) / "tiny") if case == "tiny" else None
            model = str(tiny) if tiny else DEFAULT_MODEL
            _measure(case, model, Path(folder) / case, LONG_TEXT if tiny else None, found)
    measured = {"cases": cases, **{name: getattr(found, name) for name in Found.__slots__}}
    holds = found.holds and cases == list(CASES)
    return print_row(row="B1", measured=measured, bar=BAR, holds=holds)


def _measure(case: str, model: str, store: Path, text: str | None, found: Found) -> None:
    num_segments = run_over("threads", "1x1", model, store, ingest("one", text=text))
    found.fewest_segments_of_a_document = min(found.fewest_segments_of_a_document, num_segments)
    one = {mode: run_over("threads", "1x1", model, store, trace("one", mode)) for mode in MODES}
    for mesh in CASES[case]:
        for kind in ("threads", "gloo"):
            note(f"{case} {mesh} over {kind}, {num_segments} segments")
            found.meshes.append(f"{case} {mesh} {kind}")
            name = f"of-{mesh}-{kind}"
            run_over(kind, mesh, model, store, ingest(name, text=text))
            ours = run_over("threads", "1x1", model, store, trace(name, "exact"))
            found.raise_to("ingest", difference(ours, one["exact"]))
        for mode in MODES:
            _compare(mesh, model, store, mode, one[mode], found)


def _compare(
    mesh: str, model: str, store: Path, mode: str, one: torch.Tensor, found: Found
) -> None:
    def look(worker: Worker) -> None:
        for held in worker.documents.values():
            segments = held.context.resident.holding.segments
            found.fewest_segments = min(found.fewest_segments, *(len(s) for s in segments))

    threads = run_mesh(mesh, Path(model), store, trace("one", mode), look=look)
    gloo = run_over("gloo", mesh, model, store, trace("one", mode))
    found.raise_to("gloo_and_threads", difference(gloo, threads))
    if mesh in BITWISE:
        kind = "bitwise_exact" if mode == "exact" else "bitwise_sparse"
        found.raise_to(kind, max(difference(threads, one), difference(gloo, one)))
    if mode == "exact":
        found.raise_to("exact", max(difference(threads, one), difference(gloo, one)))
    elif mode != "window":
        _compare_selections(mesh, model, store, mode, found)


def _compare_selections(mesh: str, model: str, store: Path, mode: str, found: Found) -> None:
    options = AskOptions(**MODES[mode])
    wanted, one = _first_step(model, store, "1x1", options, None)
    _, own = _first_step(model, store, mesh, options, None)
    logits, _ = _first_step(model, store, mesh, options, one[0])
    found.raise_to("replayed", difference(logits, wanted))
    for i, choice in enumerate(one[0]):
        for head in range(choice.ids.shape[0]):
            for token in range(choice.taken.shape[1]):
                _compare_choice(choice, own, i, head, token, found)


def _compare_choice(
    choice: Choice, own: dict[int, list[Choice]], i: int, head: int, token: int, found: Found
) -> None:
    theirs, ours = choice.taken_ids(head, token), set[int]()
    for choices in own.values():
        first = choices[i].first_kv_head
        if first <= head < first + choices[i].ids.shape[0]:
            ours |= choices[i].taken_ids(head - first, token)
    found.num_selections += 1
    found.num_differing += ours != theirs
    benefit, taken = choice.benefit[head, token], choice.taken[head, token]
    for unit in ours ^ theirs:
        gap = (benefit[choice.ids[head] == unit] - benefit[taken].min()).abs()
        found.num_beyond_the_cut += int(gap.max() > AT_THE_CUT)


def _first_step(
    model: str, store: Path, mesh: str, options: AskOptions, replayed: list[Choice] | None
) -> tuple[torch.Tensor, dict[int, list[Choice]]]:
    def work(engine: Any) -> torch.Tensor:
        with engine.begin("one", "What is it?", options, num_answer_tokens=1) as session:
            logits: torch.Tensor = session.forward(session.question_ids)
            return logits

    choices = Choices(replayed)
    with choices.watch():
        logits = run_mesh(mesh, Path(model), store, work)
    return logits, choices.of_rank


if __name__ == "__main__":
    sys.exit(main())

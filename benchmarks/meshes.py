"""What the rows about meshes share: a document, its logits under a mesh, and how they compare.

Owns the model and document of those rows and the two kinds of ranks that run here: threads of this
process, and processes over gloo. Refuses to know any bar.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.faults import reference_text
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from orchestrator.types import AskOptions
from tests.mesh import run_mesh

T = TypeVar("T")

QUESTION = "What does the return statement do?"
SEGMENT_TOKENS, NUM_TOKENS, NUM_ANSWER = 512, 4300, 4
MODES: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "centroid": {"mode": "centroid", "budget": "12.5%"},
    "centroid by mass": {"mode": "centroid", "mass": 0.9},
    "centroid in two levels": {"mode": "centroid", "budget": "12.5%", "levels": 2},
    "window": {"mode": "window"},
}


def run_over(
    kind: str, mesh: str, model: str, store: Path, work: Callable[[Engine], T], **options: Any
) -> T:
    """What `work` returns with an engine over a mesh; kind: threads or gloo, one thread a rank."""
    if kind == "threads" or mesh == "1x1":
        return run_mesh(mesh, Path(model), store, work, **options)
    with Engine.load(
        model, store=store, threads=1, mesh=mesh, executor="spawn", **options
    ) as engine:
        return work(engine)


def ingest(
    name: str, *, text: str | None = None, split_tokens: int | None = None
) -> Callable[[Engine], int]:
    """Ingest the rows' document, or another text; gives its number of segments."""

    def work(engine: Engine) -> int:
        segment_tokens = SEGMENT_TOKENS if text is None else SEGMENT_TOKENS // 2
        options = IngestOptions(segment_tokens=segment_tokens, split_tokens=split_tokens)
        source = text or reference_text(NUM_TOKENS)
        report = engine.ingest(text=source, name=name, options=options)
        return -(-report.num_tokens // segment_tokens)

    return work


def trace(name: str, mode: str, *, question: str = QUESTION) -> Callable[[Engine], Tensor]:
    """Logits of the question and of the first answer tokens."""

    def work(engine: Engine) -> Tensor:
        options = AskOptions(**MODES[mode])
        with engine.begin(name, question, options, num_answer_tokens=NUM_ANSWER) as session:
            rows = [session.forward(session.question_ids)]
            for _ in range(NUM_ANSWER - 1):
                rows.append(session.forward([int(rows[-1].argmax())]))
        return torch.stack(rows)

    return work


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; 0 only for equal bits."""
    return 0.0 if torch.equal(ours, theirs) else max(float((ours - theirs).abs().max()), 1e-45)

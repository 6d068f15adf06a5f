"""Row B8, overhead: what an executor costs a decode step, and what a second rank on a second core
is worth to an ingest.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.faults import reference_text
from benchmarks.harness import interleave, note, print_row
from orchestrator.config import DEFAULT_MODEL
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from orchestrator.steps import Forward
from orchestrator.types import AskOptions

BAR = (
    "in-process executor on decode: <= 2 %; 2 gloo ranks on 2 cores ingesting, against one rank on "
    "one core: >= 1.5x"
)
MAX_OVERHEAD, MIN_SPEEDUP = 1.02, 1.5
SEGMENT_TOKENS, NUM_TOKENS, NUM_REPEATS, NUM_STEPS = 1024, 6144, 3, 60


def main() -> int:
    """Measure both halves; `ingest MESH STORE NAME` is what a child runs."""
    if sys.argv[1:2] == ["--ingest"]:
        return _ingest(*sys.argv[2:5])
    with tempfile.TemporaryDirectory() as folder:
        decode = _measure_decode(Path(folder) / "decode")
        ingests = _measure_ingests(Path(folder))
    speedup = statistics.median(ingests["1x1"]) / statistics.median(ingests["1x2"])
    measured = {
        "decode": decode,
        "ingest_s": ingests,
        "ingest_speedup": speedup,
        "num_tokens": NUM_TOKENS,
    }
    holds = decode["overhead"] <= MAX_OVERHEAD and speedup >= MIN_SPEEDUP
    return print_row(row="B8", measured=measured, bar=BAR, holds=holds)


def _measure_decode(store: Path) -> dict[str, float]:
    """Seconds of a decode step through the executor and without it, in turn."""
    with Engine.load(DEFAULT_MODEL, store=store, threads=1) as engine:
        options = IngestOptions(segment_tokens=SEGMENT_TOKENS)
        engine.ingest(text=reference_text(1500), name="short", options=options)
        asked = AskOptions(mode="exact")
        with engine.begin("short", "Why?", asked, num_answer_tokens=10 * NUM_STEPS) as session:
            token = int(session.forward(session.question_ids).argmax())
            worker, question_id = engine.executor.worker, session.question.question_id
            action = Forward(question_id=question_id, ids=(token,))
            question = worker.questions._questions[question_id]
            decoder = worker.model.decoder

            def direct() -> None:
                """What a forward is, with no plan, no worker and no turn around it."""
                with torch.inference_mode():
                    ids = torch.tensor([token])
                    positions = torch.tensor([question.position])
                    question.position += 1
                    hidden = decoder.forward(ids, positions, question.attention)
                    decoder.logits(hidden[-1:])

            timings = interleave(
                {"executor": lambda: engine.executor.run(action), "direct": direct},
                repeats=NUM_STEPS,
                warmup=5,
            )
    ratio = timings["executor"].median_s / timings["direct"].median_s
    note(f"a decode step through the executor takes {ratio:.4f} of one without")
    return {
        "overhead": ratio,
        "executor_median_s": timings["executor"].median_s,
        "direct_median_s": timings["direct"].median_s,
    }


def _measure_ingests(folder: Path) -> dict[str, list[float]]:
    """Seconds of ingests, in turn: one rank on one core, two ranks on two."""
    seconds: dict[str, list[float]] = {"1x1": [], "1x2": []}
    cores = sorted(os.sched_getaffinity(0))[:2]
    for i in range(NUM_REPEATS):
        for mesh, taken in seconds.items():
            allowed = cores[:1] if mesh == "1x1" else cores
            command = ["taskset", "-c", ",".join(map(str, allowed))]
            command += [sys.executable, "-m", "benchmarks.bars.b8", "--ingest", mesh]
            done = subprocess.run(
                [*command, str(folder / "store"), f"{mesh}-{i}"],
                capture_output=True,
                text=True,
                check=True,
            )
            taken.append(float(done.stdout))
            note(f"{mesh}: {done.stdout.strip()} s on {len(allowed)} cores")
    return seconds


def _ingest(mesh: str, store: str, name: str) -> int:
    executor = "local" if mesh == "1x1" else "spawn"
    with Engine.load(DEFAULT_MODEL, store=store, threads=1, mesh=mesh, executor=executor) as engine:
        began = time.perf_counter()
        options = IngestOptions(segment_tokens=SEGMENT_TOKENS)
        engine.ingest(text=reference_text(NUM_TOKENS), name=name, options=options)
        print(f"{time.perf_counter() - began:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

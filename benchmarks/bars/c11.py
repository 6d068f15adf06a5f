"""Row C11, memory on one GPU: what the planner predicts against what torch's allocator gave out.

Questions of the 8B shape on synthetic documents, in both modes, and an ingest of a few segments;
then questions of more tokens on documents of more keys: what a token adds must not depend on how
many keys there are. `--tokens A B --ingest N --model shape:NAME` for smaller runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import note, print_row
from orchestrator.engine import Engine
from orchestrator.evaluation.synthetic import synthetic_context
from orchestrator.ingest import MAX_CHUNK_TOKENS
from orchestrator.model.context import DocumentContext
from orchestrator.planner import Choice, Reading, Workload
from orchestrator.planner.memory import ingest_memory, question_memory, table_bytes
from orchestrator.prefill import Prefill
from orchestrator.questions import Questions
from orchestrator.steps import AttentionPlan, BeginQuestion, EndQuestion, Forward
from sparse_attn.select.centroid_build import CentroidParams
from tests.planner.machines import machine

BAR = (
    "peak bytes within 5 % of the prediction; what a question token adds is the same at 4 times as "
    "many keys, within a tenth"
)
CLOSE, SAME = 0.05, 0.1
SEGMENT_TOKENS, BUDGET, LEVELS, ANSWER_TOKENS = 8192, 2048, 2, 4
SHORT, LONG = 64, 512  # question tokens
READINGS = {
    "exact": Reading(mode="exact"),
    "centroid": Reading(mode="centroid", keys=BUDGET, levels=LEVELS),
}
TOPOLOGY = machine(1, 140 << 30)


def main() -> int:
    """Measure and print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="shape:llama-3.1-8b")
    parser.add_argument("--tokens", type=int, nargs=2, default=[32_768, 131_072])
    parser.add_argument("--ingest", type=int, default=3 * SEGMENT_TOKENS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/C11.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    adds: dict[str, list[float]] = {name: [] for name in READINGS}
    with (
        tempfile.TemporaryDirectory() as store,
        Engine.load(args.model, store=store, device="cuda", backend="triton") as engine,
    ):
        rows.append(_ingest(engine, args.ingest))
        for num_tokens in args.tokens:
            context = synthetic_context(
                engine.model.cfg,
                num_tokens=num_tokens,
                segment_tokens=SEGMENT_TOKENS,
                dtype=engine.model.decoder.dtype,
                device=engine.model.decoder.device,
            )
            for mode in READINGS:
                few, many = (_question(engine, context, mode, n) for n in (SHORT, LONG))
                rows += [few, many]
                adds[mode].append((many["peak"] - few["peak"]) / (LONG - SHORT))
            del context
    for row in rows:
        row["error"] = row["peak"] / row["predicted"] - 1.0
        note(f"{row['what']}: {row['peak'] >> 20} MiB, predicted {row['predicted'] >> 20} MiB")
    growth = {mode: own[1] / max(own[0], 1.0) for mode, own in adds.items()}
    is_close = all(abs(row["error"]) <= CLOSE for row in rows)
    return print_row(
        row="C11",
        measured={"rows": rows, "bytes_a_token": adds, "growth_with_keys": growth},
        bar=BAR,
        holds=is_close and all(abs(ratio - 1.0) <= SAME for ratio in growth.values()),
    )


def _question(
    engine: Engine, context: DocumentContext, mode: str, num_question: int
) -> dict[str, Any]:
    """A question of noise and a few tokens of its answer."""
    worker = engine.executor.worker
    reading, num_tokens = READINGS[mode], context.num_tokens
    plan = AttentionPlan(mode=mode, keys=reading.keys, levels=reading.levels, recall_period=8)

    def ask() -> None:
        questions = Questions(worker.model, worker.backend, worker.place)
        capacity = num_question + ANSWER_TOKENS
        begin = BeginQuestion(question_id=0, document="d", attention=plan, capacity_tokens=capacity)
        questions.begin(begin, context)
        questions.forward(Forward(question_id=0, ids=tuple(range(num_question))))
        for token in range(ANSWER_TOKENS):
            questions.forward(Forward(question_id=0, ids=(token,)))
        questions.end(EndQuestion(question_id=0, reports=False))

    ask()  # compiles, and builds what is kept of an index
    workload = Workload(
        cfg=worker.model.cfg,
        num_tokens=num_tokens,
        segment_tokens=SEGMENT_TOKENS,
        question_tokens=num_question,
        answer_tokens=ANSWER_TOKENS,
    )
    choice = _choice(worker, reading)
    predicted = question_memory(workload, choice, TOPOLOGY).tensors
    if mode == "exact":  # the tables lie in memory all the same
        predicted += table_bytes(workload, choice.mesh, 0, TOPOLOGY.dtype, is_indexed=True)
    what = f"{mode}, {num_tokens} tokens, question of {num_question}"
    return {"what": what, "peak": _peak_of(ask), "predicted": predicted}


def _ingest(engine: Engine, num_tokens: int) -> dict[str, Any]:
    """Chunks, clusters and seals of some segments, without a disk."""
    worker = engine.executor.worker
    cfg, decoder = worker.model.cfg, worker.model.decoder
    workload = Workload(cfg=cfg, num_tokens=num_tokens, segment_tokens=SEGMENT_TOKENS)
    layout = workload.layout(str(decoder.dtype).removeprefix("torch."))
    clusters = CentroidParams().for_document(num_tokens)
    ids = torch.arange(num_tokens, device=decoder.device) % cfg.vocab_size

    def ingest() -> None:
        prefill = Prefill(decoder, worker.backend, layout, clusters=clusters, place=worker.place)
        for segment_idx in range(layout.num_segments):
            start, stop = layout.segment_span(segment_idx)
            for first in range(start, stop, MAX_CHUNK_TOKENS):
                prefill.fill(ids[first : min(first + MAX_CHUNK_TOKENS, stop)], first)
            prefill.append(segment_idx, prefill.build(segment_idx))

    choice = _choice(worker, Reading(mode="exact"))
    predicted = ingest_memory(workload, choice, TOPOLOGY).tensors
    return {
        "what": f"ingest, {num_tokens} tokens",
        "peak": _peak_of(ingest),
        "predicted": predicted,
    }


def _choice(worker: Any, reading: Reading) -> Choice:
    return Choice(
        mesh=worker.place.mesh,
        threads=0,
        chunk_tokens=MAX_CHUNK_TOKENS,
        split_tokens=None,
        reading=reading,
    )


def _peak_of(function: Callable[[], None]) -> int:
    """Bytes that were given out at once while it ran, weights and document included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    sys.exit(main())

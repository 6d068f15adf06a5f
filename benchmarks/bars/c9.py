"""Row C9: decode steps of 16 questions together, each on a document of 64K tokens, on one GPU.

Sixteen documents of the 8B shape are 137 GB of bfloat16 and do not fit one GPU beside its weights,
but 69 GB of fp8 do, with clusters of 8 keys. Where fewer fit, the questions are on them in turn: a
step reads as many bytes as if each had its own, but the row holds only where each has.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch

from benchmarks.harness import note, print_row
from orchestrator.capacity import document_bytes
from orchestrator.engine import Engine
from orchestrator.evaluation.decode_bench import DecodeTiming, measure_decode
from orchestrator.planner import Workload
from orchestrator.planning import KV_DTYPES
from sparse_attn.select.centroid_build import CentroidParams

KV_DTYPE, CLUSTERS = "fp8", CentroidParams(keys_per_cluster=8)
BAR = "16 questions, each on its own document of 64K tokens: centroid at least 3x exact's tokens/s"
NUM_QUESTIONS, NUM_TOKENS, SEGMENT_TOKENS, FASTER = 16, 65_536, 8192, 3.0
# Of a rank's memory: plans and graphs of all questions, and what building a document takes.
SPARE_BYTES = 12 << 30


def main() -> int:
    """Measure and print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS)
    parser.add_argument("--repeats", type=int, default=32)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/C9.json")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as store,
        Engine.load("shape:llama-3.1-8b", store=store, device="cuda", backend="triton") as engine,
    ):
        num_documents = min(args.questions, _count_fitting(engine, args.tokens))
        note(f"{num_documents} documents of {args.tokens} tokens fit; {args.questions} questions")
        timings = measure_decode(
            engine.model,
            engine.backend,
            num_tokens=args.tokens,
            segment_tokens=SEGMENT_TOKENS,
            modes=("exact", "centroid"),
            budget="2048",
            repeats=args.repeats,
            num_questions=args.questions,
            num_documents=num_documents,
            kv_dtype=KV_DTYPE,
            clusters=CLUSTERS,
        )
    return _print(timings)


def _print(timings: list[DecodeTiming]) -> int:
    for timing in timings:
        note(
            f"{timing.mode}: {timing.median_s * 1e3:.2f} ms a step, {timing.tokens_per_s:.0f} "
            f"tokens/s, {timing.limit_s / timing.median_s:.0%} of what the bytes allow"
        )
    exact, centroid = timings
    ratio = centroid.tokens_per_s / exact.tokens_per_s
    is_full_size = exact.num_questions >= NUM_QUESTIONS and exact.num_tokens >= NUM_TOKENS
    has_own_document = exact.num_documents == exact.num_questions
    return print_row(
        row="C9",
        measured={
            "centroid_over_exact": ratio,
            "exact_tokens_per_s": exact.tokens_per_s,
            "centroid_tokens_per_s": centroid.tokens_per_s,
            "has_own_document": has_own_document,
            "is_full_size": is_full_size,
            "timings": [timing.as_json() for timing in timings],
        },
        bar=BAR,
        holds=ratio >= FASTER and has_own_document and is_full_size,
    )


def _count_fitting(engine: Engine, num_tokens: int) -> int:
    """Documents that fit beside the weights, one at least."""
    workload = Workload(
        cfg=engine.model.cfg,
        num_tokens=num_tokens,
        segment_tokens=SEGMENT_TOKENS,
        kv_dtype=KV_DTYPES[KV_DTYPE],
    )
    dtype, worker = engine.model.decoder.dtype, engine.executor.worker
    needed = document_bytes(
        workload.layout(str(dtype).removeprefix("torch.")),
        worker.place.mesh,
        item_bytes=dtype.itemsize,
        keys_per_cluster=CLUSTERS.keys_per_cluster,
    )
    free = torch.cuda.mem_get_info()[0] - SPARE_BYTES
    return max(1, int(free // needed))


if __name__ == "__main__":
    sys.exit(main())

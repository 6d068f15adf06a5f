"""Row C8: a decode step of the 8B shape, batch 1, on one GPU: against the bytes that it must read.

The limit is weights and KV at the read bandwidth of this run. A document of a million tokens fits
one GPU of 141 GB with KV of one byte a number (69 GB), in clusters of 8 keys and groups of 32 as in
`longspan bench attention` (tables of 27 GB; clusters of 4 would take 54).
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from benchmarks.harness import note, print_row
from orchestrator.engine import Engine
from orchestrator.evaluation.decode_bench import DecodeTiming, measure_decode
from sparse_attn.select.centroid_build import CentroidParams

BAR = (
    "8K context: at least 75 % of the weight-plus-KV bandwidth limit; a document of 1M tokens, fp8 "
    "KV: at most 6 ms a token in centroid, and at least 3x faster than exact"
)
SHORT, LONG = 8192, 1_048_576
CLUSTERS = CentroidParams(keys_per_cluster=8)
LEAST, MOST_S, FASTER = 0.75, 6e-3, 3.0


def main() -> int:
    """Measure and print the row."""
    with (
        tempfile.TemporaryDirectory() as store,
        Engine.load("shape:llama-3.1-8b", store=store, device="cuda", backend="triton") as engine,
    ):
        short = _measure(engine, SHORT)
        long = _measure(engine, LONG, kv_dtype="fp8", clusters=CLUSTERS)
    share = short["exact"].limit_s / short["exact"].median_s
    ratio = long["exact"].median_s / long["centroid"].median_s
    return print_row(
        row="C8",
        measured={
            "share_of_limit_at_8k": share,
            "longest_tokens": LONG,
            "centroid_s": long["centroid"].median_s,
            "exact_over_centroid": ratio,
            "timings": [t.as_json() for own in (short, long) for t in own.values()],
        },
        bar=BAR,
        holds=share >= LEAST and long["centroid"].median_s <= MOST_S and ratio >= FASTER,
    )


def _measure(engine: Engine, num_tokens: int, **options: Any) -> dict[str, DecodeTiming]:
    timings = measure_decode(
        engine.model,
        engine.backend,
        num_tokens=num_tokens,
        segment_tokens=8192,
        modes=("exact", "centroid"),
        budget="2048",
        repeats=32,
        **options,
    )
    note(f"{num_tokens} tokens made in {timings[0].build_s:.1f} s")
    for timing in timings:
        note(f"{num_tokens} {timing.mode}: {timing.median_s * 1e3:.2f} ms a token")
    return {timing.mode: timing for timing in timings}


if __name__ == "__main__":
    sys.exit(main())

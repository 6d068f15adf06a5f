"""Row C4: 16 questions on one document of 128K tokens, against one: time of a layer's attention."""

from __future__ import annotations

import sys

from benchmarks.harness import note, print_row
from orchestrator.evaluation.attention_bench import measure_shared

BAR = "dense and centroid (2,048 keys): 16 questions take at most twice the time of one"
NUM_TOKENS, NUM_QUESTIONS, MOST = 131_072, 16, 2.0


def main() -> int:
    """Measure and print the row."""
    timings = measure_shared(NUM_TOKENS, NUM_QUESTIONS, budget="2048", levels=2)
    ratios = {timing.name: timing.all_s / timing.one_s for timing in timings}
    for name, ratio in ratios.items():
        note(f"{name}: {NUM_QUESTIONS} questions take {ratio:.2f}x the time of one")
    return print_row(
        row="C4",
        measured={"ratios": ratios, "timings": [timing.as_json() for timing in timings]},
        bar=BAR,
        holds=all(ratio <= MOST for ratio in ratios.values()),
    )


if __name__ == "__main__":
    sys.exit(main())

"""Row C2: own dense decode attention against the best dense peer of the same run, 8K to 1M."""

from __future__ import annotations

import sys

from benchmarks.harness import note, print_row
from orchestrator.evaluation.attention_bench import measure_attention

BAR = (
    "own dense decode attention takes at most 5 % longer than the best dense peer, 8K to 1M tokens"
)
LENGTHS = (8192, 32768, 131072, 524288, 1048576)
LEAST = 1 / 1.05


def main() -> int:
    """Measure and print the row."""
    timings = list(measure_attention(LENGTHS, (), levels=1))
    for timing in timings:
        note(f"{timing.num_tokens} {timing.name}: {timing.median_s * 1e6:.1f} us")
    ratios = {str(t.num_tokens): t.ratio_to_dense for t in timings if t.name == "dense"}
    return print_row(
        row="C2",
        measured={"ratios": ratios, "timings": [timing.as_json() for timing in timings]},
        bar=BAR,
        holds=all(ratio >= LEAST for ratio in ratios.values()),
    )


if __name__ == "__main__":
    sys.exit(main())

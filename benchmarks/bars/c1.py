"""Row C1: decode attention of one layer by `centroid`, against the best dense peer of the same run.

Selecting, reading, estimating every key that was not read, and merging, in one number; on one GPU.
"""

from __future__ import annotations

import sys

from benchmarks.harness import note, print_row
from orchestrator.evaluation.attention_bench import AttentionTiming, measure_attention

BAR = (
    "2,048 keys: at least 4x the best dense peer at 128K, 15x at 512K, 30x at 1M; 2 %: 3x at 128K, "
    "15x at 1M; the look-up reads at 1M at most twice the bytes of 128K; no slower than the best "
    "dense peer at any length"
)
KEYS, SHARE = "centroid 2048", "centroid 2%"
LENGTHS = (8192, 32768, 131072, 524288, 1048576)
WANTED = {
    (KEYS, 131072): 4.0,
    (KEYS, 524288): 15.0,
    (KEYS, 1048576): 30.0,
    (SHARE, 131072): 3.0,
    (SHARE, 1048576): 15.0,
}
LEVELS = 2


def main() -> int:
    """Measure and print the row."""
    found: dict[tuple[str, int], AttentionTiming] = {}
    for timing in measure_attention(LENGTHS, ("2048", "2%"), levels=LEVELS):
        found[timing.name, timing.num_tokens] = timing
        note(f"{timing.num_tokens} {timing.name}: {timing.median_s * 1e6:.1f} us")
    growth = found[KEYS, 1048576].lookup_bytes / found[KEYS, 131072].lookup_bytes
    fast_enough = {
        f"{name} at {num_tokens}": found[name, num_tokens].ratio_to_dense >= wanted
        for (name, num_tokens), wanted in WANTED.items()
    }
    never_slower = all(found[KEYS, length].ratio_to_dense >= 1.0 for length in LENGTHS)
    return print_row(
        row="C1",
        measured={
            "fast_enough": fast_enough,
            "never_slower": never_slower,
            "lookup_growth": growth,
            "timings": [timing.as_json() for timing in found.values()],
        },
        bar=BAR,
        holds=all(fast_enough.values()) and never_slower and growth <= 2.0,
    )


if __name__ == "__main__":
    sys.exit(main())

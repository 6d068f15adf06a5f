"""Row A6, amortised: ingest once and ask many times, against `transformers`.

Owns the limits and the verdict; `orchestrator/evaluation/amortised.py` measures both dtypes.
"""

from __future__ import annotations

from benchmarks.harness import note, print_row
from orchestrator.config import DEFAULT_MODEL
from orchestrator.evaluation.amortised import Amortised, measure

NUM_TOKENS, NUM_QUESTIONS, NUM_LONG = 6500, 24, 3
BAR = (
    "first token, from opening the document on disk: >= 50x faster than (a), <= 1.3x (b); ingest "
    "<= 1.15x (a) without clustering and <= 1.3x with it; decode exact <= (b), centroid 12.5 % "
    ">= 1.3x faster than (b); float32 and bf16"
)


def judge(result: Amortised) -> dict[str, bool]:
    """Each limit of the row, for one dtype."""
    ratios = result.ratios
    checks = {
        "ingest_plain": ratios["ingest_plain_over_a"] <= 1.15,
        "ingest_clustered": ratios["ingest_clustered_over_a"] <= 1.3,
        "decode_exact": ratios["b_over_token_exact"] >= 1.0,
        "decode_centroid": ratios["b_over_token_centroid"] >= 1.3,
    }
    for mode in ("exact", "centroid"):
        checks[f"first_{mode}_over_a"] = ratios[f"a_over_first_{mode}"] >= 50.0
        checks[f"first_{mode}_over_b"] = ratios[f"first_{mode}_over_b"] <= 1.3
    return checks


def main() -> int:
    """Measure both dtypes and print."""
    measured, holds = {}, True
    for dtype in ("float32", "bfloat16"):
        result = measure(
            DEFAULT_MODEL,
            dtype,
            num_tokens=NUM_TOKENS,
            num_questions=NUM_QUESTIONS,
            num_long=NUM_LONG,
            note=note,
        )
        checks = judge(result)
        measured[dtype] = {"checks": checks, **result.as_json()}
        holds = holds and all(checks.values())
    return print_row(row="A6", measured=measured, bar=BAR, holds=holds)

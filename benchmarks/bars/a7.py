"""Row A7, restart: a new process answers with the same bits, the source file being gone.

One process ingests, another answers, the source is removed, a third answers again. Owns the
comparison; the processes are programs of `benchmarks/faults.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.faults import reference_text, run_child
from benchmarks.harness import note, print_row

BAR = "first-step logits bitwise equal, same 64 tokens; open <= 0.5 s, checksums on"
MAX_OPEN_S = 0.5
NUM_TOKENS = 64
WANTED_TOKENS = range(6000, 7001)
MODES = ("exact", "centroid")
NAME = "reference"


def main() -> int:
    """Measure the row."""
    with tempfile.TemporaryDirectory() as folder:
        source, store = Path(folder) / "reference.txt", Path(folder) / "store"
        source.write_text(reference_text(6500), encoding="utf-8")
        report = run_child("ingest", str(store), NAME, str(source))[-1]
        note(f"ingested {report['num_tokens']} tokens in {report['total_s']:.1f} s")
        before = run_child("trace", str(store), NAME, *MODES)
        source.unlink()
        after = run_child("trace", str(store), NAME, *MODES)
        cold = run_child("trace", str(store), NAME, "exact", "--num-tokens", "1", "--cold")
    measured, holds = compare(report, before, after)
    measured["open_without_page_cache_s"] = cold[0]["open_s"]
    return print_row(row="A7", measured=measured, bar=BAR, holds=holds)


def compare(
    report: dict[str, Any], before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> tuple[dict[str, object], bool]:
    """What was measured, and whether the row holds."""
    modes = [_compare_mode(old, new) for old, new in zip(before, after, strict=True)]
    open_s = max(mode["open_s"] for mode in modes)
    is_same = all(mode["same_logits"] and mode["same_tokens"] for mode in modes)
    is_right_size = report["num_tokens"] in WANTED_TOKENS
    measured: dict[str, object] = {
        "num_tokens": report["num_tokens"],
        "document_hash": report["document_hash"],
        "open_max_s": open_s,
        "modes": modes,
    }
    return measured, is_same and is_right_size and open_s <= MAX_OPEN_S


def _compare_mode(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    same_tokens = old["tokens"] == new["tokens"] and len(new["tokens"]) == NUM_TOKENS
    note(f"{new['mode']}: tokens {same_tokens}, opened in {new['open_s']:.3f} s")
    return {
        "mode": new["mode"],
        "same_logits": old["logits_sha256"] == new["logits_sha256"],
        "same_tokens": same_tokens,
        "logits_sha256": new["logits_sha256"],
        "open_s": new["open_s"],
    }

"""Row A9, kill: an ingest that is killed at any moment goes on where its last seal stands.

Owns the ten moments. A process of its own ingests and prints its progress; it is killed with
SIGKILL, and the same input is ingested again, which resumes. Each hash is compared with that of
an ingest that nobody disturbed.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.faults import SEGMENT_TOKENS, reference_text, start
from benchmarks.harness import note, print_row
from kv_store import Store
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions, IngestReport

BAR = (
    "killed at 10 moments (>= 3 after the first and >= 3 after the fourth seal), then resumed: the "
    "document hash of an undisturbed ingest; recomputed tokens <= one segment + one chunk"
)
NUM_TOKENS = 5632
CHUNK_TOKENS = 256
NAME = "killed"
# (tokens whose prefill was announced, seconds to wait after that). A multiple of a segment with a
# wait is inside clustering or writing of that segment; 0 s is inside the next chunk or seal.
MOMENTS = (
    (512, 0.0),
    (1024, 0.05),
    (1024, 0.9),
    (2048, 0.3),
    (2560, 0.0),
    (3072, 0.6),
    (4352, 0.0),
    (4608, 0.2),
    (5120, 0.4),
    (5376, 0.1),
)
OPTIONS = IngestOptions(segment_tokens=SEGMENT_TOKENS, chunk_tokens=CHUNK_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """One kill and its resume. announced_tokens: prefilled, as the killed process said itself."""

    announced_tokens: int
    sealed_segments: int
    is_listed_incomplete: bool
    is_clean: bool
    recomputed_tokens: int
    document_hash: str


def kill_at(store: Path, source: Path, *, done_tokens: int, wait_s: float) -> int:
    """Ingest in a process of its own and kill it; returns the tokens that it said were prefilled.

    A process that ends before its moment comes is an error: the moment must be inside.
    """
    options = ("--segment-tokens", str(SEGMENT_TOKENS), "--chunk-tokens", str(CHUNK_TOKENS))
    process = start("ingest", str(store), NAME, str(source), *options)
    assert process.stdout is not None
    announced = 0
    for line in process.stdout:
        announced = json.loads(line).get("done_tokens", announced)
        if announced >= done_tokens:
            break
    time.sleep(wait_s)
    process.kill()
    rest, errors = process.communicate()
    if process.returncode != -9:
        raise SystemExit(f"ingest ended with {process.returncode} before its kill: {errors}")
    for line in rest.splitlines():
        if line.endswith("}"):
            announced = int(json.loads(line).get("done_tokens", announced))
    return announced


def kill_and_resume(engine: Engine, source: Path, *, done_tokens: int, wait_s: float) -> Killed:
    """One moment: kill, look, resume, remove."""
    store = Store(engine.store.root)
    announced = kill_at(store.root, source, done_tokens=done_tokens, wait_s=wait_s)
    info = store.find(NAME)
    is_clean = store.verify(NAME) == []
    report = engine.ingest(source, name=NAME, options=OPTIONS)
    is_clean = is_clean and store.verify(NAME) == []
    store.remove(NAME)
    killed = Killed(
        announced_tokens=announced,
        sealed_segments=info.sealed_tokens // SEGMENT_TOKENS,
        is_listed_incomplete=not info.is_complete and info.damage is None,
        is_clean=is_clean,
        recomputed_tokens=report.computed_tokens - (report.num_tokens - announced),
        document_hash=report.document_hash,
    )
    note(f"killed after {done_tokens} tokens and {wait_s} s: {asdict(killed)}")
    return killed


def summarise(undisturbed: IngestReport, kills: list[Killed]) -> tuple[dict[str, object], bool]:
    """What was measured, and whether the row holds."""
    limit = SEGMENT_TOKENS + CHUNK_TOKENS
    after_first = sum(1 <= kill.sealed_segments < 4 for kill in kills)
    after_fourth = sum(kill.sealed_segments >= 4 for kill in kills)
    same = sum(kill.document_hash == undisturbed.document_hash for kill in kills)
    most = max(kill.recomputed_tokens for kill in kills)
    measured: dict[str, object] = {
        "num_tokens": undisturbed.num_tokens,
        "kills": len(kills),
        "after_first_seal": after_first,
        "after_fourth_seal": after_fourth,
        "same_hash": same,
        "recomputed_max_tokens": most,
        "recomputed_limit_tokens": limit,
        "moments": [asdict(kill) for kill in kills],
    }
    is_intact = all(kill.is_listed_incomplete and kill.is_clean for kill in kills)
    is_spread = len(kills) >= 10 and after_first >= 3 and after_fourth >= 3
    return measured, is_spread and is_intact and same == len(kills) and most <= limit


def main() -> int:
    """Measure the row."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.txt"
        source.write_text(reference_text(NUM_TOKENS), encoding="utf-8")
        with Engine.load(store=Path(folder) / "store") as engine:
            undisturbed = engine.ingest(source, name="undisturbed", options=OPTIONS)
            note(f"{undisturbed.num_tokens} tokens, undisturbed: {undisturbed.document_hash}")
            kills = [
                kill_and_resume(engine, source, done_tokens=done_tokens, wait_s=wait_s)
                for done_tokens, wait_s in MOMENTS
            ]
    measured, holds = summarise(undisturbed, kills)
    return print_row(row="A9", measured=measured, bar=BAR, holds=holds)

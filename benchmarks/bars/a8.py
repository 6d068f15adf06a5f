"""Row A8, damage: every flipped bit and every cut is named, and no answer comes from such bytes.

Owns the choice of 200 places over every file of a document. The document is a real one of two
segments; each place is damaged, looked at with `docs verify` and asked in both modes, and then
made whole again. `centroid` reads every tensor and must refuse; `exact` reads no cluster tables,
and where one bit of those alone is flipped it must answer as it does from the whole document.
"""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import QUESTION, SEGMENT_TOKENS, reference_text
from benchmarks.harness import note, print_row
from kv_store import CLUSTER_TENSORS, DocumentDamaged, StoreError
from kv_store.disk import TensorFile
from orchestrator.cli import main as longspan
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from orchestrator.types import Mode

BAR = (
    "one bit flipped, or the file cut, at 200 positions over every file of a document: docs verify "
    "names the file every time; ask never answers from bytes that fail"
)
NUM_PLACES = 200
NUM_TOKENS = 1500
NAME = "damaged"
MODES: tuple[Mode, ...] = ("exact", "centroid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a file is damaged: a bit of one byte flipped, or everything from the byte on gone."""

    file: str
    byte_idx: int
    bit: int | None
    is_in_tables: bool

    @property
    def kind(self) -> str:
        """How it is damaged."""
        return "cut" if self.bit is None else "flip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What `ask` did in one mode: the error it raised, or its answer, and how much it gave out."""

    error: str | None
    named_file: str | None
    text: str | None
    num_pieces: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What `docs verify` named, and what `ask` did; whole: what `exact` answers without damage."""

    place: Place
    named_files: list[str]
    verify_code: int
    asked: dict[Mode, Asked]
    whole: str

    @property
    def is_verified(self) -> bool:
        """Whether `docs verify` named exactly the damaged file."""
        return self.verify_code == 1 and self.named_files == [self.place.file]

    def is_refused(self, mode: Mode) -> bool:
        """Whether `ask` ended with an error that names the file before it gave out anything."""
        asked = self.asked[mode]
        return asked.named_file == self.place.file and asked.num_pieces == 0

    @property
    def is_unread(self) -> bool:
        """Whether `exact` answered as from the whole document, having read nothing damaged."""
        place, text = self.place, self.asked["exact"].text
        return place.is_in_tables and place.kind == "flip" and text == self.whole

    @property
    def is_right(self) -> bool:
        """Whether no answer came from damaged bytes."""
        return self.is_refused("centroid") and (self.is_refused("exact") or self.is_unread)


def table_spans(path: Path) -> list[tuple[int, int]]:
    """Bytes of the cluster tables in one file of a document; none in files that are no segment."""
    if path.parent.parent.name != "segments":
        return []
    with TensorFile(path.parent, path.name, expected=None) as file:
        return [(e.start, e.end) for name, e in file.entries.items() if name in CLUSTER_TENSORS]


def choose_places(directory: Path, rng: random.Random) -> Iterator[Place]:
    """Files in turn; flips and cuts alternate; the first and last byte of each file come first."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    tables = {path: table_spans(path) for path in files}
    for i in range(NUM_PLACES):
        round_idx, file_idx = divmod(i, len(files))
        path = files[file_idx]
        size_bytes = path.stat().st_size
        byte_idx = (0, size_bytes - 1, rng.randrange(size_bytes))[min(round_idx // 2, 2)]
        yield Place(
            file=path.relative_to(directory).as_posix(),
            byte_idx=byte_idx,
            bit=rng.randrange(8) if round_idx % 2 == 0 else None,
            is_in_tables=any(start <= byte_idx < end for start, end in tables[path]),
        )


@contextmanager
def damaged(directory: Path, place: Place) -> Iterator[None]:
    """The damage of one place, undone afterwards."""
    path = directory / place.file
    whole = path.read_bytes()
    changed = bytearray(whole)
    if place.bit is None:
        del changed[place.byte_idx :]
    else:
        changed[place.byte_idx] ^= 1 << place.bit
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(whole)


def try_place(engine: Engine, place: Place, whole: str) -> Outcome:
    """Verify and ask with one place damaged, the document opened anew for each mode."""
    engine.release()
    with damaged(engine.store.root / NAME, place):
        code, named = verify(engine.store.root)
        asked = {mode: ask(engine, mode) for mode in MODES}
    return Outcome(place=place, named_files=named, verify_code=code, asked=asked, whole=whole)


def ask(engine: Engine, mode: Mode) -> Asked:
    """One question, the document opened for it alone."""
    pieces: list[str] = []
    error: StoreError | None = None
    text: str | None = None
    try:
        text = engine.ask(NAME, QUESTION, mode=mode, max_tokens=2, on_token=pieces.append).text
    except StoreError as raised:
        error = raised
    engine.release()
    return Asked(
        error=type(error).__name__ if error else None,
        named_file=error.file if isinstance(error, DocumentDamaged) else None,
        text=text,
        num_pieces=len(pieces),
    )


def verify(store: Path) -> tuple[int, list[str]]:
    """Exit code of `docs verify`, and the files that it names."""
    out = io.StringIO()
    with redirect_stdout(out):
        code = longspan(["docs", "verify", NAME, "--json", "--store", str(store)])
    return code, [damage["file"] for damage in json.loads(out.getvalue())["damaged"]]


def summarise(outcomes: list[Outcome]) -> dict[str, object]:
    """What was measured; every place that was missed stands in it."""
    missed = [o for o in outcomes if not (o.is_verified and o.is_right)]
    return {
        "places": len(outcomes),
        "places_per_file": dict(sorted(Counter(o.place.file for o in outcomes).items())),
        "kinds": dict(Counter(o.place.kind for o in outcomes)),
        "verified": sum(o.is_verified for o in outcomes),
        "refused": {mode: sum(o.is_refused(mode) for o in outcomes) for mode in MODES},
        "exact_answered_without_reading_them": sum(o.is_unread for o in outcomes),
        "errors": {mode: dict(Counter(o.asked[mode].error for o in outcomes)) for mode in MODES},
        "missed": [f"{o.place}: {o.named_files}, {o.asked}" for o in missed],
    }


def main() -> int:
    """Measure the row."""
    rng = random.Random(8)
    with tempfile.TemporaryDirectory() as folder, Engine.load(store=folder) as engine:
        options = IngestOptions(segment_tokens=SEGMENT_TOKENS)
        engine.ingest(text=reference_text(NUM_TOKENS), name=NAME, options=options)
        outcomes = list[Outcome]()
        whole = engine.ask(NAME, QUESTION, mode="exact", max_tokens=2).text
        for place in choose_places(Path(folder) / NAME, rng):
            outcomes.append(try_place(engine, place, whole))
            if len(outcomes) % 20 == 0:
                note(f"{len(outcomes)} of {NUM_PLACES} places")
        engine.release()
        is_whole = verify(Path(folder)) == (0, []) and bool(
            engine.ask(NAME, QUESTION, max_tokens=2).text
        )
    measured = {**summarise(outcomes), "whole_again_at_the_end": is_whole}
    holds = is_whole and len(outcomes) == NUM_PLACES and not measured["missed"]
    return print_row(row="A8", measured=measured, bar=BAR, holds=holds)

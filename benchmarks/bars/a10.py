"""Row A10, bad input: one line that says what, value, limit and remedy, and nothing harmed.

Owns the cases and what is expected of each. Every case runs the command `longspan` in a process of
its own, beside a finished document that must not change.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults import (
    QUESTION,
    SEGMENT_TOKENS,
    Done,
    finish,
    reference_text,
    run_cli,
    start_cli,
)
from benchmarks.harness import note, print_row
from orchestrator.model.registry import DEFAULT_MODEL, find_model

BAR = (
    "one line what, value, limit, remedy on stderr, exit 1 or 2, stdout empty under --json; "
    "finished documents untouched; the partial one resumable and listed as incomplete"
)
KEPT, TWICE, FULL = "kept", "twice", "full"
KEPT_TOKENS, LONG_TOKENS, TOO_LONG_TOKENS = 700, 2600, 9500
# Room for one segment of the long text (about 50 MiB), not for two; then for all.
SMALL_DISK, LARGE_DISK, MAX_FILE_BYTES = "80m", "1g", 1 << 20
WAIT_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A command that must fail. value: what its message must contain."""

    what: str
    arguments: tuple[str, ...]
    code: int
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where the cases run: a folder with inputs, and the store with the finished document."""

    folder: Path

    @property
    def store(self) -> Path:
        """The store of most cases."""
        return self.folder / "store"

    def ingest(self, file: str, name: str, *, store: Path | None = None) -> tuple[str, ...]:
        """Arguments of an ingest of one of the inputs."""
        segments = ("--segment-tokens", str(SEGMENT_TOKENS))
        place = ("--store", str(store or self.store))
        return "ingest", str(self.folder / file), "--name", name, *segments, "--json", *place

    def ask(self, name: str, *options: str) -> tuple[str, ...]:
        """Arguments of a question."""
        return "ask", name, QUESTION, "--json", "--store", str(self.store), *options

    def docs(self, *arguments: str) -> tuple[str, ...]:
        """Arguments of a command about documents."""
        return "docs", *arguments, "--store", str(self.store)

    def write_inputs(self) -> None:
        """Good texts, bad texts, and a model file that was cut."""
        for tokens in (KEPT_TOKENS, LONG_TOKENS, TOO_LONG_TOKENS):
            (self.folder / f"{tokens}.txt").write_text(reference_text(tokens), encoding="utf-8")
        (self.folder / "binary.txt").write_bytes(bytes(range(256)) * 8)
        (self.folder / "latin1.txt").write_bytes("Gr\u00fc\u00dfe aus K\u00f6ln".encode("latin-1"))
        (self.folder / "empty.txt").write_bytes(b"")
        model = find_model(DEFAULT_MODEL).read_bytes()
        (self.folder / "cut.gguf").write_bytes(model[: len(model) // 2])


def simple_cases(bench: Bench) -> list[Case]:
    """Commands that fail by themselves."""
    kept, folder = f"{KEPT_TOKENS}.txt", bench.folder
    in_file = folder / "empty.txt" / "store"

    def bad_source(file: str) -> Case:
        arguments = bench.ingest(file, "bad")
        return Case(what=f"source {file}", arguments=arguments, code=1, value=file)

    def bad_ask(what: str, code: int, value: str, name: str, *options: str) -> Case:
        return Case(what=what, arguments=bench.ask(name, *options), code=code, value=value)

    return [
        *(bad_source(file) for file in ("missing.txt", "binary.txt", "latin1.txt", "empty.txt")),
        Case(
            what="source is a folder",
            arguments=bench.ingest(".", "bad"),
            code=1,
            value="directory",
        ),
        Case(
            what="longer than the context",
            arguments=bench.ingest(f"{TOO_LONG_TOKENS}.txt", "bad"),
            code=1,
            value="8192",
        ),
        bad_ask("unknown document", 1, "nobody", "nobody"),
        bad_ask("unknown mode", 2, "psychic", KEPT, "--mode", "psychic"),
        bad_ask("unknown model", 1, "no-such-model", KEPT, "--model", "no-such-model"),
        bad_ask("cut model file", 1, "cut.gguf", KEPT, "--model", str(folder / "cut.gguf")),
        bad_ask("budget 0", 2, "0", KEPT, "--budget", "0"),
        bad_ask("budget 0%", 2, "0%", KEPT, "--budget", "0%"),
        bad_ask("budget and mass", 2, "0.9", KEPT, "--budget", "5%", "--mass", "0.9"),
        bad_ask("no such option", 2, "--nonsense", KEPT, "--nonsense"),
        bad_ask("unknown backend", 2, "abacus", KEPT, "--backend", "abacus"),
        bad_ask("path as a name", 2, "../kept", "../kept"),
        Case(
            what="path as a new name",
            arguments=bench.ingest(kept, "a/b"),
            code=2,
            value="a/b",
        ),
        Case(what="path to remove", arguments=bench.docs("rm", ".."), code=2, value=".."),
        Case(
            what="other text under a name",
            arguments=bench.ingest(f"{LONG_TOKENS}.txt", KEPT),
            code=1,
            value=KEPT,
        ),
        *(
            Case(
                what=f"store not writable ({place.parent.name})",
                arguments=bench.ingest(kept, "bad", store=place),
                code=1,
                value=str(place),
            )
            for place in (in_file, Path("/proc/longspan"))
        ),
    ]


def judge(case: Case, done: Done) -> dict[str, Any]:
    """What a case printed, and whether that is what a user should get."""
    lines = done.stderr.splitlines()
    message = lines[-1] if lines else ""
    is_one_line = len(lines) == 1 and message.startswith("longspan: ")
    holds = (
        is_one_line
        and done.code == case.code
        and done.stdout == ""
        and case.value in message
        and ";" in message
    )
    note(f"{'ok ' if holds else 'BAD'} {case.what} -> {done.code}: {done.stderr.strip()}")
    return {"case": case.what, "holds": holds, "code": done.code, "message": done.stderr.strip()}


def try_case(case: Case) -> dict[str, Any]:
    """Run one case."""
    return judge(case, run_cli(*case.arguments))


def two_ingests(bench: Bench) -> list[dict[str, Any]]:
    """A second ingest, a question and a removal while the first ingest of a name runs."""
    arguments = bench.ingest(f"{LONG_TOKENS}.txt", TWICE)
    first = start_cli(*arguments)
    wait_for(bench.store / TWICE / "partial.json")
    cases = (
        Case(what="two ingests of one name", arguments=arguments, code=1, value=TWICE),
        Case(what="rm during ingest", arguments=bench.docs("rm", TWICE), code=1, value=TWICE),
    )
    processes = [start_cli(*case.arguments) for case in cases]
    rows = [judge(case, finish(process)) for case, process in zip(cases, processes, strict=True)]
    done = finish(first)
    return [*rows, {"case": "the first ingest goes on", "holds": done.code == 0}]


def removal_during_ask(bench: Bench) -> list[dict[str, Any]]:
    """`docs rm` while a question is being answered; the answer is not disturbed."""
    ask = start_cli("ask", KEPT, QUESTION, "--store", str(bench.store), "--max-tokens", "300")
    assert ask.stdout is not None
    ask.stdout.read(1)
    case = Case(what="rm during ask", arguments=bench.docs("rm", KEPT), code=1, value=KEPT)
    row = judge(case, run_cli(*case.arguments))
    was_running = ask.poll() is None
    done = finish(ask)
    is_answered = was_running and done.code == 0 and done.stderr == ""
    return [row, {"case": "the answer goes on", "holds": is_answered}]


def full_disk(bench: Bench, undisturbed_hash: str) -> list[dict[str, Any]]:
    """An ingest onto a disk that gets full; more room; the same ingest again."""
    disk = bench.folder / "disk"
    arguments = bench.ingest(f"{LONG_TOKENS}.txt", FULL, store=disk)
    case = Case(what="disk full", arguments=arguments, code=1, value="again")
    with small_disk(disk) as is_mounted:
        limit = None if is_mounted else MAX_FILE_BYTES
        row = judge(case, finish(start_cli(*arguments, max_file_bytes=limit)))
        listed = json.loads(run_cli("docs", "ls", "--json", "--store", str(disk)).stdout)
        info = next(info for info in listed["documents"] if info["name"] == FULL)
        question = ("ask", FULL, QUESTION, "--json", "--store", str(disk))
        asked = try_case(Case(what="ask of a part", arguments=question, code=1, value=FULL))
        if is_mounted:
            subprocess.run(["mount", "-o", f"remount,size={LARGE_DISK}", str(disk)], check=True)
        resumed = json.loads(run_cli(*arguments).stdout)
    kept_tokens = SEGMENT_TOKENS if is_mounted else 0
    return [
        {**row, "on": "tmpfs" if is_mounted else "file-size limit"},
        asked,
        {
            "case": "the partial document is listed as incomplete",
            "holds": not info["is_complete"] and info["sealed_tokens"] == kept_tokens,
            "sealed_tokens": info["sealed_tokens"],
        },
        {
            "case": "the partial document is resumed",
            "holds": resumed["document_hash"] == undisturbed_hash
            and resumed["computed_tokens"] == resumed["num_tokens"] - kept_tokens,
            "computed_tokens": resumed["computed_tokens"],
        },
    ]


@contextmanager
def small_disk(path: Path) -> Iterator[bool]:
    """A tmpfs of SMALL_DISK at `path`; False where this user may not mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(path)]
    is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", str(path)], check=True)


def wait_for(path: Path) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"{path} has not appeared after {WAIT_S} s")
        time.sleep(0.05)


def snapshot(bench: Bench, name: str) -> dict[str, Any]:
    """A finished document: its hash, whether every byte is whole, size and time of each file."""
    shown = json.loads(run_cli(*bench.docs("show", name, "--json")).stdout)
    directory = bench.store / name
    stats = {p.relative_to(directory).as_posix(): p.stat() for p in directory.rglob("*")}
    return {
        "hash": shown["hash"],
        "is_whole": run_cli(*bench.docs("verify", name)).code == 0,
        "files": {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()},
    }


def main() -> int:
    """Measure the row."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder=Path(folder))
        bench.write_inputs()
        done = run_cli(*bench.ingest(f"{KEPT_TOKENS}.txt", KEPT))
        if done.code:
            raise SystemExit(f"the document to keep was not ingested: {done.stderr}")
        before = snapshot(bench, KEPT)
        rows = [*two_ingests(bench), *removal_during_ask(bench)]
        rows += [try_case(case) for case in simple_cases(bench)]
        rows += full_disk(bench, snapshot(bench, TWICE)["hash"])
        is_untouched = before["is_whole"] and snapshot(bench, KEPT) == before
        names = sorted(path.name for path in bench.store.iterdir() if path.name[0] != ".")
        is_clean = names == [KEPT, TWICE]
    measured: dict[str, object] = {
        "cases": len(rows),
        "held": sum(row["holds"] for row in rows),
        "finished_untouched": is_untouched,
        "nothing_left_behind": is_clean,
        "rows": rows,
    }
    holds = is_untouched and is_clean and all(row["holds"] for row in rows)
    return print_row(row="A10", measured=measured, bar=BAR, holds=holds)

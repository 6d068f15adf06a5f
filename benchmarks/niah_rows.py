"""`python -m benchmarks.niah_rows`: the needle cases that rows A3, A4 and A5 judge, measured once.

Owns the grid, the modes, the run, and the file that carries it from one row to the others. Refuses
to judge. Every document is ingested once, asked in the modes of A3, and scored in the sparse modes
of A4 with several seeds of the recall sample.

    --rows FILE...  judge these files, the parts of one run, instead of measuring
    --part I/N      measure every N-th case from the I-th on: parts of a run can share a machine
    --out FILE      where the run is written
    --lengths, --depths, --haystacks, --repeats, --threads     a smaller run (no row holds for it)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from benchmarks.harness import RESULTS, environment, note
from orchestrator.engine import Engine
from orchestrator.evaluation.haystacks import HAYSTACKS, NiahCase, build_cases
from orchestrator.evaluation.niah import NiahMode, NiahRow, ask_case, ingested
from orchestrator.evaluation.recall_reports import RecallReport, report_case
from orchestrator.ingest import IngestOptions

FILE = RESULTS / "niah_rows.json"
LENGTHS = (1024, 2048, 4096, 7000)
# Far enough from both ends: a needle in the steady zone is always read, and is never evidence.
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
SEGMENT_TOKENS = 1024
EXACT = NiahMode(mode="exact")
CENTROID = NiahMode(mode="centroid", budget="12.5%")
ASKED = (EXACT, CENTROID)
REPORTED = (
    CENTROID,
    NiahMode(mode="centroid", budget="5%"),
    NiahMode(mode="centroid", budget="2%"),
    NiahMode(mode="centroid", mass=0.9),
    NiahMode(mode="window"),
)
# Recall samples a case and mode: 60 cases in 5 modes give 600 intervals.
REPEATS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one run found, when and where; `source` names the file where it was read from one."""

    grid: dict[str, object]
    rows: list[NiahRow]
    reports: list[RecallReport]
    seconds: dict[str, float]
    environment: dict[str, object]
    part: tuple[int, int] = (0, 1)
    source: str | None = None

    def origin(self) -> dict[str, object]:
        """Grid, seconds, and the commit of the rows: part of every row that judges them."""
        return {
            "grid": self.grid,
            "seconds": self.seconds,
            "rows_file": self.source,
            "rows_commit": self.environment.get("commit"),
            "rows_dirty": self.environment.get("dirty"),
        }

    def write(self, path: Path) -> None:
        """Write the run as one JSON object."""
        path.parent.mkdir(parents=True, exist_ok=True)
        value = {
            "schema": 1,
            "grid": self.grid,
            "part": self.part,
            "seconds": self.seconds,
            "environment": self.environment,
            "rows": [row.as_json() for row in self.rows],
            "reports": [report.as_json() for report in self.reports],
        }
        path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Measured:
        """The run that `write` wrote."""
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            grid=value["grid"],
            rows=[NiahRow(**row) for row in value["rows"]],
            reports=[RecallReport(**report) for report in value["reports"]],
            seconds=value["seconds"],
            environment=value["environment"],
            part=tuple(value.get("part", (0, 1))),
            source=path.name,
        )

    @classmethod
    def read_parts(cls, paths: Sequence[Path]) -> Measured:
        """The parts of one run, put together; seconds add up over parts.

        Raises SystemExit where they are not parts of one run of one commit on one kind of machine.
        """
        parts = [cls.read(path) for path in paths]
        first = parts[0]
        for path, part in zip(paths, parts, strict=True):
            if part.grid != first.grid or part._origin_of_part() != first._origin_of_part():
                raise SystemExit(
                    f"bar: {path} is of another grid, commit or machine than {paths[0]}; the parts "
                    "of one run are judged together; measure them alike"
                )
        if sorted(part.part for part in parts) != [
            (i, first.part[1]) for i in range(first.part[1])
        ]:
            raise SystemExit(
                f"bar: parts {[part.part for part in parts]}; a run is judged whole, each of its "
                f"{first.part[1]} parts once; name every file"
            )
        return replace(
            first,
            part=(0, 1),
            rows=[row for part in parts for row in part.rows],
            reports=[report for part in parts for report in part.reports],
            seconds={
                name: round(sum(part.seconds[name] for part in parts), 1) for name in first.seconds
            },
            source=", ".join(path.name for path in paths),
        )

    def _origin_of_part(self) -> tuple[object, ...]:
        facts = ("commit", "dirty", "cpu", "threads", "libraries")
        return tuple(self.environment.get(name) for name in facts)


@dataclass(slots=True, kw_only=True)
class _Run:
    """A run in progress; seconds add up by what they were spent on."""

    engine: Engine
    is_asked: bool
    repeats: int
    seeds: Iterator[int]
    rows: list[NiahRow] = field(default_factory=list)
    reports: list[RecallReport] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"ingest": 0.0, "ask": 0.0, "report": 0.0, "total": 0.0}
    )

    def measure(self, case: NiahCase) -> None:
        """Ingest the case once and do everything with it."""
        options = IngestOptions(segment_tokens=SEGMENT_TOKENS)
        started = time.perf_counter()
        with ingested(self.engine, case, options) as name:
            started = self._spend("ingest", started)
            if self.is_asked:
                for mode in ASKED:
                    self.rows.append(ask_case(self.engine, name, case, mode, audit=True))
            started = self._spend("ask", started)
            for mode in REPORTED:
                for _ in range(self.repeats):
                    self.reports.append(
                        report_case(self.engine, name, case, mode, seed=next(self.seeds))
                    )
            self._spend("report", started)

    def _spend(self, what: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds[what] += now - started
        self.seconds["total"] += now - started
        return now


def obtain(*, rows: bool, reports: bool) -> Measured:
    """Measure what a row needs, or read `--rows FILE`; writes `results/niah_rows.json` for a run
    that asked, with `--save`.
    """
    options = _parse()
    if options.rows is not None:
        measured = Measured.read_parts(options.rows)
        missing = (rows and not measured.rows) or (reports and not measured.reports)
        if missing:
            raise SystemExit(
                f"bar: {measured.source} has {len(measured.rows)} rows and {len(measured.reports)} "
                "reports; this row needs what is 0; run python -m benchmarks.niah_rows --save"
            )
        return measured
    return _measure(options, is_asked=rows, repeats=options.repeats if reports else 0)


def _measure(options: argparse.Namespace, *, is_asked: bool, repeats: int) -> Measured:
    grid = {
        "lengths_tokens": list(options.lengths),
        "depths": list(options.depths),
        "haystacks": list(options.haystacks),
        "segment_tokens": SEGMENT_TOKENS,
        "asked": [mode.label for mode in ASKED] if is_asked else [],
        "reported": [mode.label for mode in REPORTED] if repeats else [],
        "repeats": repeats,
    }
    with (
        tempfile.TemporaryDirectory(prefix="longspan-niah-") as folder,
        Engine.load(store=Path(folder), threads=options.threads) as engine,
    ):
        part, num_parts = options.part
        # No two parts draw the same samples.
        seeds = count(part * 1_000_000)
        run = _Run(engine=engine, is_asked=is_asked, repeats=repeats, seeds=seeds)
        cases = list(_cases(engine, options))[part::num_parts]
        for case_idx, case in enumerate(cases):
            run.measure(case)
            note(f"{case_idx + 1}/{len(cases)}  {_describe(run, case)}")
        return Measured(
            grid=grid,
            rows=run.rows,
            reports=run.reports,
            seconds={name: round(spent, 1) for name, spent in run.seconds.items()},
            environment=environment(),
            part=options.part,
        )


def _cases(engine: Engine, options: argparse.Namespace) -> Iterator[NiahCase]:
    tokenizer = engine.model.tokenizer
    return build_cases(
        lengths_tokens=options.lengths,
        depths=options.depths,
        haystacks=options.haystacks,
        count_tokens=lambda text: len(tokenizer.encode(text)[0]),
    )


def _describe(run: _Run, case: NiahCase) -> str:
    asked = " ".join(
        f"[{row.mode}: {'found' if row.is_found else 'missed'} nll {row.nll_per_token:.3f} "
        f"evidence {'on' if row.is_evidence_on_needle else 'off'}]"
        for row in run.rows
        if (row.haystack, row.seed) == (case.haystack, case.seed)
    )
    reports = [
        report
        for report in run.reports
        if (report.haystack, report.case_seed) == (case.haystack, case.seed)
    ]
    inside = sum(report.mass_low <= report.audited_mass <= report.mass_high for report in reports)
    return (
        f"{case.haystack} {case.length_tokens} tokens, depth {case.depth:g} {asked} "
        f"intervals {inside}/{len(reports)}, {run.seconds['total']:.0f} s so far"
    )


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="niah_rows", allow_abbrev=False)
    parser.add_argument("--rows", type=Path, nargs="+")
    parser.add_argument("--part", type=_read_part, default=(0, 1))
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--depths", type=float, nargs="+", default=DEPTHS)
    parser.add_argument("--haystacks", choices=HAYSTACKS, nargs="+", default=HAYSTACKS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int)
    # The rest is the row's name and --save.
    return parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)[0]


def _read_part(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8): the parts are 0/8 to 7/8."""
    part, _, num_parts = text.partition("/")
    if not (part.isdigit() and num_parts.isdigit() and int(part) < int(num_parts)):
        raise argparse.ArgumentTypeError(f"part {text!r}; parts of 8 are 0/8 to 7/8")
    return int(part), int(num_parts)


def main() -> int:
    """Measure everything that A3, A4 and A5 need, and write it."""
    obtain(rows=True, reports=True).write(_parse().out)
    note(f"wrote {_parse().out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

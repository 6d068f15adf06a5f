"""Row B7, lost ranks: whoever is killed, stopped or differs, all are gone in time and say why.

Owns the cases. Each runs the command `longspan` as its users do, under `longspan launch`, spawned
and through Ray, with two ranks, and does something to one of its processes while it works. The
twenty kills come at moments drawn from a fixed seed.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.faults import QUESTION, SEGMENT_TOKENS, reference_text, run_cli
from benchmarks.harness import note, print_row
from benchmarks.victims import Executor, Marked, marked, wait_for

BAR = (
    "a rank killed, stopped (SIGSTOP), a differing plan digest, a taken port; 20 random kills of "
    "ranks and of the launcher, spawned and Ray: every survivor exits with a named error within "
    "30 s; no orphan process"
)
LIMIT_S = 30.0
START_S = 240.0
SEED = 7
KEPT_TOKENS, LONG_TOKENS, NUM_QUESTIONS = 700, 5600, 200
# Kills come while ranks start, load and work.
MAX_DELAY_S = 8.0
NUM_KILLS: dict[Executor, int] = {"launch": 8, "spawn": 6, "ray": 6}
Victim = Literal["launcher", "rank 0", "rank 1"]
Work = Literal["ingest", "ask"]
# Of the launcher, about a rank.
_ENDED = "still runs; sent SIGTERM"
_NAMED = re.compile(r"^(\[rank \d+\] )?longspan: .+; limit .+; .+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """What is done to which process of which command. delay_s: after that process has begun."""

    executor: Executor
    work: Work
    victim: Victim
    number: signal.Signals
    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it. gone_s: until nobody was left, None for over the limit; error: last line.

    ended: survivors that the launcher had to end, and said so, for they had not met the others yet;
    silent: those of whom nothing was said.
    """

    code: int
    gone_s: float | None
    ended: list[str]
    silent: list[str]
    error: str

    @property
    def is_in_time(self) -> bool:
        """Whether all ended, and all who could said why."""
        return self.gone_s is not None and not self.silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where the cases run: texts, questions, and a store with one finished document."""

    folder: Path

    def prepare(self) -> None:
        """Write the inputs and ingest the document that is asked about."""
        for tokens in (KEPT_TOKENS, LONG_TOKENS):
            self.text(tokens).write_text(reference_text(tokens), encoding="utf-8")
        questions = f"{QUESTION}\n" * NUM_QUESTIONS
        (self.folder / "questions.txt").write_text(questions, encoding="utf-8")
        done = run_cli(*self.ingest(KEPT_TOKENS, name="kept"))
        if done.code:
            raise SystemExit(f"the document to ask about was not ingested: {done.stderr}")

    def text(self, tokens: int) -> Path:
        """A source of about so many tokens."""
        return self.folder / f"{tokens}.txt"

    def ingest(self, tokens: int, *, name: str) -> tuple[str, ...]:
        """Arguments of an ingest."""
        options = ("--name", name, "--segment-tokens", str(SEGMENT_TOKENS), "--json")
        return "ingest", str(self.text(tokens)), *options, *self.store()

    def ask(self) -> tuple[str, ...]:
        """Arguments of many questions."""
        questions = str(self.folder / "questions.txt")
        return "ask", "kept", "--questions", questions, "--max-tokens", "16", *self.store()

    def store(self) -> tuple[str, str]:
        """The option that all share."""
        return "--store", str(self.folder / "store")

    def command(self, executor: Executor, work: Work) -> tuple[str, ...]:
        """A command of two ranks that works for longer than anybody waits here."""
        name = f"long{time.monotonic_ns()}"
        arguments = self.ask() if work == "ask" else self.ingest(LONG_TOKENS, name=name)
        if executor == "launch":
            return ("launch", "--nproc", "2", "--mesh", "1x2", "--", *own_command(*arguments))
        return (*arguments, "--executor", executor, "--mesh", "1x2")


def own_command(*arguments: str) -> tuple[str, ...]:
    """The command `longspan` of these very sources."""
    return sys.executable, "-m", "orchestrator", *arguments


def attack(bench: Bench, plan: Attack) -> dict[str, Any]:
    """Start, wait, strike, look."""
    # What a killed cluster leaves behind goes with the folder.
    environ = {"TMPDIR": str(bench.folder)}
    arguments = bench.command(plan.executor, plan.work)
    with marked(*arguments, executor=plan.executor, environ=environ) as command:
        rank = 1 if plan.victim == "rank 1" else 0
        if wait_for(lambda: command.find_rank(rank), limit_s=START_S) is None:
            raise SystemExit(f"{plan}: its ranks have not begun; {command.read()[1]}")
        time.sleep(plan.delay_s)
        victim = command.process.pid if plan.victim == "launcher" else command.find_rank(rank)
        if victim is None or command.process.poll() is not None:
            code = command.process.poll()
            raise SystemExit(f"{plan}: over before the attack, {code}: {command.read()[1]}")
        os.kill(victim, plan.number)
        outcome = observe(command, silenced=silenced_by(plan))
    row = {"case": describe(plan), "holds": outcome.is_in_time, **asdict(outcome)}
    note(f"{'ok ' if row['holds'] else 'BAD'} {row['case']}: {asdict(outcome)}")
    return row


def silenced_by(plan: Attack) -> set[str]:
    """Who cannot say anything: the victim, and those whom the kernel kills with it."""
    is_parent = plan.victim == "launcher" or (plan.victim == "rank 0" and plan.executor != "launch")
    return {"rank 0", "rank 1", "command"} if is_parent else {plan.victim}


def observe(command: Marked, *, silenced: set[str]) -> Outcome:
    """Wait until all processes of a command are gone, then read what they said."""
    gone_s = wait_for(
        lambda: command.process.poll() is not None and not command.find_all(), limit_s=LIMIT_S
    )
    _, lines = command.read()
    named = [line for line in lines if _NAMED.match(line)]
    speakers = {"command": "longspan: "}
    if command.executor == "launch":
        speakers |= {f"rank {rank}": f"[rank {rank}] longspan: " for rank in range(2)}
    silent = [
        who
        for who, label in speakers.items()
        if who not in silenced and not any(line.startswith(label) for line in named)
    ]
    ended = [who for who in silent if any(line.startswith(f"[{who}] {_ENDED}") for line in lines)]
    code = command.process.poll()
    return Outcome(
        code=-1 if code is None else code,
        gone_s=None if gone_s is None else round(gone_s, 2),
        ended=ended,
        silent=[who for who in silent if who not in ended] if code != 0 else ["command"],
        error=lines[-1] if lines else "",
    )


def describe(plan: Attack) -> str:
    """A case in words."""
    what = f"{plan.number.name} to {plan.victim}, {plan.delay_s:.1f} s into {plan.work}"
    return f"{plan.executor}: {what}"


def list_attacks() -> Iterator[Attack]:
    """One stop of a rank each way, and twenty kills at random."""
    chance = random.Random(SEED)
    for executor, num_kills in NUM_KILLS.items():
        yield Attack(
            executor=executor,
            work="ask",
            victim="rank 1",
            number=signal.SIGSTOP,
            delay_s=MAX_DELAY_S,
        )
        victims: tuple[Victim, ...] = ("rank 1", "rank 0")
        if executor == "launch":
            victims = (*victims, "launcher")
        for kill_idx in range(num_kills):
            yield Attack(
                executor=executor,
                work="ingest" if kill_idx % 2 else "ask",
                victim=victims[kill_idx % len(victims)],
                number=signal.SIGKILL,
                delay_s=round(chance.uniform(0.0, MAX_DELAY_S), 2),
            )


def differing_rank(bench: Bench) -> dict[str, Any]:
    """Rank 1 computes in another type, so that its plan has another digest."""
    ask = shlex.join(own_command(*bench.ask()))
    script = f"test $RANK = 0 || differs='--dtype bfloat16'; exec {ask} $differs"
    launch = ("launch", "--nproc", "2", "--mesh", "1x2", "--", "sh", "-c", script)
    return expect(launch, what="a rank whose plan differs", word="another plan")


def taken_port(bench: Bench, *, is_launched: bool) -> dict[str, Any]:
    """The port on which the ranks would meet is in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        if is_launched:
            launch = ("launch", "--nproc", "2", "--port", port, "--", *own_command(*bench.ask()))
            return expect(launch, what="a taken port, launched", word=port, is_launcher_alone=True)
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        environ = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return expect(
            bench.ask(),
            what="a taken port, under another launcher",
            word=port,
            is_launcher_alone=True,
            environ=environ,
        )


def expect(
    arguments: tuple[str, ...],
    *,
    what: str,
    word: str,
    is_launcher_alone: bool = False,
    environ: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A command that ends by itself, soon after its start, and names what is wrong."""
    with marked(*arguments, executor="launch", environ=environ) as command:
        outcome = observe(command, silenced={"rank 0", "rank 1"} if is_launcher_alone else set())
    holds = outcome.is_in_time and word in outcome.error
    note(f"{'ok ' if holds else 'BAD'} {what}: {asdict(outcome)}")
    return {"case": what, "holds": holds, **asdict(outcome)}


def main() -> int:
    """Measure the row."""
    # A short name: Ray's sockets below it have long ones.
    with tempfile.TemporaryDirectory(prefix="b7") as folder:
        bench = Bench(folder=Path(folder))
        bench.prepare()
        rows = [taken_port(bench, is_launched=True), taken_port(bench, is_launched=False)]
        rows += [differing_rank(bench)]
        rows += [attack(bench, plan) for plan in list_attacks()]
        verify = run_cli("docs", "verify", "kept", *bench.store())
    slowest_s = max((row["gone_s"] or LIMIT_S) for row in rows)
    measured: dict[str, object] = {
        "cases": len(rows),
        "held": sum(row["holds"] for row in rows),
        "kills": sum("SIGKILL" in row["case"] for row in rows),
        "slowest_s": slowest_s,
        "finished_document_is_whole": verify.code == 0,
        "rows": rows,
    }
    holds = all(row["holds"] for row in rows) and verify.code == 0
    return print_row(row="B7", measured=measured, bar=BAR, holds=holds)

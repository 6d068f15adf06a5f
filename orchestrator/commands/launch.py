"""`longspan launch`: one command, N ranks on this machine.

Owns the check of the options, the forwarding of signals and the exit code. Refuses to know what
the command is: it reads the variables of `orchestrator.cluster.environment`, or not.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from orchestrator.cluster.child import Command
from orchestrator.cluster.ended import Ended, describe_failure, find_first_failure
from orchestrator.cluster.environment import THREADS, rank_environment, threads_per_rank
from orchestrator.cluster.ports import ANY, LOOPBACK, reserve_port
from orchestrator.cluster.processes import Supervisor
from orchestrator.errors import UsageError

MESH = "LONGSPAN_MESH"
_FORWARDED = (signal.SIGINT, signal.SIGTERM)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--nproc", type=click.IntRange(1, 1024), required=True, help="Number of ranks.")
@click.option("--mesh", help="HEADSxCONTEXT ranks, told to the command as LONGSPAN_MESH.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="Port of loopback on which the ranks meet [a free one].",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def launch(
    context: click.Context, nproc: int, mesh: str | None, port: int | None, command: tuple[str, ...]
) -> None:
    """Run COMMAND once a rank, on this machine; when one fails, end the others.

    Each finds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its
    environment. Rank 0 has this command's own input and output; whatever else is printed goes to
    stderr, marked with its rank.
    """
    settings = {} if mesh is None else {MESH: check_mesh(mesh, num_ranks=nproc)}
    argv = (find_program(command[0]), *command[1:])
    base = {THREADS: str(threads_per_rank(nproc)), **os.environ, **settings}
    with reserve_port(LOOPBACK, port or ANY) as reserved:
        commands = [
            Command(
                rank=rank,
                argv=argv,
                environ=rank_environment(
                    base, rank=rank, num_ranks=nproc, address=LOOPBACK, port=reserved
                ),
                is_front=rank == 0,
            )
            for rank in range(nproc)
        ]
        ranks = Supervisor(commands)
        # From before the first rank lives until after the last: no signal finds nobody in charge.
        with forwarded_signals(ranks), ranks:
            ended = ranks.wait()
    context.exit(report(ended))


def check_mesh(text: str, *, num_ranks: int) -> str:
    """The mesh in its plain form; raises MeshInvalid, or UsageError where it has other ranks."""
    from collectives import parse_mesh

    mesh = parse_mesh(text)
    if mesh.num_ranks != num_ranks:
        raise UsageError(
            f"launch: --mesh {mesh} is a grid of {mesh.num_ranks}; limit the {num_ranks} ranks of "
            "--nproc; make the two agree"
        )
    return str(mesh)


def find_program(name: str) -> str:
    """Where the program is: on the path, else beside this Python; raises UsageError."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise UsageError(
            f"launch: {name!r} is no program; limit one on the PATH or a path to one; "
            "check the word after --"
        )
    return found


@contextmanager
def forwarded_signals(ranks: Supervisor) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the ranks while the context lasts; main thread only."""
    previous = {
        number: signal.signal(number, lambda received, _: ranks.forward(received))
        for number in _FORWARDED
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def report(ended: Sequence[Ended]) -> int:
    """The exit code: that of the rank that failed first, which is named on stderr, or 0."""
    failure = find_first_failure(ended)
    if failure is None:
        return 0
    line = f"longspan: launch: {describe_failure(failure, num_ranks=len(ended))}"
    click.echo(line, err=True)
    return failure.code

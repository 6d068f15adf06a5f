"""The command `longspan`: the composition root.

Owns the command group, the exit codes and the one-line form of every error; each command's body is
in `commands/`. Importing it loads no torch: `longspan --help` is immediate.
"""

from __future__ import annotations

import os
import sys

import click

from orchestrator.commands.ask import ask
from orchestrator.commands.bench import bench
from orchestrator.commands.calibrate import calibrate
from orchestrator.commands.docs import docs
from orchestrator.commands.doctor import doctor
from orchestrator.commands.evaluate import evaluate
from orchestrator.commands.ingest import ingest
from orchestrator.commands.launch import launch
from orchestrator.commands.models import models
from orchestrator.commands.plan import plan
from orchestrator.commands.serve import serve
from orchestrator.errors import LongspanError

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="longspan")
def longspan() -> None:
    """Ask questions of documents that are far longer than a context window's patience.

    Ingest a document once; every later question reads only what matters and says how much it may
    have missed.
    """


for command in (ingest, ask, docs, models, serve, launch, plan, calibrate, doctor, bench, evaluate):
    longspan.add_command(command)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the work failed, 2 wrong usage."""
    try:
        code = longspan.main(args=argv, prog_name="longspan", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = WRONG_USAGE
    except click.Abort:
        message = "interrupted; nothing half-written counts; run the same command to resume"
        code = _fail(message, INTERRUPTED)
    except click.ClickException as error:
        code = _fail(_usage_message(error), error.exit_code)
    except BrokenPipeError:
        # Whoever read stdout has gone; the interpreter's last flush must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except LongspanError as error:
        code = _fail(str(error), error.exit_code)
    except _leaf_faults() as error:
        is_misuse = isinstance(error, _leaf_misuses())
        code = _fail(str(error), WRONG_USAGE if is_misuse else FAILED)
    # Without standalone mode click returns what a command gave to `Context.exit`, else None.
    return code if isinstance(code, int) else DONE


def _leaf_faults() -> tuple[type[Exception], ...]:
    """The leaves' error trees; imported when something has gone wrong, since they bring torch."""
    from collectives.errors import CollectivesError
    from kv_store.errors import StoreError
    from sparse_attn.errors import AttentionError

    return StoreError, AttentionError, CollectivesError


def _leaf_misuses() -> tuple[type[Exception], ...]:
    """Those of the leaves' faults that say that the command itself is wrong."""
    from collectives.errors import MeshInvalid
    from kv_store.errors import InvalidName
    from sparse_attn.errors import BackendUnknown, InvalidBudget

    return InvalidName, BackendUnknown, InvalidBudget, MeshInvalid


def _usage_message(error: click.ClickException) -> str:
    """click's message on one line, with where to look."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{message}; run {context.command_path} --help" if context is not None else message


def _fail(message: str, exit_code: int) -> int:
    click.echo(f"longspan: {' '.join(message.split())}", err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())

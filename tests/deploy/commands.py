"""Command lines of `longspan` as its real parser understands them; nothing is executed.

Owns the walk from a list of words to the parsed options of every command in it: the one that
`launch` starts is parsed too.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from orchestrator.cli import longspan


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A command with the options and arguments that its body would get."""

    name: str
    params: dict[str, Any]


def parse(words: Sequence[str]) -> list[Parsed]:
    """The command of `longspan WORDS...`, and the one inside it; raises click's errors."""
    context = click.Context(longspan, info_name="longspan", **longspan.context_settings)
    command: click.Command = longspan
    rest = list(words)
    while isinstance(command, click.Group):
        name = rest.pop(0)
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"no command {name}")
        command = found
        if isinstance(command, click.Group):
            context = click.Context(command, parent=context, info_name=name)
    params = command.make_context(command.name, rest, parent=context).params
    parsed = [Parsed(name=command.name or "", params=params)]
    if command.name == "launch":
        program, *inner = params["command"]
        if program != "longspan":
            raise click.UsageError(f"launches {program}")
        parsed += parse(inner)
    return parsed


def find_command_lines(page: str) -> Iterator[list[str]]:
    """Words after `longspan` in a page's terminal lines, also behind `kubectl exec ... --`."""
    for block in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for line in re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), re.MULTILINE):
            words = shlex.split(line, comments=True)
            if "--" in words:
                words = words[words.index("--") + 1 :]
            if words[0] == "longspan":
                yield words[1:]

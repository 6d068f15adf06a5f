"""Every command line of deploy/ and of its page is one that `longspan` understands.

The entry point runs with the manifest's own environment and a `longspan` that only writes down its
arguments: what is parsed here is what the shell made of the script, quotes and all.
"""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from collectives import parse_mesh
from orchestrator.ingest import IngestOptions
from orchestrator.selection import check_request
from orchestrator.types import AskOptions, Sampling
from tests.deploy.commands import Parsed, find_command_lines, parse
from tests.deploy.kubelet import prepare
from tests.deploy.manifests import (
    JOB,
    RAY,
    RUNNABLE,
    built,
    environment,
    find_entry_point,
    find_worker,
    folder_name,
)
from tests.deploy.stub import Stub
from tests.source import ROOT

PAGE = ROOT / "docs" / "deploy.md"


def run(folder: Path, tmp_path: Path, **changed: str) -> list[list[Parsed]]:
    """What the entry point of a folder asks of `longspan`, command by command."""
    stub = Stub.make(tmp_path / "bin")
    container = prepare(
        find_worker(folder),
        built(folder),
        tmp_path / "root",
        changed=changed,
        command=find_entry_point(folder),
        programs=stub.folder,
    )
    done = container.run()
    assert done.returncode == 0, done.stderr
    assert container.changed_elsewhere() == {}
    return [parse(words) for words in stub.calls()]


def variables_of(folder: Path) -> dict[str, str]:
    """Variables of the manifest."""
    return environment(find_worker(folder).containers[0], built(folder))


@pytest.mark.parametrize("folder", RUNNABLE, ids=folder_name)
def test_the_entry_point_ingests_and_asks(folder: Path, tmp_path: Path) -> None:
    variables = variables_of(folder)
    ingest, ask = ([command.name for command in line] for line in run(folder, tmp_path))
    assert (ingest[-1], ask[-1]) == ("ingest", "ask")
    launched = ["launch"] if variables["JOB_EXECUTOR"] == "launch" else []
    assert ingest[:-1] == ask[:-1] == launched


@pytest.mark.parametrize("folder", RUNNABLE, ids=folder_name)
def test_options_arrive_as_the_manifest_has_them(folder: Path, tmp_path: Path) -> None:
    variables = variables_of(folder)
    for line in run(folder, tmp_path):
        params = line[-1].params
        assert (params["model"], params["device"]) == (variables["JOB_MODEL"], "cuda")
        assert params["threads"] == int(variables["JOB_THREADS"])
        over_ranks = line[0].params
        assert over_ranks["mesh"] == variables["JOB_MESH"]
        if folder == RAY:
            assert params["executor"] == "ray"
        else:
            assert over_ranks["nproc"] == parse_mesh(over_ranks["mesh"]).num_ranks
        check_values(line[-1])


def check_values(command: Parsed) -> None:
    """What the commands themselves check before they compute."""
    params = command.params
    if command.name == "ingest":
        IngestOptions(segment_tokens=params["segment_tokens"], window=params["window"])
    elif command.name == "ask":
        sampling = Sampling(**{name: params[name] for name in ("temperature", "top_p", "seed")})
        names = ("mode", "budget", "mass", "max_tokens")
        check_request(AskOptions(sampling=sampling, **{name: params[name] for name in names}))


def test_values_with_spaces_and_an_optional_budget_arrive_whole(tmp_path: Path) -> None:
    changed = {"JOB_DOCUMENT": "/data/a 'b' $c.txt", "JOB_NAME": "x y", "JOB_BUDGET": "12.5%"}
    (_, ingest), (_, ask) = run(JOB, tmp_path, **changed)
    assert ingest.params["path"].endswith("/data/a 'b' $c.txt")
    assert ingest.params["name"] == ask.params["name"] == "x y"
    assert ask.params["budget"] == "12.5%"


def test_command_lines_of_the_page_are_understood() -> None:
    lines = list(find_command_lines(PAGE.read_text(encoding="utf-8")))
    assert lines
    for words in lines:
        for command in parse(words):
            check_values(command)


@pytest.mark.parametrize(
    "line",
    [
        "ingest",
        "ingest book.txt --segment-token many",
        "ask book --questions q.txt --modes exact",
        "launch --nproc 2 -- python job.py",
        "launch --nproc 2 -- longspan ask",
        "docs gone",
    ],
)
def test_a_wrong_command_line_is_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line.split())


def test_lines_are_found_in_a_page() -> None:
    lines = "$ longspan docs ls  # all\n$ kubectl exec p -- longspan models ls\n$ ls\nlongspan x\n"
    page = f"```console\n{lines}```\n```text\n$ longspan y\n```\n"
    assert list(find_command_lines(page)) == [["docs", "ls"], ["models", "ls"]]

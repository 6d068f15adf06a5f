"""`longspan eval niah` prints one JSON object or a table, and refuses what it cannot read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from orchestrator.commands import evaluate as command
from orchestrator.errors import UsageError
from tests.evaluation.fakes import FakeEngine

SMALL = ("--lengths", "400", "--depths", "0.3,0.7", "--modes", "exact,centroid:12.5%:levels=2")


class FakeTokenizer:
    """A token for every four characters."""

    @staticmethod
    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return [0] * (len(text) // 4), []


class EngineWithTokenizer(FakeEngine):
    """What the command needs beside the evaluation: to count tokens."""

    model = SimpleNamespace(tokenizer=FakeTokenizer())


@pytest.fixture(name="loaded")
def replace_engine(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of every engine that was loaded; each is a fake one."""
    seen: list[dict[str, Any]] = []

    @contextmanager
    def load(options: dict[str, Any]) -> Iterator[FakeEngine]:
        seen.append(options)
        engine = EngineWithTokenizer()
        yield engine
        assert engine.documents == {}

    monkeypatch.setattr(command, "load_engine", load)
    return seen


def run(*arguments: str) -> Result:
    """Run the command; faults come out as they were raised."""
    return CliRunner().invoke(command.evaluate, ["niah", *arguments], catch_exceptions=False)


def test_json_is_alone_on_stdout(loaded: list[dict[str, Any]]) -> None:
    result = run(*SMALL, "--json", "--audit")
    value = json.loads(result.stdout)
    assert len(value["rows"]) == 12
    assert value["rows"][1]["audited_mass"] == 0.91
    assert {row["haystack"] for row in value["summary"]} == {
        "filler",
        "reference",
        "lookalike",
        None,
    }
    assert value["segment_tokens"] == 1024
    assert "12/12" in result.stderr
    # Without --store the documents go to a folder of their own, which is gone afterwards.
    assert loaded[0]["store"].name.startswith("longspan-eval-")
    assert not loaded[0]["store"].exists()


def test_table_shows_each_haystack_and_every_loss(loaded: list[dict[str, Any]]) -> None:
    result = run(*SMALL, "--haystacks", "lookalike,filler", "--store", "mine")
    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        "mode",
        "haystack",
        "cases",
        "found",
        "kept",
        "evidence",
        "nll",
        "gap",
    ]
    assert [line for line in lines if line.startswith("centroid 12.5% levels 2")][1].split()[
        4:7
    ] == [
        "lookalike",
        "2",
        "0%",
    ]
    assert sum(line.startswith("lost by centroid") for line in lines) == 2
    assert str(loaded[0]["store"]) == "mine"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--lengths", "many"), "lengths 'many'"),
        (("--lengths", ""), "lengths ''"),
        (("--depths", "0.5,0.5"), "names one twice"),
        (("--depths", "1.5"), "depth 1.5"),
        (("--lengths", "10"), "length 10 tokens"),
        (("--haystacks", "barn"), "'barn'"),
        (("--modes", "dense"), "'dense'"),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_wrong_values_are_refused_by_name(arguments: tuple[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        run(*SMALL, *arguments)


def test_it_is_called_eval() -> None:
    assert isinstance(command.evaluate, click.Group)
    assert command.evaluate.name == "eval"

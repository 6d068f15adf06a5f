"""The stack manifest: its hash follows what computes an answer, and nothing else (row A11)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bars.a11 import measure
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from orchestrator.selection import decide, selector_facts
from orchestrator.stack import stack_manifest
from orchestrator.types import AskOptions, Mode
from sparse_attn.select.centroid_build import CentroidParams
from tests.tiny_model import QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

FACTS: dict[str, Any] = {
    "weights": "0" * 32,
    "dtype": "float32",
    "device": "cpu",
    "backend": "torch",
    "selector": {"mode": "exact"},
    "mesh": "1x1",
    "threads": 2,
    "is_deterministic": True,
    "libraries": {"torch": "2.13.0", "numpy": "2.0.0"},
}
CHANGES: dict[str, Any] = {
    "weights": "1" * 32,
    "dtype": "bfloat16",
    "device": "cuda",
    "backend": "reference",
    "selector": {"mode": "centroid"},
    "mesh": "1x2",
    "threads": 1,
    "is_deterministic": False,
    "libraries": {"torch": "2.13.1", "numpy": "2.0.0"},
}


@pytest.mark.parametrize("fact", sorted(FACTS))
def test_each_fact_changes_the_hash(fact: str) -> None:
    changed = stack_manifest(**{**FACTS, fact: CHANGES[fact]})
    assert changed["hash"] != stack_manifest(**FACTS)["hash"]


def test_the_order_of_facts_does_not() -> None:
    libraries = dict(reversed(FACTS["libraries"].items()))
    again = stack_manifest(**{**FACTS, "libraries": libraries})
    assert again["hash"] == stack_manifest(**FACTS)["hash"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("stack")
    with Engine.load(
        str(save_tiny_model(root / "model")), store=root / "store", threads=1
    ) as engine:
        for name, text in (("boxes", TEXT), ("half", TEXT[: len(TEXT) // 2])):
            engine.ingest(
                text=text, name=name, options=IngestOptions(segment_tokens=SEGMENT_TOKENS)
            )
        yield engine


def test_the_selector_is_named_as_it_was_asked_for(engine: Engine) -> None:
    def selector(name: str = "boxes", mode: Mode = "centroid", **options: Any) -> dict[str, Any]:
        answer = engine.ask(name, QUESTION, mode=mode, max_tokens=1, **options)
        facts: dict[str, Any] = answer.stack["selector"]
        return facts

    assert selector() == selector("half") == selector(budget="12.50 %")
    assert selector()["budget"] == "12.5%"
    assert selector(budget=200)["budget"] == "200 keys"
    assert selector(mass=0.9)["budget"] is None
    assert selector(mass=0.9)["mass"] == 0.9
    assert selector(mode="exact") == selector(mode="auto") == selector("half", mode="exact")
    assert selector(mode="exact", budget="5%") == selector(mode="exact")
    assert selector(levels=2) != selector(levels=1) == selector()
    assert selector()["index"] == {"name": "centroid", **CentroidParams().for_document(1).to_dict()}


def test_a_share_has_one_name_whatever_the_document() -> None:
    def facts(num_tokens: int) -> dict[str, Any]:
        options = AskOptions(mode="centroid", budget="5%")
        decision = decide(options, num_tokens=num_tokens, num_steady=68, keys_per_cluster=16)
        return selector_facts(options, decision, index={})

    assert facts(6000) == facts(7000)


def test_row_a11_on_a_tiny_model(tmp_path: Path) -> None:
    changes, same = measure(tmp_path)
    assert all(changes.values()), changes
    assert all(same.values()), same
    assert {"dtype", "threads", "selector mode", "weights", "library version"} <= changes.keys()

"""Admission by memory: what fits waits for room, what never will is refused with what would."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from collectives import parse_mesh
from kv_store import DocumentBusy, Layout, load_resident
from orchestrator.capacity import document_bytes, fitting_tokens, question_bytes
from orchestrator.cluster.executor import InProcessExecutor
from orchestrator.config import EngineConfig, resolve
from orchestrator.engine import Engine
from orchestrator.errors import NotAdmitted
from orchestrator.ingest import IngestOptions
from tests.tiny_model import QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

OPTIONS = IngestOptions(segment_tokens=SEGMENT_TOKENS)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    root = tmp_path_factory.mktemp("coordinator")
    model = save_tiny_model(root / "model")
    config = resolve(model=str(model), store=root / "store", threads=1)
    with Engine(config, InProcessExecutor(config)) as engine:
        for name in ("a", "b"):
            engine.ingest(text=TEXT + name, name=name, options=OPTIONS)
    return config


@pytest.fixture
def engine(config: EngineConfig) -> Iterator[Engine]:
    with Engine(config, InProcessExecutor(config)) as engine:
        yield engine


def layout_of(engine: Engine, name: str = "a") -> Layout:
    with engine.store.open(name) as document:
        return document.layout


def needed_bytes(engine: Engine, *, max_tokens: int) -> int:
    """Of one document and one question on it."""
    layout, mesh = layout_of(engine), parse_mesh("1x1")
    document = document_bytes(layout, mesh, item_bytes=4, keys_per_cluster=4)
    tokens = len(engine.model.tokenizer.question(QUESTION, instruction=None)) + max_tokens
    return document + question_bytes(
        layout, mesh, engine.model.cfg, capacity_tokens=tokens, item_bytes=4
    )


def test_plans_of_kernels_are_counted(engine: Engine) -> None:
    layout, mesh, cfg = layout_of(engine), parse_mesh("1x1"), engine.model.cfg
    sizes = {"capacity_tokens": 40, "item_bytes": 4}
    plain, planned = (
        question_bytes(layout, mesh, cfg, **sizes, has_plans=has_plans)
        for has_plans in (False, True)
    )
    assert planned - plain >= 4 * cfg.num_heads * layout.num_tokens  # scores of a query


def limited(config: EngineConfig, capacity_bytes: int) -> Engine:
    return Engine(config, InProcessExecutor(config), capacity_bytes=capacity_bytes)


def test_the_formula_is_what_a_document_takes(engine: Engine) -> None:
    with engine.store.open("a") as document:
        resident = load_resident(document, dtype=torch.float32, device="cpu")
    said = document_bytes(resident.layout, parse_mesh("1x1"), item_bytes=4, keys_per_cluster=4)
    assert said == pytest.approx(resident.num_bytes, rel=0.15)


@pytest.mark.parametrize("mesh", ["1x2", "2x1", "1x3", "2x2"])
def test_ranks_share_a_document(engine: Engine, mesh: str) -> None:
    layout = replace(layout_of(engine), num_tokens=64 * 256)
    alone, shared = (
        document_bytes(layout, parse_mesh(m), item_bytes=2, keys_per_cluster=4)
        for m in ("1x1", mesh)
    )
    assert alone / parse_mesh(mesh).num_ranks <= shared <= 1.15 * alone / parse_mesh(mesh).num_ranks


def test_what_never_fits_is_refused_with_what_would(config: EngineConfig, engine: Engine) -> None:
    layout = layout_of(engine)
    half = document_bytes(layout, parse_mesh("1x1"), item_bytes=4, keys_per_cluster=4) // 2
    with limited(config, half) as small:
        with pytest.raises(NotAdmitted, match=r"limit .* MiB, about .* tokens; use more") as caught:
            small.ask("a", QUESTION, max_tokens=4)
        assert small.coordinator.names() == []
    fitting = int(re.search(r"about (\d+) tokens", str(caught.value))[1])  # type: ignore[index]
    smaller = replace(layout, num_tokens=fitting)
    assert document_bytes(smaller, parse_mesh("1x1"), item_bytes=4, keys_per_cluster=4) <= half
    assert fitting == fitting_tokens(
        layout, parse_mesh("1x1"), item_bytes=4, keys_per_cluster=4, capacity_bytes=half
    )


def test_a_question_that_never_fits_is_refused_and_leaves_nothing(config: EngineConfig) -> None:
    with Engine(config, InProcessExecutor(config)) as probe:
        capacity = needed_bytes(probe, max_tokens=4)
    with limited(config, capacity) as small:
        with pytest.raises(NotAdmitted, match="lower --max-tokens"):
            small.ask("a", QUESTION, max_tokens=600)
        assert small.ask("a", QUESTION, max_tokens=4).usage.completion_tokens > 0
        small.release("a")


def test_documents_that_nobody_uses_give_way(config: EngineConfig, engine: Engine) -> None:
    with limited(config, needed_bytes(engine, max_tokens=4) * 5 // 4) as small:
        first = small.ask("a", QUESTION, max_tokens=4).text
        assert small.coordinator.names() == ["a"]
        small.ask("b", QUESTION, max_tokens=4)
        assert small.coordinator.names() == ["b"]
        assert small.ask("a", QUESTION, max_tokens=4).text == first


def test_questions_queue_until_there_is_room(config: EngineConfig, engine: Engine) -> None:
    wanted = {name: engine.ask(name, QUESTION, max_tokens=12).text for name in ("a", "b")}
    with limited(config, needed_bytes(engine, max_tokens=12) * 5 // 4) as small:
        names = ["a", "b"] * 4
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda name: small.ask(name, QUESTION, max_tokens=12).text, names)
            assert list(answers) == [wanted[name] for name in names]


def test_concurrent_questions_take_turns_and_answer_alike(engine: Engine) -> None:
    alone = engine.ask("a", QUESTION, max_tokens=24).text
    steps: list[int] = []

    def ask(i: int) -> str:
        def note(_: str) -> None:
            steps.append(i)

        return engine.ask("a", QUESTION, max_tokens=24, on_token=note).text

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [alone] * 4
    switches = sum(a != b for a, b in pairwise(steps))
    assert switches > 8


def test_a_document_in_use_is_not_released(engine: Engine) -> None:
    began, go_on = threading.Event(), threading.Event()

    def hold(_: str) -> None:
        began.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.ask, "a", QUESTION, max_tokens=4, on_token=hold)
        assert began.wait(60)
        with pytest.raises(DocumentBusy, match="is being asked, by 1"):
            engine.release("a")
        go_on.set()
        asked.result()
    engine.release("a")


class Gone(Exception):
    """A listener that went away."""


def test_a_listener_that_leaves_ends_its_question_alone(engine: Engine) -> None:
    def leave(_: str) -> None:
        raise Gone

    with pytest.raises(Gone):
        engine.ask("a", QUESTION, max_tokens=24, on_token=leave)
    assert engine.ask("a", QUESTION, max_tokens=4).usage.completion_tokens > 0
    engine.release("a")

"""Concurrent questions of an engine answer as each alone, whoever joins, leaves or fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.cluster.executor import InProcessExecutor
from orchestrator.config import EngineConfig, resolve
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from orchestrator.steps import Action, ForwardEach
from orchestrator.types import Answer
from tests.tiny_model import QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

OPTIONS = IngestOptions(segment_tokens=SEGMENT_TOKENS)
ASKED: tuple[dict[str, Any], ...] = (
    {"mode": "exact"},
    {"mode": "centroid", "budget": "25%", "max_tokens": 9},
    {"mode": "window", "max_tokens": 5},
    {"mode": "centroid", "mass": 0.8, "seed": 3, "temperature": 0.9},
    {"mode": "centroid", "budget": "25%", "levels": 2, "audit": True},
    {"mode": "exact", "temperature": 1.2, "seed": 1, "max_tokens": 17},
)


class Gone(Exception):
    """A listener that went away."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    root = tmp_path_factory.mktemp("questions")
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


@dataclass
class Steps:
    """How many questions took each step; the first one waits until `gathers` more are there."""

    sizes: list[int] = field(default_factory=list)
    gathers: int = 0


@pytest.fixture
def steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Steps:
    batcher, run, seen = engine.coordinator.batcher, engine.executor.run, Steps()

    def count(action: Action) -> Any:
        if isinstance(action, ForwardEach):
            deadline = time.monotonic() + 60
            while len(batcher._waiting) < seen.gathers:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            seen.gathers = 0
            seen.sizes.append(len(action.ids))
        return run(action)

    monkeypatch.setattr(batcher, "_run", count)
    return seen


def ask(engine: Engine, i: int, **more: Any) -> Answer:
    return engine.ask("ab"[i % 2], QUESTION, **{"max_tokens": 12, **ASKED[i], **more})


def facts(answer: Answer) -> dict[str, Any]:
    """All of an answer but what a clock says."""
    told = answer.to_json()
    return {name: told[name] for name in ("answer", "usage", "recall", "evidence", "selection")}


def test_questions_together_answer_as_each_alone(engine: Engine, steps: Steps) -> None:
    alone = [facts(ask(engine, i)) for i in range(len(ASKED))]
    assert set(steps.sizes) == {1}
    steps.gathers = len(ASKED) - 1
    with ThreadPoolExecutor(len(ASKED)) as pool:
        together = list(pool.map(lambda i: facts(ask(engine, i)), range(len(ASKED))))
    assert together == alone
    assert max(steps.sizes) >= len(ASKED) - 1
    assert len({fact["answer"] for fact in alone}) > 2


def test_a_question_that_fails_or_is_left_disturbs_no_other(
    engine: Engine, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One listener leaves, one question's attention fails in the middle of its answer."""
    wanted = facts(ask(engine, 0))
    questions = engine.executor.worker.questions
    everybody = threading.Barrier(3)
    failing: list[int] = []

    def meet(leaves: bool) -> Callable[[str], None]:
        pieces: list[str] = []

        def listen(piece: str) -> None:
            pieces.append(piece)
            if len(pieces) == 1:
                everybody.wait(60)
            if leaves and len(pieces) == 3:
                raise Gone

        return listen

    def fail(piece: str) -> None:
        if not failing:
            everybody.wait(60)
            failing.append(max(questions._questions))
        question = questions._questions[failing[0]]
        monkeypatch.setattr(question.attention, "advance", broken)

    def broken(num_tokens: int) -> None:
        raise ValueError(f"no room for {num_tokens}")

    steps.gathers = 2
    with ThreadPoolExecutor(3) as pool:
        stays: Future[Answer] = pool.submit(ask, engine, 0, on_token=meet(leaves=False))
        leaves: Future[Answer] = pool.submit(ask, engine, 0, on_token=meet(leaves=True))
        while len(questions._questions) < 2:
            time.sleep(0.001)
        fails: Future[Answer] = pool.submit(ask, engine, 0, on_token=fail)
        assert facts(stays.result(60)) == wanted
        with pytest.raises(Gone):
            leaves.result(60)
        with pytest.raises(ValueError, match="no room for 1"):
            fails.result(60)
    assert questions._questions == {}
    assert facts(ask(engine, 0)) == wanted
    assert max(steps.sizes) > 1

"""Steps over ranks: who differs is named, who fails alone fails together, who is lost ends it."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collectives import Group, PeerLost, run_threads
from kv_store import DocumentDamaged, DocumentNotFound, Store
from kv_store.disk import TensorFile
from kv_store.layout import segment_file
from orchestrator.cluster.executor import GroupExecutor, Turn
from orchestrator.cluster.rank import follow, identity_of, load_worker
from orchestrator.config import EngineConfig, resolve
from orchestrator.engine import Engine
from orchestrator.errors import RankFailed, RankMismatch
from orchestrator.ingest import IngestOptions
from orchestrator.steps import Chain, Heartbeat, OpenDocument
from tests.mesh import LONG_TEXT, SEGMENT_TOKENS, run_mesh, save_long_model

OPTIONS = IngestOptions(segment_tokens=SEGMENT_TOKENS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long_model(tmp_path_factory.mktemp("model"))


def config_of(model: Path, store: Path, mesh: str = "1x2") -> EngineConfig:
    return replace(resolve(model=str(model), store=store, threads=1), mesh=mesh)


def serve(config: EngineConfig, group: Group) -> Any:
    """What a rank above 0 does; returns the error that ended it."""
    try:
        worker = load_worker(config, group).worker
        chain = Chain(identity_of(config, worker.model))
        while follow(worker, group, chain):
            pass
    except (RankMismatch, PeerLost) as error:
        return error
    return None


def start(config: EngineConfig, group: Group) -> GroupExecutor:
    executor = GroupExecutor(config, group)
    executor.start(ExitStack())
    return executor


def test_ranks_that_were_started_differently_all_say_so(model: Path, tmp_path: Path) -> None:
    config = config_of(model, tmp_path)

    def work(group: Group) -> Any:
        if group.rank == 1:
            return serve(replace(config, is_deterministic=False), group)
        with pytest.raises(RankMismatch, match=r"ranks \[1\] follow another plan") as caught:
            start(config, group).run(Heartbeat())
        return caught.value

    errors = run_threads(2, work)
    assert all(isinstance(error, RankMismatch) for error in errors)
    assert all("start all of them the same way" in str(error) for error in errors)


def test_a_failure_of_one_rank_alone_is_everybodys_and_nobodys_end(
    model: Path, tmp_path: Path
) -> None:
    run_mesh("1x1", model, tmp_path, lambda e: e.ingest(text=LONG_TEXT, name="a", options=OPTIONS))
    damage(tmp_path, segment_idx=1, kv_head_idx=0)  # of virtual shard 1: rank 1 alone reads it

    def ask(engine: Engine) -> str:
        with pytest.raises(RankFailed, match=r"rank 1: DocumentDamaged: .*00001/kv000"):
            engine.ask("a", "Why?", max_tokens=2)
        assert engine.executor.failure is None
        engine.store.remove("a")  # nobody holds its lock
        engine.ingest(text=LONG_TEXT, name="a", options=OPTIONS)
        return engine.ask("a", "Why?", max_tokens=2).text

    assert run_mesh("1x2", model, tmp_path, ask) is not None


def test_rank_0s_own_failure_keeps_its_type(model: Path, tmp_path: Path) -> None:
    run_mesh("1x1", model, tmp_path, lambda e: e.ingest(text=LONG_TEXT, name="a", options=OPTIONS))
    damage(tmp_path, segment_idx=0, kv_head_idx=0)

    def ask(engine: Engine) -> None:
        with pytest.raises(DocumentDamaged, match="00000/kv000"):
            engine.ask("a", "Why?", max_tokens=2)
        with pytest.raises(DocumentNotFound):
            engine.ask("b", "Why?", max_tokens=2)
        assert engine.executor.failure is None

    run_mesh("1x2", model, tmp_path, ask)


def test_a_store_that_is_not_shared_is_noticed(model: Path, tmp_path: Path) -> None:
    texts = {0: LONG_TEXT, 1: LONG_TEXT[::-1]}
    for rank, text in texts.items():
        with Engine.load(str(model), store=tmp_path / str(rank), threads=1) as engine:
            engine.ingest(text=text, name="a", options=OPTIONS)

    def work(group: Group) -> None:
        config = config_of(model, tmp_path / str(group.rank))
        if group.rank:
            serve(config, group)
            return
        executor = start(config, group)
        with Store(tmp_path / "0").open("a") as document:
            action = OpenDocument(document="a", document_hash=document.hash)
        with pytest.raises(RankFailed, match="give all ranks one store"):
            executor.run(action)
        executor.close()

    run_threads(2, work)


def test_after_a_lost_rank_every_step_says_which(model: Path, tmp_path: Path) -> None:
    config = config_of(model, tmp_path)

    def work(group: Group) -> None:
        if group.rank:
            load_worker(config, group)
            return  # gone without a word
        executor = start(config, group)
        for _ in range(2):
            with pytest.raises(PeerLost, match="rank 0 lost rank 1"):
                executor.run(Heartbeat())
        assert isinstance(executor.failure, PeerLost)
        assert executor.progress().is_broken
        executor.close()

    run_threads(2, work)


def test_heartbeats_run_between_questions(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.cluster.executor.HEARTBEAT_S", 0.02)

    def wait(engine: Engine) -> int:
        deadline = time.monotonic() + 20
        while engine.executor.progress().steps_done < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        return engine.executor.progress().steps_done

    assert run_mesh("1x2", model, tmp_path, wait) >= 3


def test_turns_are_given_in_order() -> None:
    turn, waiting = Turn(), []
    order: list[int] = []
    with turn:
        for i in range(5):
            thread = threading.Thread(target=lambda i=i: enter(turn, order, i))
            thread.start()
            waiting.append(thread)
            while len(turn._waiting) < i + 2:
                time.sleep(0.001)
    for thread in waiting:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


def enter(turn: Turn, order: list[int], i: int) -> None:
    with turn:
        order.append(i)


def damage(store: Path, *, segment_idx: int, kv_head_idx: int) -> None:
    """Flip a bit of one KV head's keys."""
    file = segment_file(segment_idx, kv_head_idx)
    with TensorFile(store / "a", file, expected=None) as tensors:
        place = tensors.entries["k"].start
    data = bytearray((store / "a" / file).read_bytes())
    data[place] ^= 1
    (store / "a" / file).write_bytes(bytes(data))

"""The planner's words in an ingest and in an answer, from a topology file made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collectives import parse_mesh
from orchestrator.config import EngineConfig, resolve
from orchestrator.engine import Engine
from orchestrator.errors import TopologyInvalid
from orchestrator.ingest import IngestOptions
from orchestrator.model.load import load_model
from orchestrator.planner import Topology, encode_topology, parse_machine, published_topology
from orchestrator.run_plan import RunPlanner
from tests.tiny_model import QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

LARGE: dict[str, Any] = {"num_tokens": 64_000, "segment_tokens": 8192, "chunk_tokens": 8192}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def save(path: Path, **changes: object) -> Topology:
    """The published figures of some GPUs, passed off as this machine's."""
    known = published_topology(parse_machine("4xH200"))
    topology = replace(known, kind="cpu", dtype="float32", **changes)  # type: ignore[arg-type]
    path.write_text(encode_topology(topology))
    return topology


def config_of(model: Path, store: Path, mesh: str = "1x1") -> EngineConfig:
    return replace(resolve(model=str(model), store=store, threads=1), mesh=mesh)


def test_without_a_topology_nothing_is_predicted_or_split(model: Path, tmp_path: Path) -> None:
    planner = RunPlanner.load(
        config_of(model, tmp_path, "1x4"), load_model(str(model)).cfg, file=tmp_path / "none"
    )
    assert planner.topology is None
    assert planner.choose_split(**LARGE) is None


def test_a_file_of_another_dtype_is_left_alone(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "t.json")
    config = replace(config_of(model, tmp_path), dtype="bfloat16")
    cfg = load_model(str(model)).cfg
    assert RunPlanner.load(config, cfg, file=tmp_path / "t.json").topology is None


def test_a_damaged_file_is_said(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(TopologyInvalid, match="run longspan calibrate"):
        RunPlanner.load(
            config_of(model, tmp_path), load_model(str(model)).cfg, file=tmp_path / "t.json"
        )


def test_a_split_is_planned_where_it_hides_communication(model: Path, tmp_path: Path) -> None:
    cfg = load_model(str(model)).cfg
    wide = replace(cfg, num_layers=4, model_dim=4096, mlp_dim=14336, num_heads=32, num_kv_heads=8)
    wide = replace(wide, head_dim=128)

    def split(mesh: str, **changes: object) -> int | None:
        topology = save(tmp_path / "t.json", **changes)
        planner = RunPlanner(cfg=wide, mesh=parse_mesh(mesh), threads=0, topology=topology)
        return planner.choose_split(**LARGE)

    assert split("4x1", overlap_share=1.0) is not None
    assert split("4x1", overlap_share=0.0) is None
    assert split("1x1", overlap_share=1.0) is None


def test_an_answer_carries_what_was_predicted_beside_what_was_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "t.json")
    monkeypatch.setattr("orchestrator.run_plan.default_topology_file", lambda: tmp_path / "t.json")
    with Engine.load(str(model), store=tmp_path / "store", threads=1) as engine:
        options = IngestOptions(segment_tokens=SEGMENT_TOKENS)
        engine.ingest(text=TEXT, name="boxes", options=options)
        plans = {
            mode: engine.ask("boxes", QUESTION, mode=mode, max_tokens=4).to_json()["plan"]
            for mode in ("exact", "centroid", "window")
        }
        by_mass = engine.ask("boxes", QUESTION, mode="centroid", mass=0.5, max_tokens=4)
    assert plans["window"] is None
    assert by_mass.plan is None
    for mode in ("exact", "centroid"):
        plan = plans[mode]
        assert plan["mesh"] == "1x1"
        assert set(plan["measured"]) < set(plan["predicted"])
        assert all(seconds >= 0 for seconds in plan["measured"].values())
        assert plan["predicted"]["memory_bytes"] > 0


@pytest.fixture(autouse=True)
def no_file_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was calibrated here decides no test."""
    monkeypatch.setattr("orchestrator.run_plan.default_topology_file", lambda: tmp_path / "none")

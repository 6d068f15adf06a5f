"""`longspan plan`: names, files, refusals, and what a person sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.errors import ContextTooLong, ModelNotFound, TopologyInvalid, UsageError
from orchestrator.planner import encode_topology, parse_machine
from orchestrator.planning import (
    PlanRequest,
    find_topology,
    make_plan,
    read_model,
    readings_of,
)
from tests.planner.machines import cpu_machine, machine, workload
from tests.tiny_model import save_tiny_model

LLAMA = "shape:llama-3.1-8b"


@pytest.fixture
def topology_file(tmp_path: Path) -> Path:
    file = tmp_path / "topology.json"
    file.write_text(encode_topology(cpu_machine()))
    return file


@pytest.fixture(autouse=True)
def no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has calibrated is not looked at."""
    monkeypatch.setattr(
        "orchestrator.planning.default_topology_file", lambda: tmp_path / "nothing.json"
    )


def request(**changes: object) -> PlanRequest:
    fields: dict[str, object] = {"model": LLAMA, "machine": "2xH100", "num_tokens": 50_000}
    return PlanRequest(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_model_is_read_without_its_weights(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "tiny")
    weights = directory / "model.safetensors"
    cfg, file_bytes = read_model(str(directory))
    assert file_bytes == weights.stat().st_size
    weights.write_bytes(b"never read")
    assert read_model(str(directory)) == (cfg, 10)
    assert read_model(f"{LLAMA}@2")[0].num_layers == 2
    with pytest.raises(ModelNotFound):
        read_model("no-such-model")


def test_auto_compares_both_readings_and_a_budget_is_resolved() -> None:
    work = workload(100_000)
    exact, centroid = readings_of(request(), work)
    assert (exact.mode, centroid.mode) == ("exact", "centroid")
    assert (centroid.keys, centroid.levels) == (12_500 - 68, 2)
    (asked,) = readings_of(request(mode="centroid", budget="2048"), work)
    assert asked.keys == 2048 - 68
    # So short a document is read whole, whatever was asked for.
    assert [r.mode for r in readings_of(request(), workload(60))] == ["exact"]


def test_known_gpus_need_no_file_and_a_file_of_their_kind_is_preferred(tmp_path: Path) -> None:
    spec = parse_machine("2xH100")
    assert find_topology(spec).origin.startswith("published")
    file = tmp_path / "nothing.json"
    file.write_text(encode_topology(machine(8)))
    found = find_topology(spec)
    assert (found.origin, found.num_devices) == ("test", 2)
    assert find_topology(parse_machine("2xH200")).origin.startswith("published")


def test_one_measured_gpu_borrows_published_links(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    file.write_text(encode_topology(machine(1, links=())))
    alone, two = (find_topology(parse_machine(f"{n}xH100"), file) for n in (1, 2))
    assert (alone.links, alone.origin) == ((), "test")
    assert {link.ranks for link in two.links} == {2}
    assert two.origin == "test; links from published figures"


def test_a_cpu_needs_its_file(topology_file: Path) -> None:
    assert find_topology(parse_machine("cpu:1"), topology_file).num_devices == 1
    with pytest.raises(TopologyInvalid, match="run longspan calibrate"):
        find_topology(parse_machine("cpu:2"))
    with pytest.raises(UsageError, match="limit 2; give cpu:2"):
        find_topology(parse_machine("cpu:4"), topology_file)
    with pytest.raises(UsageError, match="is not the cpu that"):
        find_topology(parse_machine("2xH100"), topology_file)


@pytest.mark.parametrize("text", [None, "{}", "\udcff"])
def test_a_file_that_is_no_topology_is_named(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "odd.json"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TopologyInvalid, match=r"odd\.json"):
        find_topology(parse_machine("cpu:2"), file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "vote"}, "limit auto, exact, centroid"),
        ({"num_tokens": 0}, "num tokens 0 is below 1"),
        ({"segment_tokens": 1000}, "not a positive multiple of 256"),
    ],
)
def test_wrong_requests_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        request(**changes)


def test_a_document_beyond_the_context_is_refused_as_an_ingest_does() -> None:
    with pytest.raises(ContextTooLong, match="holds 131072"):
        make_plan(request(num_tokens=131_072))


def test_a_person_sees_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--model", LLAMA, "--gpus", "2xH200", "--context", "100000"]
    assert main(["plan", *wanted]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{LLAMA}: 100000 tokens in segments of 8192 on 2xH200 (published")
    assert lines[1].split()[:4] == ["mesh", "chunk", "split", "mode"]
    assert len(lines) == 2 + 5 + 2
    assert "prefill" in lines[-2]
    assert lines[-1].endswith("GiB")


def test_a_program_gets_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--model", LLAMA, "--gpus", "1xH200", "--context", "100000", "--mode", "exact"]
    assert main(["plan", *wanted, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["schema"], body["tokens"], body["plan"]["mode"]) == (1, 100_000, "exact")


def test_what_does_not_fit_is_exit_code_1_with_the_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = ["--model", "shape:llama-3.3-70b", "--gpus", "1xH100", "--context", "100000"]
    assert main(["plan", *wanted]) == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.count("\n") == 1
    assert "plan --gpus 3xH100" in caught.err

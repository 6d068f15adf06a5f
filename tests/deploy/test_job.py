"""The Job as a node would run it: its entry point, environment and mounts, on a CPU.

Launches real ranks, as many as the base manifest says, with a tiny model. `ON_CPU` is all that is
set otherwise than in the manifest, in variables that the manifest defines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.kubelet import Container, prepare
from tests.deploy.manifests import JOB, built, environment, find_worker
from tests.tiny_model import SEGMENT_TOKENS, TEXT, save_tiny_model

ON_CPU = {
    "JOB_DEVICE": "cpu",
    "JOB_THREADS": "1",
    "JOB_MODEL": "/data/models/tiny",
    "JOB_SEGMENT_TOKENS": str(SEGMENT_TOKENS),
    "JOB_MAX_TOKENS": "4",
}


def bring_data(container: Container) -> None:
    """What `kubectl cp` would have put on the volume."""
    save_tiny_model(container.at("/data/models/tiny"))
    document = container.at("/data/documents/book.txt")
    document.parent.mkdir()
    document.write_text(TEXT)


def read_answers(container: Container) -> list[dict[str, Any]]:
    """The answers file, one object a line."""
    lines = container.at("/data/answers/book.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def stamp(container: Container) -> dict[Path, int]:
    """When each file of the stored document was written."""
    folder = container.at("/data/store/book")
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.timeout(300)
def test_it_answers_every_question_and_a_second_run_ingests_nothing(tmp_path: Path) -> None:
    pod, resources = find_worker(JOB), built(JOB)
    variables = environment(pod.containers[0], resources)
    assert set(ON_CPU) <= set(variables)
    container = prepare(pod, resources, tmp_path / "root", changed=ON_CPU)
    bring_data(container)

    first = container.run()
    assert first.returncode == 0, first.stderr
    questions = container.at(variables["JOB_QUESTIONS"]).read_text().splitlines()
    answers = read_answers(container)
    assert [answer["question"] for answer in answers] == questions
    assert {answer["document"]["name"] for answer in answers} == {"book"}
    assert all(answer["usage"]["completion_tokens"] > 0 for answer in answers)
    assert variables["JOB_MESH"] in {answer["stack"]["mesh"] for answer in answers}
    stored = stamp(container)
    assert stored

    second = container.run()
    assert second.returncode == 0, second.stderr
    assert "already ingested" in second.stdout
    assert stamp(container) == stored
    again = read_answers(container)
    for key in ("answer", "document", "evidence"):
        assert [answer[key] for answer in again] == [answer[key] for answer in answers]
    assert container.changed_elsewhere() == {}

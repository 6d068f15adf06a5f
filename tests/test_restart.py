"""A document outlives its process and its source: another process answers with the same bits."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.bars import a7
from benchmarks.faults import trace_answer
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from orchestrator.types import Mode
from tests.tiny_model import QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

NAME = "boxes"
MODES: tuple[Mode, ...] = ("exact", "centroid")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_a_new_process_answers_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    source, store = tmp_path / "boxes.txt", tmp_path / "store"
    source.write_text(TEXT)
    with Engine.load(str(model), store=store, threads=1) as engine:
        options = IngestOptions(segment_tokens=SEGMENT_TOKENS)
        report = engine.ingest(source, name=NAME, options=options)
        source.unlink()
        here = [
            trace_answer(engine, NAME, faults.QUESTION, mode=mode, num_tokens=16) for mode in MODES
        ]
    options_of_child = ("--model", str(model), "--threads", "1", "--num-tokens", "16")
    there = faults.run_child("trace", str(store), NAME, *MODES, *options_of_child)
    for old, new in zip(here, there, strict=True):
        assert new["mode"] == old.mode
        assert new["document_hash"] == old.document_hash == report.document_hash
        assert new["logits_sha256"] == old.logits_sha256
        assert new["tokens"] == old.tokens
        assert len(old.tokens) == 16
        assert new["open_s"] > 0
    assert here[0].logits_sha256 != here[1].logits_sha256


def test_a_trace_is_of_the_first_steps_logits(model: Path, tmp_path: Path) -> None:
    with Engine.load(str(model), store=tmp_path, threads=1) as engine:
        engine.ingest(text=TEXT, name=NAME)
        short, long = (
            trace_answer(engine, NAME, QUESTION, mode="exact", num_tokens=num_tokens)
            for num_tokens in (1, 5)
        )
        other = trace_answer(engine, NAME, QUESTION + "?", mode="exact", num_tokens=1)
    assert short.logits_sha256 == long.logits_sha256 != other.logits_sha256
    assert len(short.logits_sha256) == len(hashlib.sha256().hexdigest())
    assert short.tokens == long.tokens[:1]


REPORT = {"num_tokens": 6500, "document_hash": "0"}
MODE = {"mode": "exact", "logits_sha256": "a", "tokens": [1] * 64, "open_s": 0.4}


def test_row_a7_holds_when_all_is_the_same() -> None:
    assert a7.compare(REPORT, [MODE], [MODE])[1]


@pytest.mark.parametrize(
    "change",
    [{"logits_sha256": "b"}, {"tokens": [2] * 64}, {"tokens": [1] * 63}, {"open_s": 0.6}],
)
def test_row_a7_falls_with_any_difference(change: dict[str, object]) -> None:
    assert not a7.compare(REPORT, [MODE], [{**MODE, **change}])[1]
    assert not a7.compare({**REPORT, "num_tokens": 5999}, [MODE], [MODE])[1]

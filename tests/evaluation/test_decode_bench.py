"""Decode steps of several questions: what is counted; times are not looked at."""

from __future__ import annotations

import pytest

from orchestrator.evaluation import decode_bench
from orchestrator.evaluation.decode_bench import measure_decode
from orchestrator.model.load import load_model
from sparse_attn.api import find_backend
from tests.tiny_model import save_tiny_model


def test_several_questions_read_the_weights_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_bench, "measure_read_bandwidth", lambda device: 1e9)
    model = load_model(str(save_tiny_model(tmp_path_factory.mktemp("model"))))
    one, several = (
        measure_decode(
            model,
            find_backend("native"),
            num_tokens=400,
            segment_tokens=256,
            modes=("exact", "centroid"),
            budget="120",
            repeats=2,
            num_questions=num_questions,
            num_documents=num_documents,
        )
        for num_questions, num_documents in ((1, 1), (3, 2))
    )
    weights = model.decoder.num_bytes
    assert one[0].step_bytes > weights
    assert several[0].step_bytes - weights == pytest.approx(
        3 * (one[0].step_bytes - weights), abs=3
    )
    for timing in several:
        assert (timing.num_questions, timing.num_documents) == (3, 2)
        assert timing.tokens_per_s == 3 / timing.median_s
        assert timing.limit_s == timing.step_bytes / 1e9
    assert several[1].step_bytes < several[0].step_bytes

"""One stored document under many meshes: the same logits as one rank's, bit for bit where DESIGN
section 5 promises it, and every rank with its share of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from orchestrator.types import AskOptions
from orchestrator.worker import Worker
from tests.mesh import LONG_TEXT, SEGMENT_TOKENS, run_mesh, save_long_model

QUESTION = "How many jars are on shelf 9?"
NAME = "shelves"
NUM_ANSWER = 5
SAME_BITS = ("1x2", "1x4", "1x8")
CLOSE = ("1x3", "2x1", "2x2")
MODES: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "window": {"mode": "window"},
    "keys": {"mode": "centroid", "budget": "12.5%"},
    "mass": {"mode": "centroid", "mass": 0.9},
    "two levels": {"mode": "centroid", "budget": "12.5%", "levels": 2},
}


class Case:
    """A model and a document that one rank ingested."""

    def __init__(self, root: Path, architecture: str) -> None:
        self.model, self.store = save_long_model(root / "model", architecture), root / "store"
        run_mesh("1x1", self.model, self.store, ingest(NAME))
        self._one_rank: dict[tuple[str, str], Tensor] = {}

    def one_rank(self, mode: str, backend: str) -> Tensor:
        key = mode, backend
        if key not in self._one_rank:
            self._one_rank[key] = self.logits("1x1", mode, backend)
        return self._one_rank[key]

    def logits(self, mesh: str, mode: str, backend: str = "native") -> Tensor:
        options = AskOptions(**MODES[mode])
        return run_mesh(
            mesh, self.model, self.store, trace(NAME, options), look=check_share, backend=backend
        )


def ingest(name: str, **options: Any) -> Callable[[Engine], str]:
    def work(engine: Engine) -> str:
        chosen = IngestOptions(segment_tokens=SEGMENT_TOKENS, chunk_tokens=128, **options)
        return engine.ingest(text=LONG_TEXT, name=name, options=chosen).document_hash

    return work


def trace(name: str, options: AskOptions) -> Callable[[Engine], Tensor]:
    """Logits of the question and of the first answer tokens."""

    def work(engine: Engine) -> Tensor:
        rows = []
        with engine.begin(name, QUESTION, options, num_answer_tokens=NUM_ANSWER) as session:
            rows.append(session.forward(session.question_ids))
            for _ in range(NUM_ANSWER - 1):
                rows.append(session.forward([int(rows[-1].argmax())]))
        return torch.stack(rows)

    return work


def check_share(worker: Worker) -> None:
    """Every rank holds two segments or more of each KV head that it serves (one on eight ranks)."""
    least = 2 if worker.place.context.size < 8 else 1
    for held in worker.documents.values():
        holding = held.context.resident.holding
        assert holding.layout.num_segments >= 6
        assert all(len(segments) >= least for segments in holding.segments)


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen3-five-a-group"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mesh", SAME_BITS)
def test_the_bits_do_not_depend_on_the_context_axis(case: Case, mesh: str, mode: str) -> None:
    assert torch.equal(case.logits(mesh, mode), case.one_rank(mode, "native"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mesh", CLOSE)
def test_other_meshes_agree_closely(case: Case, mesh: str, mode: str) -> None:
    ours, theirs = case.logits(mesh, mode), case.one_rank(mode, "native")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert torch.equal(ours.argmax(dim=1), theirs.argmax(dim=1))


@pytest.mark.parametrize("mode", ["exact", "keys", "two levels"])
def test_the_torch_backend_keeps_the_promise_too(case: Case, mode: str) -> None:
    assert torch.equal(case.logits("1x4", mode, "torch"), case.one_rank(mode, "torch"))


@pytest.mark.parametrize("mesh", ["1x2", "1x3", "2x1", "2x2"])
@pytest.mark.parametrize("split_tokens", [None, 50])
def test_a_document_of_any_mesh_opens_under_any_other(
    case: Case, mesh: str, split_tokens: int | None
) -> None:
    name = f"of-{mesh}-{split_tokens}"
    made = run_mesh(mesh, case.model, case.store, ingest(name, split_tokens=split_tokens))
    again = run_mesh("1x1", case.model, case.store, lambda engine: engine.docs())
    assert made in {info.document_hash for info in again}
    for other in ("1x1", "1x2"):
        got = run_mesh(other, case.model, case.store, trace(name, AskOptions(mode="exact")))
        torch.testing.assert_close(got, case.one_rank("exact", "native"), atol=1e-4, rtol=0)


def test_a_document_in_fp8_keeps_every_promise(case: Case) -> None:
    """The same bits under any mesh, of documents that one rank and two ranks ingested."""
    modes = ("exact", "two levels")
    for made_by in ("1x1", "1x2"):
        name = f"fp8-of-{made_by}"
        run_mesh(made_by, case.model, case.store, ingest(name, kv_dtype="fp8"))
        for mode in modes:
            work = trace(name, AskOptions(**MODES[mode]))
            one, four = (run_mesh(mesh, case.model, case.store, work) for mesh in ("1x1", "1x4"))
            assert torch.equal(one, four)
            assert not torch.equal(one, case.one_rank(mode, "native"))  # other bytes were read


def test_an_ingest_that_stopped_goes_on_under_its_mesh_with_the_same_bits(
    case: Case, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(engine: Engine) -> None:
        def raise_late(progress: Any) -> None:
            if progress.done_tokens > 3 * SEGMENT_TOKENS:
                raise Stopped

        options = IngestOptions(segment_tokens=SEGMENT_TOKENS, chunk_tokens=128)
        with pytest.raises(Stopped):
            engine.ingest(text=LONG_TEXT, name="cut", options=options, on_progress=raise_late)

    store = tmp_path / "store"
    run_mesh("1x2", case.model, store, stop)
    resumed = run_mesh("1x2", case.model, store, ingest("cut"))
    assert resumed == run_mesh("1x2", case.model, store, ingest("whole"))


def test_answers_evidence_and_accounts_are_those_of_one_rank(case: Case) -> None:
    def ask(engine: Engine) -> Any:
        return engine.ask(NAME, QUESTION, mode="centroid", max_tokens=6, audit=True)

    one, four = (run_mesh(mesh, case.model, case.store, ask) for mesh in ("1x1", "2x2"))
    assert four.text == one.text
    assert [span.text for span in four.evidence] == [span.text for span in one.evidence]
    for ours, theirs in zip(four.evidence, one.evidence, strict=True):
        assert ours.score == pytest.approx(theirs.score, rel=1e-4)
    assert four.usage.completion_tokens == one.usage.completion_tokens
    assert four.usage.attended_keys_mean == pytest.approx(one.usage.attended_keys_mean, rel=0.01)
    assert one.recall.audit is not None
    assert four.recall.audit.mass_mean == pytest.approx(one.recall.audit.mass_mean, abs=1e-5)
    assert four.recall.audit.bound_violations == one.recall.audit.bound_violations == 0
    low, high = four.recall.ci95
    assert low - 0.02 <= one.recall.audit.mass_mean <= high + 0.02
    assert four.stack["mesh"] == "2x2"

"""The embedded API on a tiny model: ingest once, ask in every mode, go on after a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kv_store import DocumentExists, DocumentNotFound
from orchestrator.engine import Engine
from orchestrator.errors import ContextTooLong, InputError, ModelMismatch, UsageError
from orchestrator.ingest import IngestOptions, IngestReport, Progress
from orchestrator.types import MODES, Answer, Mode
from tests.tiny_model import MAX_CONTEXT_TOKENS, QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

OPTIONS = IngestOptions(segment_tokens=SEGMENT_TOKENS)
NAME = "boxes"
FRAME_TOKENS = len("<user\n")  # the template's header; its special token is one token


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One ingested document; gemma3 has sliding-window layers beside the full ones."""
    root = tmp_path_factory.mktemp(request.param)
    path = save_tiny_model(root / "model", request.param)
    engine = Engine.load(str(path), store=root / "store", threads=1)
    engine.ingest(text=TEXT, name=NAME, options=OPTIONS)
    return engine


@pytest.fixture
def empty(model: Path, tmp_path: Path) -> Iterator[Engine]:
    """An engine whose store holds nothing yet."""
    with Engine.load(str(model), store=tmp_path / "store", threads=1) as engine:
        yield engine


def ask(engine: Engine, mode: Mode = "centroid", **options: Any) -> Answer:
    return engine.ask(NAME, QUESTION, **{"mode": mode, "max_tokens": 8, **options})


@pytest.mark.parametrize("mode", ["exact", "window", "centroid"])
def test_every_mode_answers_and_accounts_for_it(engine: Engine, mode: Mode) -> None:
    answer = ask(engine, mode)
    usage, num_document = answer.usage, FRAME_TOKENS + len(TEXT)
    assert usage.cached_tokens == num_document
    assert usage.prompt_tokens == num_document + usage.question_tokens
    assert 1 <= usage.completion_tokens <= 8
    assert usage.attended_keys_mean <= usage.attended_keys_max <= usage.prompt_tokens + 8
    assert answer.selection.mode == answer.selection.requested == mode
    assert answer.document_hash == engine.docs()[0].document_hash
    assert 0.0 < answer.recall.mass_mean <= 1.0
    assert answer.timing.total_s >= answer.timing.ttft_s > 0


def test_the_modes_differ_in_what_they_read(engine: Engine) -> None:
    exact, window, centroid = (ask(engine, mode) for mode in ("exact", "window", "centroid"))
    assert exact.recall.mass_mean == 1.0
    assert exact.recall.ci95 == (1.0, 1.0)
    assert window.recall.mass_mean < centroid.recall.mass_mean < 1.0
    assert window.usage.bytes_read < centroid.usage.bytes_read < exact.usage.bytes_read
    assert exact.selection.budget_keys == exact.usage.cached_tokens
    assert window.selection.budget_keys == 4 + 64


def test_auto_is_resolved_and_says_why(engine: Engine) -> None:
    small = ask(engine, "auto")
    assert (small.selection.requested, small.selection.mode) == ("auto", "exact")
    assert str(small.usage.cached_tokens) in small.selection.reason
    assert small.text == ask(engine, "exact").text


def test_everything_opened_is_exact_flat_and_in_two_levels(engine: Engine) -> None:
    def loss(mode: Mode, **options: Any) -> float:
        return engine.score(NAME, QUESTION, "twelve marbles", mode=mode, **options).nll_per_token

    exact = loss("exact")
    flat, two_level = (loss("centroid", budget="100%", levels=levels) for levels in (1, 2))
    assert flat == pytest.approx(exact, abs=1e-5)
    assert two_level == pytest.approx(flat, abs=1e-5)
    assert abs(loss("window") - exact) > 1e-3


def test_mass_instead_of_a_budget(engine: Engine) -> None:
    little, much = (ask(engine, mass=mass) for mass in (0.5, 0.95))
    assert little.selection.mass == 0.5
    assert little.selection.budget_keys is None
    assert little.usage.attended_keys_mean < much.usage.attended_keys_mean
    assert little.recall.mass_mean < much.recall.mass_mean


def test_an_audit_measures_the_recall_and_changes_no_answer(engine: Engine) -> None:
    plain, audited = ask(engine), ask(engine, audit=True)
    assert plain.recall.audit is None
    assert audited.recall.audit is not None
    assert audited.text == plain.text
    assert audited.recall.audit.mass_mean == pytest.approx(audited.recall.mass_mean, abs=0.1)
    assert audited.stack["hash"] == plain.stack["hash"]


def test_evidence_lies_in_the_document(engine: Engine) -> None:
    answer = ask(engine)
    assert answer.evidence
    for span in answer.evidence:
        assert TEXT[span.start_char : span.end_char] == span.text
        assert 0.0 < span.score <= 1.0
    assert engine.text(NAME) == TEXT


def test_a_stream_is_the_answer_piece_by_piece(engine: Engine) -> None:
    pieces: list[str] = []
    answer = ask(engine, max_tokens=24, on_token=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces).strip() == answer.text


def test_the_same_question_has_the_same_answer(engine: Engine) -> None:
    assert ask(engine, max_tokens=24).text == ask(engine, max_tokens=24).text
    engine.release(NAME)
    reopened = ask(engine, max_tokens=24)
    assert reopened.timing.open_s > 0
    assert reopened.text == ask(engine, max_tokens=24).text


def test_temperature_follows_the_seed(engine: Engine) -> None:
    def draw(seed: int) -> str:
        return ask(engine, "exact", max_tokens=24, temperature=1.5, seed=seed).text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    narrow = ask(engine, "exact", max_tokens=24, temperature=1.5, top_p=1e-9, seed=3)
    assert narrow.text == ask(engine, "exact", max_tokens=24).text


def test_a_system_text_goes_before_the_question(engine: Engine) -> None:
    plain, told = ask(engine), ask(engine, system="Be brief.")
    assert told.usage.question_tokens == plain.usage.question_tokens + len("Be brief.\n")


def test_a_fresh_process_would_open_what_was_written(empty: Engine) -> None:
    report = empty.ingest(text=TEXT, name=NAME, options=OPTIONS)
    again = empty.ingest(text=TEXT, name=NAME, options=OPTIONS)
    assert not report.was_complete
    assert report.computed_tokens == report.num_tokens
    assert again.was_complete
    assert again.computed_tokens == 0
    assert again.document_hash == report.document_hash


def test_progress_is_told_after_each_chunk(empty: Engine) -> None:
    seen: list[Progress] = []
    options = IngestOptions(segment_tokens=SEGMENT_TOKENS, chunk_tokens=100)
    report = empty.ingest(text=TEXT, name=NAME, options=options, on_progress=seen.append)
    done = [progress.done_tokens for progress in seen]
    assert done[:3] == [100, 200, 256]
    assert done[-1] == report.num_tokens
    assert seen[-1].eta_s == 0.0
    assert all(progress.tokens_per_s > 0 for progress in seen)


class Stopped(Exception):
    """Ends an ingest in the middle."""


def stop_at(num_tokens: int) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        if progress.done_tokens >= num_tokens:
            raise Stopped

    return show


@pytest.mark.parametrize("num_tokens", [1, 300, 600, 1240])
@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_a_stopped_ingest_goes_on_with_the_same_bits(
    case: str, num_tokens: int, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", case)

    def ingest(name: str, stop: int = 10**9) -> IngestReport:
        engine = Engine.load(str(model), store=tmp_path / "store", threads=1)
        return engine.ingest(text=TEXT, name=name, options=OPTIONS, on_progress=stop_at(stop))

    wanted = ingest("undisturbed")
    with pytest.raises(Stopped):
        ingest(NAME, min(num_tokens, wanted.num_tokens))
    resumed = ingest(NAME)
    sealed = (min(num_tokens, wanted.num_tokens) - 1) // SEGMENT_TOKENS * SEGMENT_TOKENS
    assert resumed.document_hash == wanted.document_hash
    assert resumed.computed_tokens == wanted.num_tokens - sealed


def test_other_chunks_give_the_same_answer(empty: Engine) -> None:
    for name, chunk_tokens in (("whole", 256), ("pieces", 100)):
        options = IngestOptions(segment_tokens=SEGMENT_TOKENS, chunk_tokens=chunk_tokens)
        empty.ingest(text=TEXT, name=name, options=options)
    whole, pieces = (
        empty.score(name, QUESTION, "twelve", mode="exact") for name in ("whole", "pieces")
    )
    assert whole.nll_per_token == pytest.approx(pieces.nll_per_token, abs=1e-4)


def test_one_segment_holds_a_short_document(empty: Engine) -> None:
    empty.ingest(text="Box 1 holds 9 marbles.", name=NAME)
    for mode in MODES:
        answer = ask(empty, mode)
        assert answer.usage.cached_tokens == FRAME_TOKENS + 22
        assert answer.recall.mass_mean == 1.0
        assert answer.selection.mode == "exact"
        assert answer.evidence == ()


@pytest.mark.parametrize("num_chars", [62, 63, 64, 80, 249, 250, 251, 320])
def test_odd_lengths_answer_in_every_mode(empty: Engine, num_chars: int) -> None:
    empty.ingest(text=TEXT[:num_chars], name=NAME, options=OPTIONS)
    for mode in MODES:
        answer = ask(empty, mode, audit=True)
        assert answer.usage.cached_tokens == FRAME_TOKENS + num_chars
        assert (answer.recall.audit is None) == (answer.selection.mode == "exact")
    full = ask(empty, budget="100%")
    assert full.recall.mass_mean == pytest.approx(1.0)
    assert full.text == ask(empty, "exact").text


def test_a_document_without_clusters_answers_exactly_or_not_at_all(empty: Engine) -> None:
    plain = IngestOptions(segment_tokens=SEGMENT_TOKENS, clusters=None)
    empty.ingest(text=TEXT, name=NAME, options=plain)
    assert ask(empty, "auto").selection.mode == "exact"
    with pytest.raises(UsageError, match="ingested without; ask in mode exact"):
        ask(empty, "centroid")


def test_other_text_needs_replace(empty: Engine) -> None:
    first = empty.ingest(text=TEXT, name=NAME, options=OPTIONS)
    with pytest.raises(DocumentExists, match="--replace"):
        empty.ingest(text=TEXT + "More.", name=NAME, options=OPTIONS)
    ask(empty)
    replacing = IngestOptions(segment_tokens=SEGMENT_TOKENS, replace=True)
    second = empty.ingest(text=TEXT + "More.", name=NAME, options=replacing)
    assert second.document_hash != first.document_hash
    assert ask(empty).document_hash == second.document_hash


def test_a_file_is_read_and_named_after_itself(empty: Engine, tmp_path: Path) -> None:
    source = tmp_path / "boxes.md"
    source.write_text(TEXT)
    assert empty.ingest(source, options=OPTIONS).name == "boxes"
    source.unlink()
    assert ask(empty).document_name == "boxes"
    empty.remove("boxes")
    assert empty.docs() == []
    with pytest.raises(DocumentNotFound):
        ask(empty)


def test_what_another_model_ingested_is_refused(empty: Engine, tmp_path: Path) -> None:
    empty.ingest(text=TEXT, name=NAME, options=OPTIONS)
    model = save_tiny_model(tmp_path / "model", "qwen3-five-a-group")
    with Engine.load(str(model), store=empty.store.root, threads=1) as other:
        with pytest.raises(ModelMismatch, match="ask with --model"):
            other.ask(NAME, QUESTION)
        # Its lock is given back: nothing keeps the document from going.
        empty.remove(NAME)


def test_what_does_not_fit_is_refused_before_anything_is_written(empty: Engine) -> None:
    with pytest.raises(ContextTooLong, match=str(MAX_CONTEXT_TOKENS)):
        empty.ingest(text="x" * MAX_CONTEXT_TOKENS, name=NAME)
    assert not empty.store.root.exists()
    empty.ingest(text=TEXT, name=NAME, options=OPTIONS)
    with pytest.raises(ContextTooLong, match="lower --max-tokens"):
        ask(empty, max_tokens=MAX_CONTEXT_TOKENS)


def test_a_source_and_a_name_are_needed(empty: Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exactly one of them"):
        empty.ingest()
    with pytest.raises(UsageError, match="exactly one of them"):
        empty.ingest(tmp_path / "a.txt", text=TEXT)
    with pytest.raises(UsageError, match="no name"):
        empty.ingest(text=TEXT)
    with pytest.raises(InputError, match="does not exist"):
        empty.ingest(tmp_path / "a.txt")

"""Evidence follows attention mass and offsets, and receives nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestrator.evidence import find_evidence, sentence_spans

TOKENS_A_SENTENCE = 10
TOKEN_CHARS = 4


def make_offsets(num_sentences: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Spans of tokens of `TOKEN_CHARS` and of sentences of `TOKENS_A_SENTENCE`, nothing between."""
    num_tokens = num_sentences * TOKENS_A_SENTENCE
    stops = range(TOKEN_CHARS, (num_tokens + 1) * TOKEN_CHARS, TOKEN_CHARS)
    tokens = [(stop - TOKEN_CHARS, stop) for stop in stops]
    chars = TOKENS_A_SENTENCE * TOKEN_CHARS
    return tokens, [(idx * chars, (idx + 1) * chars) for idx in range(num_sentences)]


def make_mass(num_sentences: int, level: float = 0.01) -> NDArray[np.float64]:
    """Mass [N] that is the same everywhere."""
    return np.full(num_sentences * TOKENS_A_SENTENCE, level)


def test_it_receives_mass_and_offsets_alone() -> None:
    parameters = inspect.signature(find_evidence).parameters
    hints = get_type_hints(find_evidence)
    offsets = Sequence[tuple[int, int]]
    assert {name: hints[name] for name in parameters} == {
        "token_mass": NDArray[np.float64],
        "token_spans": offsets,
        "sentences": offsets,
        "max_spans": int,
    }
    # It closes over nothing and has no defaults: no text can reach it by another way.
    assert inspect.getclosurevars(find_evidence).nonlocals == {}
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters.values())


def test_mass_alone_decides() -> None:
    tokens, sentences = make_offsets(6)
    for heavy in range(6):
        mass = make_mass(6)
        mass[heavy * TOKENS_A_SENTENCE : (heavy + 1) * TOKENS_A_SENTENCE] = 0.05
        found = find_evidence(mass, tokens, sentences, max_spans=3)
        assert found[0][:2] == sentences[heavy]
        assert found[0][2] == pytest.approx(0.5)
        assert len(found) == 3


def test_moved_offsets_move_the_spans_and_nothing_else() -> None:
    tokens, sentences = make_offsets(5)
    mass = np.random.default_rng(0).uniform(0.5, 1.0, 5 * TOKENS_A_SENTENCE)
    here = find_evidence(mass, tokens, sentences, max_spans=5)
    there = find_evidence(
        mass,
        [(start + 1000, stop + 1000) for start, stop in tokens],
        [(start + 1000, stop + 1000) for start, stop in sentences],
        max_spans=5,
    )
    assert [(start + 1000, stop + 1000, share) for start, stop, share in here] == there


def test_frame_and_steady_zone_are_left_out() -> None:
    tokens, sentences = make_offsets(4)
    mass = make_mass(4)
    mass[:TOKENS_A_SENTENCE] = 5.0
    tokens[:TOKENS_A_SENTENCE] = [(-1, -1)] * TOKENS_A_SENTENCE
    found = find_evidence(mass, tokens, sentences, max_spans=4)
    assert [span[:2] for span in found] == sentences[1:]
    assert sum(share for *_, share in found) == pytest.approx(1.0)


def test_a_sink_is_no_evidence_and_a_run_is() -> None:
    tokens, sentences = make_offsets(5)
    mass = make_mass(5)
    mass[1 * TOKENS_A_SENTENCE + 4] = 3.0
    mass[3 * TOKENS_A_SENTENCE + 2 : 3 * TOKENS_A_SENTENCE + 8] = 0.2
    found = find_evidence(mass, tokens, sentences, max_spans=5)
    assert found[0][:2] == sentences[3]
    by_span = {span[:2]: span[2] for span in found}
    # Without its sink the sentence has nine tokens of the common level.
    total = mass.sum() - 3.0
    assert by_span[sentences[1]] == pytest.approx(0.09 / total)


def test_mass_in_lone_tokens_alone_still_counts() -> None:
    tokens, sentences = make_offsets(3)
    mass = make_mass(3, level=0.0)
    mass[15] = 2.0
    assert find_evidence(mass, tokens, sentences, max_spans=3) == [(*sentences[1], 1.0)]


def test_no_mass_is_no_evidence() -> None:
    tokens, sentences = make_offsets(2)
    assert find_evidence(make_mass(2, level=0.0), tokens, sentences, max_spans=3) == []
    assert find_evidence(make_mass(2), tokens, [], max_spans=3) == []
    nowhere = [(-1, -1)] * len(tokens)
    assert find_evidence(make_mass(2), nowhere, sentences, max_spans=3) == []


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("wrapped in\nthe middle. Next", ["wrapped in\nthe middle.", "Next"]),
        ("Title\n\nBody one.\nBody two.", ["Title", "Body one.", "Body two."]),
        ("a\n \t\nb", ["a", "b"]),
        ('He said "go." She went (in.) And out.', ['He said "go."', "She went (in.)", "And out."]),
        ("It is 3.14 of them.", ["It is 3.14 of them."]),
        ("  padded.  \n", ["padded."]),
        ("", []),
        (" \n\n ", []),
    ],
)
def test_sentences_end_at_marks_and_blank_lines(text: str, pieces: list[str]) -> None:
    assert [text[start:stop] for start, stop in sentence_spans(text)] == pieces


@given(st.text(alphabet="ab.!? \n\"')", max_size=60))
def test_sentences_are_disjoint_and_hold_all_but_white_space(text: str) -> None:
    spans = sentence_spans(text)
    kept = [False] * len(text)
    for start, stop in spans:
        assert 0 <= start < stop <= len(text)
        assert text[start:stop] == text[start:stop].strip()
        assert not any(kept[start:stop])
        kept[start:stop] = [True] * (stop - start)
    assert spans == sorted(spans)
    assert all(is_kept or char.isspace() for is_kept, char in zip(kept, text, strict=True))

"""Every document holds its needle once, where it says, and follows from its seed."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.evaluation import haystacks
from orchestrator.evaluation.haystacks import (
    HAYSTACKS,
    Haystack,
    NiahCase,
    build_case,
    build_cases,
    draw_keys,
    needle_sentence,
    reference_paragraphs,
)
from orchestrator.evaluation.words import ADJECTIVES, NOUNS


def count_words(text: str) -> int:
    """A tokenizer's stand-in: words, and every digit on its own."""
    return len(re.findall(r"\d|[^\W\d]+|[^\w\s]", text))


def make_case(
    haystack: Haystack, *, length_tokens: int = 600, depth: float = 0.5, seed: int = 1
) -> NiahCase:
    """A case counted by `count_words`."""
    return build_case(
        haystack=haystack,
        length_tokens=length_tokens,
        depth=depth,
        seed=seed,
        count_tokens=count_words,
    )


@pytest.mark.parametrize("haystack", HAYSTACKS)
@example(depth=0.0, length_tokens=851, seed=871)
@given(
    depth=st.floats(min_value=0, max_value=1),
    length_tokens=st.integers(min_value=250, max_value=1500),
    seed=st.integers(min_value=0, max_value=10_000),
)
def test_needle_stands_once_where_it_should(
    haystack: Haystack, depth: float, length_tokens: int, seed: int
) -> None:
    case = make_case(haystack, length_tokens=length_tokens, depth=depth, seed=seed)
    key = case.question.removeprefix("What is the special magic number for ").split()[0]
    assert case.needle == needle_sentence(key, case.answer)
    assert case.document.count(case.answer) == 1
    assert case.document.count(f"numbers for {key} is") == 1
    assert case.answer not in case.question + case.answer_prefix
    assert key in case.answer_prefix
    assert case.length_tokens == count_words(case.document) <= length_tokens
    assert case.length_tokens > length_tokens - 160
    assert abs(case.needle_start_char / len(case.document) - depth) < 0.35


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_depth_moves_the_needle_and_nothing_else(haystack: Haystack) -> None:
    first, last = (make_case(haystack, depth=depth) for depth in (0.0, 1.0))
    assert first.document.startswith(first.needle)
    assert last.document.endswith(last.needle)
    assert first.needle == last.needle


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_a_seed_is_the_whole_document(haystack: Haystack) -> None:
    assert make_case(haystack) == make_case(haystack)
    other = make_case(haystack, seed=2)
    assert other.answer != make_case(haystack).answer
    assert other.document != make_case(haystack).document


def test_lookalikes_differ_in_key_and_number() -> None:
    case = make_case("lookalike", length_tokens=4000)
    found = re.findall(r"numbers for (\S+) is: (\d+)\.", case.document)
    assert len(found) > 150
    assert len({key for key, _ in found}) == len({number for _, number in found}) == len(found)
    assert {len(number) for _, number in found} == {7}
    assert re.sub(r"One of the special magic numbers for \S+ is: \d+\. ?", "", case.document) == ""


def test_no_lookalike_has_the_answer_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haystacks, "NUMBER_RANGE", range(1_000_000, 1_000_300))
    for seed in range(10):
        case = make_case("lookalike", length_tokens=2000, seed=seed)
        numbers = re.findall(r"is: (\d+)\.", case.document)
        assert len(set(numbers)) == len(numbers) > 70
        assert numbers.count(case.answer) == 1


def test_keys_never_repeat_even_past_the_pairs() -> None:
    num_pairs = len(ADJECTIVES) * len(NOUNS)
    keys = list(islice(draw_keys(Random(0)), num_pairs + 1000))
    assert len(set(keys)) == len(keys) == num_pairs + 1000
    assert {key.count("-") for key in keys[:num_pairs]} == {1}
    assert {key.count("-") for key in keys[num_pairs:]} == {2}


def test_reference_is_plain_prose_and_code() -> None:
    paragraphs = reference_paragraphs()
    text = "\n\n".join(paragraphs)
    assert sum(map(len, paragraphs)) > 200_000
    assert not re.search(r"^\s*([*=~^]{3,}|\+--|\|)", text, re.MULTILINE)
    assert any("generator" in paragraph for paragraph in paragraphs)
    # Prose is unwrapped and code is not.
    assert any(len(line) > 300 for line in text.splitlines())
    assert any("\n   " in paragraph for paragraph in paragraphs)


def test_grid_has_a_case_a_cell_with_its_own_seed() -> None:
    cases = list(
        build_cases(
            lengths_tokens=(300, 500), depths=(0.1, 0.5, 0.9), count_tokens=count_words, seed=3
        )
    )
    assert len(cases) == len(HAYSTACKS) * 2 * 3
    assert len({case.seed for case in cases}) == len(cases)
    assert len({case.answer for case in cases}) == len(cases)
    cells = {(case.haystack, case.length_tokens > 300, case.depth) for case in cases}
    assert len(cells) == len(cases)


@pytest.mark.parametrize("depth", [-0.1, 1.1, float("nan")])
def test_depth_outside_the_document_is_refused(depth: float) -> None:
    with pytest.raises(ValueError, match="limit 0 to 1"):
        make_case("filler", depth=depth)


def test_too_short_a_document_is_refused() -> None:
    with pytest.raises(ValueError, match="length 10 tokens"):
        make_case("filler", length_tokens=10)


def test_unknown_haystack_is_refused() -> None:
    with pytest.raises(ValueError, match="'hay'"):
        make_case("hay")  # type: ignore[arg-type]

"""The demo's document: real, of the promised length, with each fact once and at its depth."""

from __future__ import annotations

from examples.demo import FACTS, QUESTIONS, build_document


def count_words(text: str) -> int:
    """Stands in for a tokenizer."""
    return len(text.split())


def test_document_holds_every_fact_once_at_its_depth() -> None:
    text = build_document(count_words, num_tokens=2000)
    assert 1800 <= count_words(text) <= 2050
    for depth, fact in FACTS:
        assert text.count(fact) == 1
        assert abs(text.index(fact) / len(text) - depth) < 0.1


def test_every_fact_is_asked_for_and_answers_its_question() -> None:
    for _, fact in FACTS:
        assert [gold for _, gold in QUESTIONS if gold in fact]
    text = build_document(count_words, num_tokens=2000)
    for _, fact in FACTS:
        text = text.replace(fact, "")
    invented = QUESTIONS[: len(FACTS)]
    assert not [gold for _, gold in invented if gold in text]

"""Documents in which one planted fact, the needle, has to be found.

Owns three haystacks and the placing of a needle in them; everything follows from a seed. Refuses to
know models, tokenizers and engines: how long a text is in tokens is asked of the caller.

Needle and question have the form of RULER's single- and multi-key tasks (Hsieh et al., 2024); the
words, the filler and the code are this project's own.

    filler      a handful of everyday sentences, over and over
    reference   Python's language reference, as every interpreter carries it (pydoc_data.topics)
    lookalike   nothing but sentences of the needle's form, with other keys and numbers
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Literal, get_args

from orchestrator.evaluation.words import ADJECTIVES, NOUNS

Haystack = Literal["filler", "reference", "lookalike"]
HAYSTACKS: tuple[Haystack, ...] = get_args(Haystack)

FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is warm.",
    "A bird sings in the tree.",
    "The road leads on and the day goes by.",
)
NUMBER_RANGE = range(1_000_000, 10_000_000)
# A paragraph of reference text is cut, at sentences or lines, once it is longer than this.
PARAGRAPH_CHARS = 240

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahCase:
    """One document with its needle; characters count from 0, `needle_end_char` is exclusive.

    `answer` is the number; `answer_prefix` is a sentence that wants nothing but it, for scoring.
    `length_tokens` is what `count_tokens` said of the document, at most the length asked for;
    `depth` is the share of the haystack that stands before the needle, as asked for.
    """

    document: str
    question: str
    answer: str
    answer_prefix: str
    needle_start_char: int
    needle_end_char: int
    haystack: Haystack
    length_tokens: int
    depth: float
    seed: int

    @property
    def needle(self) -> str:
        """The planted sentence."""
        return self.document[self.needle_start_char : self.needle_end_char]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """A sentence or paragraph with the white space that follows it."""

    text: str
    gap: str = " "


def build_case(
    *,
    haystack: Haystack,
    length_tokens: int,
    depth: float,
    seed: int,
    count_tokens: CountTokens,
) -> NiahCase:
    """Longest document of at most `length_tokens` with the needle at `depth` of its units.

    Raises ValueError for a depth outside [0, 1], an unknown haystack, or a length that has no room
    for the needle and one unit beside it.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth {depth}; limit 0 to 1; give the share before the needle")
    if haystack not in HAYSTACKS:
        raise ValueError(f"haystack {haystack!r}; limit {', '.join(HAYSTACKS)}; choose one of them")
    rng = random.Random(f"niah/{haystack}/{seed}")
    keys = draw_keys(rng)
    key, answer = next(keys), str(rng.choice(NUMBER_RANGE))
    needle = _Unit(
        text=needle_sentence(key, answer), gap="\n\n" if haystack == "reference" else " "
    )
    # No token spans more than a few dozen characters, and few tokens hold less than one.
    candidates = list(islice(_units(haystack, rng, keys, answer), length_tokens))
    num_units = _fit(candidates, needle, depth, length_tokens, count_tokens)
    if num_units == 0:
        raise ValueError(
            f"length {length_tokens} tokens; limit room for the needle and one sentence; "
            "ask for a longer document"
        )
    document, start_char = _assemble(candidates[:num_units], needle, depth)
    return NiahCase(
        document=document,
        question=question_about(key),
        answer=answer,
        answer_prefix=f"The special magic number for {key} mentioned in the provided text is",
        needle_start_char=start_char,
        needle_end_char=start_char + len(needle.text),
        haystack=haystack,
        length_tokens=count_tokens(document),
        depth=depth,
        seed=seed,
    )


def build_cases(
    *,
    lengths_tokens: Sequence[int],
    depths: Sequence[float],
    count_tokens: CountTokens,
    haystacks: Sequence[Haystack] = HAYSTACKS,
    seed: int = 0,
) -> Iterator[NiahCase]:
    """One case for each haystack, length and depth, each with a seed of its own."""
    grid = ((h, n, d) for h in haystacks for n in lengths_tokens for d in depths)
    for case_idx, (haystack, length_tokens, depth) in enumerate(grid):
        yield build_case(
            haystack=haystack,
            length_tokens=length_tokens,
            depth=depth,
            seed=seed * 100_003 + case_idx,
            count_tokens=count_tokens,
        )


def needle_sentence(key: str, number: str) -> str:
    """The fact, in the one form that all needles and look-alikes share."""
    return f"One of the special magic numbers for {key} is: {number}."


def question_about(key: str) -> str:
    """The question that the needle of this key answers.

    Its last sentence makes small models stop after the number; they find as much without it.
    """
    return (
        f"What is the special magic number for {key} mentioned in the provided text? "
        "Answer with the number only."
    )


def draw_keys(rng: random.Random) -> Iterator[str]:
    """Distinct keys in random order: adjective-noun, then adjective-adjective-noun without end."""
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    rng.shuffle(pairs)
    yield from pairs
    for prefix in rng.sample(ADJECTIVES, len(ADJECTIVES)):
        yield from (f"{prefix}-{pair}" for pair in pairs)


def reference_paragraphs() -> list[str]:
    """Python's language reference as plain text: no tables, no heading rules, prose unwrapped."""
    from pydoc_data.topics import topics

    raw = [block for name in sorted(topics) for block in topics[name].split("\n\n")]
    return [text for text in map(_clean_block, raw) if text]


def _clean_block(block: str) -> str:
    lines = [line for line in block.splitlines() if not re.fullmatch(r"\s*[*=~^\-]{3,}\s*", line)]
    if any(line.lstrip().startswith(("+-", "|")) for line in lines):
        return ""
    is_prose = bool(lines) and not any(line.startswith("  ") for line in lines)
    if is_prose:
        return re.sub(r"\s+", " ", " ".join(lines)).strip()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _units(
    haystack: Haystack, rng: random.Random, keys: Iterator[str], answer: str
) -> Iterator[_Unit]:
    if haystack == "filler":
        return _filler_units(rng)
    if haystack == "reference":
        return _reference_units(rng)
    return _lookalike_units(rng, keys, answer)


def _filler_units(rng: random.Random) -> Iterator[_Unit]:
    first = rng.randrange(len(FILLER))
    while True:
        yield _Unit(text=FILLER[first % len(FILLER)])
        first += 1


def _reference_units(rng: random.Random) -> Iterator[_Unit]:
    paragraphs = reference_paragraphs()
    first = rng.randrange(len(paragraphs))
    while True:
        yield from _cut_paragraph(paragraphs[first % len(paragraphs)])
        first += 1


def _cut_paragraph(paragraph: str) -> Iterator[_Unit]:
    """Sentences of long prose, lines of a long block, or the whole of what is short."""
    pieces, gap = [paragraph], " "
    if len(paragraph) > PARAGRAPH_CHARS:
        if "\n" in paragraph:
            pieces, gap = paragraph.split("\n"), "\n"
        else:
            pieces = re.split(r"(?<=[.:]) (?=[A-Z])|(?<=;) ", paragraph)
    for piece in pieces[:-1]:
        yield _Unit(text=piece, gap=gap)
    yield _Unit(text=pieces[-1], gap="\n\n")


def _lookalike_units(rng: random.Random, keys: Iterator[str], answer: str) -> Iterator[_Unit]:
    seen = {answer}
    for key in keys:
        number = str(rng.choice(NUMBER_RANGE))
        if number not in seen:
            seen.add(number)
            yield _Unit(text=needle_sentence(key, number))


def _fit(
    candidates: Sequence[_Unit],
    needle: _Unit,
    depth: float,
    length_tokens: int,
    count_tokens: CountTokens,
) -> int:
    """Largest number of units that fits with the needle, by bisection; 0 where none does."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high + 1) // 2
        document, _ = _assemble(candidates[:middle], needle, depth)
        if count_tokens(document) <= length_tokens:
            low = middle
        else:
            high = middle - 1
    return low


def _assemble(units: Sequence[_Unit], needle: _Unit, depth: float) -> tuple[str, int]:
    """Document and first character of the needle, put before the unit nearest to `depth`."""
    ends = list(accumulate((len(unit.text) + len(unit.gap) for unit in units), initial=0))
    place = min(range(len(ends)), key=lambda idx: abs(ends[idx] - depth * ends[-1]))
    before = "".join(unit.text + unit.gap for unit in units[:place])
    after = "".join(unit.text + unit.gap for unit in units[place:])
    if before and not before.endswith(needle.gap):
        before = before.rstrip() + needle.gap
    return (before + needle.text + needle.gap + after).rstrip(), len(before)

"""Where in the document an answer came from, by attention mass and offsets alone.

Owns the step from mass per token to scored spans. It never sees the question, the answer or the
text: sentence boundaries come in as offsets, so evidence cannot be matched to the answer by its
words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

# A sentence ends after . ! ? (and one closing quote or bracket) before white space, or at a blank
# line. A single newline ends nothing: wrapped text has one in the middle of its sentences.
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+|\s*\n[^\S\n]*\n\s*")
# A token is a sink where it holds more than this many times the median of its neighbours, of which
# there are this many on either side. What is read for its content is read as a run of tokens; a
# sink (a frequent word with a huge key norm, anywhere in the text) is attended to alone.
_SINK_RATIO = 8.0
_NEIGHBOURS = 3


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Character spans of the text's sentences, in order, without surrounding white space."""
    pieces, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        pieces.append((start, match.start()))
        start = match.end()
    pieces.append((start, len(text)))
    return [_strip(text, start, stop) for start, stop in pieces if text[start:stop].strip()]


def find_evidence(
    token_mass: NDArray[np.float64],
    token_spans: Sequence[tuple[int, int]],
    sentences: Sequence[tuple[int, int]],
    *,
    max_spans: int,
) -> list[tuple[int, int, float]]:
    """The sentences that hold the largest shares of attention mass.

    token_mass: [N], mass per document token; token_spans: [N] characters, start -1 for tokens that
    are never evidence (frame, steady zone: their mass is left out, and so is that of sinks);
    sentences: sorted disjoint spans. Returns (start_char, end_char, share), best first, shares of
    the mass of all tokens that may be evidence.
    """
    starts = np.array([span[0] for span in token_spans])
    is_evidence = starts >= 0
    if not is_evidence.any() or not sentences:
        return []
    mass, starts = _without_sinks(token_mass[is_evidence]), starts[is_evidence]
    total = float(mass.sum())
    sentence_starts = np.array([span[0] for span in sentences])
    owner = np.searchsorted(sentence_starts, starts, side="right") - 1
    per_sentence = np.bincount(
        owner[owner >= 0], weights=mass[owner >= 0], minlength=len(sentences)
    )
    best = np.argsort(-per_sentence, kind="stable")[:max_spans]
    return [(*sentences[i], float(per_sentence[i] / total)) for i in best if per_sentence[i] > 0.0]


def _without_sinks(mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mass [n] with that of sinks set to 0; as it was where nothing else is left."""
    around = sliding_window_view(np.pad(mass, _NEIGHBOURS), 2 * _NEIGHBOURS + 1)
    level = np.median(np.delete(around, _NEIGHBOURS, axis=1), axis=1)
    kept = np.where(mass > _SINK_RATIO * level, 0.0, mass)
    return kept if kept.any() else mass


def _strip(text: str, start: int, stop: int) -> tuple[int, int]:
    piece = text[start:stop]
    return start + len(piece) - len(piece.lstrip()), stop - len(piece) + len(piece.rstrip())

"""Text to token ids and back, and the ids that stand around a document and a question.

Owns encoding with character spans, incremental decoding, the frame and the question tail. Text
that users bring is encoded with special tokens switched off: "<|im_end|>" in a document is plain
text. Refuses to know files (`tokenizer_files.py`) and templates' insides (`chat_template.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import tokenizers

from orchestrator.model.chat_template import PLAIN_TAIL, SplitTemplate, split_template

Span = tuple[int, int]
"""First character and the one after the last, in the encoded text."""

SEPARATOR = "\n\n"
"""Stands between the document and the question."""

# What an incomplete UTF-8 sequence decodes to.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """What a model file says about its tokenizer.

    `lead_ids` stand before any text where there is no template (BOS, mostly); `special_tokens`
    are the strings that templates refer to; generation ends at any of `stop_ids`.
    """

    backend: tokenizers.Tokenizer
    template: str | None
    special_tokens: Mapping[str, str]
    lead_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """One model's tokenizer; safe to share between threads.

    Frames and tails are cut from the template once for each kind of system text.
    """

    parts: TokenizerParts
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _splits: dict[bool, SplitTemplate] = field(default_factory=dict)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self.parts.stop_ids

    @property
    def fingerprint(self) -> str:
        """xxh3-128 over vocabulary, merges, special tokens and template."""
        return self.parts.fingerprint

    @property
    def num_plain_ids(self) -> int:
        """Size of the vocabulary without added tokens: every id of plain text is below it."""
        return int(self.parts.backend.get_vocab_size(with_added_tokens=False))

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Return the ids of plain text and the characters each stands for; nothing is added.

        A character that takes several tokens lies in the span of each of them.
        """
        encoding = self._encode(text, plain=True)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return str(self.parts.backend.decode(list(ids), skip_special_tokens=True))

    def frame(self, system: str | None = None) -> list[int]:
        """Return the ids before a document: system prompt and user header, or BOS alone.

        None leaves the system prompt to the template, which may have a default. Raises UsageError
        where the template takes no system text.
        """
        if self.parts.template is None:
            return [*self.parts.lead_ids, *(self._plain(system + SEPARATOR) if system else [])]
        split = self._split(with_system=system is not None)
        ids = self._marked(split.before_system)
        if split.takes_system and system is not None:
            ids += self._plain(system)
        return ids + self._marked(split.before_document)

    def question(self, question: str, *, instruction: str | None = None) -> list[int]:
        """Return the ids after a document: separator, question and the template's tail.

        Each is encoded alone, so the ids of a question do not depend on the document's last words.
        `instruction` stands on a line of its own before the question.
        """
        text = question if instruction is None else f"{instruction}\n{question}"
        return self._plain(SEPARATOR) + self._plain(text) + self._tail()

    def _tail(self) -> list[int]:
        if self.parts.template is None:
            return self._plain(PLAIN_TAIL)
        return self._marked(self._split(with_system=False).tail)

    def _split(self, *, with_system: bool) -> SplitTemplate:
        template = self.parts.template
        if with_system not in self._splits and template is not None:
            self._splits[with_system] = split_template(
                template, self.parts.special_tokens, with_system=with_system
            )
        return self._splits[with_system]

    def _plain(self, text: str) -> list[int]:
        return self._encode(text, plain=True).ids

    def _marked(self, text: str) -> list[int]:
        """Encode text of the template, in which special tokens mean themselves."""
        return self._encode(text, plain=False).ids

    def _encode(self, text: str, *, plain: bool) -> tokenizers.Encoding:
        # The switch is a property of the backend, hence the lock.
        with self._lock:
            self.parts.backend.encode_special_tokens = plain
            return self.parts.backend.encode(text, add_special_tokens=False)


class TextStream:
    """Turns tokens into text as they come; a character is given out once it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_given = 0  # ids whose text was given out; they stay one round as context

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes, often nothing."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        # Tokens of a round are kept until the next: a decoder may treat the first token of a
        # sequence differently, so the new text is what a longer sequence adds.
        self._ids = self._ids[self._num_given :]
        self._num_given = len(self._ids)
        return text

    def finish(self) -> str:
        """Return what is left when no token follows, incomplete characters as U+FFFD."""
        text = self._new_text()
        self._num_given = len(self._ids)
        return text

    def _new_text(self) -> str:
        given = self._tokenizer.decode(self._ids[: self._num_given])
        return self._tokenizer.decode(self._ids)[len(given) :]

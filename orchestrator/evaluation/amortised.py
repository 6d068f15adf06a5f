"""What asking costs after ingesting once, against `transformers` on the same ids and weights.

Peers: (a) prefills document and question for every question; (b) keeps its cache in memory and
prefills the question only. Ours opens the document from disk, checksums on, weights loaded. Owns
the measurement; every side computes the same token ids on the same threads, turn by turn.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.engine import Engine
from orchestrator.evaluation.haystacks import reference_paragraphs
from orchestrator.ingest import IngestOptions
from orchestrator.model.registry import find_model
from orchestrator.types import AskOptions, Mode

QUESTION_COUNTS = (1, 8, 24)
NUM_STEPS = 16
SEGMENT_TOKENS = 1024
BUDGET = "12.5%"

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median with extremes of some seconds."""

    median_s: float
    min_s: float
    max_s: float
    num_repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Summary of at least one measurement."""
        return cls(
            median_s=statistics.median(seconds),
            min_s=min(seconds),
            max_s=max(seconds),
            num_repeats=len(seconds),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Amortised:
    """One dtype's figures. `first_token` of ours counts from opening the document on disk.

    token: one later token; ratios are of medians; total_s: by peer and number of questions, each
    with NUM_STEPS later tokens ((a) decodes from its cache like (b)); limits: bytes of a step.
    """

    dtype: str
    num_tokens: int
    question_tokens: int
    first_token: dict[str, Spread]
    token: dict[str, Spread]
    ingest: dict[str, Spread]
    ratios: dict[str, float]
    step_bytes: dict[str, int]
    total_s: dict[str, dict[int, float]]
    break_even_questions: int | None

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def measure(
    model: str, dtype: str, *, num_tokens: int, num_questions: int, num_long: int, note: Note
) -> Amortised:
    """Measure one dtype; num_long: repeats of the long pieces ((a) and both kinds of ingest)."""
    with (
        tempfile.TemporaryDirectory() as store,
        Engine.load(model, store=Path(store), dtype=dtype) as engine,
    ):
        text = _document(engine, num_tokens)
        peer = Peer(model, dtype)
        times = _Times(engine, peer, text, note)
        for repeat in range(num_long):
            note(f"{dtype}: long pieces, repeat {repeat + 1} of {num_long}")
            times.run_long(repeat)
        times.prepare()
        for question_idx in range(num_questions):
            note(f"{dtype}: question {question_idx + 1} of {num_questions}")
            times.run_question(f"What does section {question_idx + 1} say about statements?")
        return times.summarise(dtype)


class Peer:
    """`transformers` on the same weights: (a) and (b)."""

    def __init__(self, model: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        path = find_model(model)
        options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        if path.is_file():
            options["gguf_file"] = path.name
            path = path.parent
        self._model = AutoModelForCausalLM.from_pretrained(path, **options)
        self._cache: Any = None

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds to the first token without any cache: (a)."""
        self._cache = None
        with torch.inference_mode():
            began = time.perf_counter()
            result = self._model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            int(result.logits[0, -1].argmax())
            return time.perf_counter() - began

    def keep(self, ids: Sequence[int]) -> None:
        """Prefill and keep the cache: what (b) starts from."""
        with torch.inference_mode():
            result = self._model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self._cache = result.past_key_values

    def ask(self, question_ids: Sequence[int], num_steps: int) -> tuple[float, float]:
        """Seconds to the first token and per later token, from the kept cache: (b)."""
        with torch.inference_mode():
            began = time.perf_counter()
            token = self._step(list(question_ids))
            first_s = time.perf_counter() - began
            began = time.perf_counter()
            for _ in range(num_steps):
                token = self._step([token])
            token_s = (time.perf_counter() - began) / num_steps
        self._cache.crop(-(len(question_ids) + num_steps))
        return first_s, token_s

    def _step(self, ids: list[int]) -> int:
        result = self._model(
            torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return int(result.logits[0, -1].argmax())


class _Times:
    """Seconds of every piece, filled turn by turn."""

    def __init__(self, engine: Engine, peer: Peer, text: str, note: Note) -> None:
        self._engine, self._peer, self._text, self._note = engine, peer, text, note
        tokenizer = engine.model.tokenizer
        self._ids = tokenizer.frame(None) + list(tokenizer.encode(text)[0])
        self._question_tokens = 0
        self.first: dict[str, list[float]] = {"a": [], "b": [], "exact": [], "centroid": []}
        self.token: dict[str, list[float]] = {"b": [], "exact": [], "centroid": []}
        self.ingest: dict[str, list[float]] = {"plain": [], "clustered": []}
        self.step_bytes: dict[str, int] = {}

    def run_long(self, repeat: int) -> None:
        """(a) and both ingests, in an order that rotates with the repeat."""
        pieces = [self._run_peer_prefill, self._run_plain_ingest, self._run_clustered_ingest]
        for piece in pieces[repeat % 3 :] + pieces[: repeat % 3]:
            piece()

    def prepare(self) -> None:
        """What the questions start from: the peer's cache."""
        self._peer.keep(self._ids)

    def run_question(self, question: str) -> None:
        """One question on every side; ours opens the document anew each time."""
        question_ids = self._engine.model.tokenizer.question(question)
        self._question_tokens = len(question_ids)
        first_s, token_s = self._peer.ask(question_ids, NUM_STEPS)
        self.first["b"].append(first_s)
        self.token["b"].append(token_s)
        for mode in ("exact", "centroid"):
            self._run_ours(question, mode)

    def summarise(self, dtype: str) -> Amortised:
        """Medians, ratios, totals and the break-even number of questions."""
        first = {name: Spread.of(seconds) for name, seconds in self.first.items()}
        token = {name: Spread.of(seconds) for name, seconds in self.token.items()}
        ingest = {name: Spread.of(seconds) for name, seconds in self.ingest.items()}
        total_s = _totals(first, token, ingest)
        return Amortised(
            dtype=dtype,
            num_tokens=len(self._ids),
            question_tokens=self._question_tokens,
            first_token=first,
            token=token,
            ingest=ingest,
            ratios=_ratios(first, token, ingest, self.step_bytes),
            step_bytes=self.step_bytes,
            total_s=total_s,
            break_even_questions=_break_even(first, token, ingest),
        )

    def _run_peer_prefill(self) -> None:
        question_ids = self._engine.model.tokenizer.question("What is this about?")
        self.first["a"].append(self._peer.prefill(self._ids + question_ids))

    def _run_plain_ingest(self) -> None:
        self._ingest("plain", IngestOptions(segment_tokens=SEGMENT_TOKENS, clusters=None))

    def _run_clustered_ingest(self) -> None:
        self._ingest("clustered", IngestOptions(segment_tokens=SEGMENT_TOKENS))

    def _ingest(self, name: str, options: IngestOptions) -> None:
        if any(info.name == name for info in self._engine.docs()):
            self._engine.remove(name)
        report = self._engine.ingest(text=self._text, name=name, options=options)
        self.ingest[name].append(report.total_s)

    def _run_ours(self, question: str, mode: Mode) -> None:
        budget = BUDGET if mode == "centroid" else None
        self._engine.release()
        answer = self._engine.ask("clustered", question, mode=mode, budget=budget, max_tokens=1)
        self.first[mode].append(answer.timing.ttft_s)
        options = AskOptions(mode=mode, budget=budget)
        with self._engine.begin(
            "clustered", question, options, num_answer_tokens=NUM_STEPS
        ) as session:
            token = _greedy(session.forward(session.question_ids))
            before = session.recorder.bytes_read_here()
            began = time.perf_counter()
            for _ in range(NUM_STEPS):
                token = _greedy(session.forward([token]))
            self.token[mode].append((time.perf_counter() - began) / NUM_STEPS)
            attention_bytes = (session.recorder.bytes_read_here() - before) // NUM_STEPS
        self.step_bytes[mode] = attention_bytes + self._engine.model.decoder.num_bytes


def _greedy(logits: Tensor) -> int:
    return int(logits.argmax())


def _document(engine: Engine, num_tokens: int) -> str:
    """Python's language reference, cut so that frame and text have at most num_tokens tokens."""
    tokenizer = engine.model.tokenizer
    text = "\n\n".join(reference_paragraphs())[: 8 * num_tokens]
    _, spans = tokenizer.encode(text)
    return text[: spans[num_tokens - len(tokenizer.frame(None)) - 1][1]]


def _ratios(
    first: dict[str, Spread],
    token: dict[str, Spread],
    ingest: dict[str, Spread],
    step_bytes: dict[str, int],
) -> dict[str, float]:
    ratios = {
        "ingest_plain_over_a": ingest["plain"].median_s / first["a"].median_s,
        "ingest_clustered_over_a": ingest["clustered"].median_s / first["a"].median_s,
        "centroid_token_speedup_over_exact": token["exact"].median_s / token["centroid"].median_s,
        "byte_limit_of_that": step_bytes["exact"] / step_bytes["centroid"],
    }
    for mode in ("exact", "centroid"):
        ratios[f"a_over_first_{mode}"] = first["a"].median_s / first[mode].median_s
        ratios[f"first_{mode}_over_b"] = first[mode].median_s / first["b"].median_s
        ratios[f"b_over_token_{mode}"] = token["b"].median_s / token[mode].median_s
    return ratios


def _cost_per_question(first: dict[str, Spread], token: dict[str, Spread]) -> dict[str, float]:
    """Seconds of one question with NUM_STEPS later tokens, by side."""
    later = {name: NUM_STEPS * spread.median_s for name, spread in token.items()}
    costs = {name: first[name].median_s + later[name] for name in ("b", "exact", "centroid")}
    return {"a": first["a"].median_s + later["b"], **costs}


def _totals(
    first: dict[str, Spread], token: dict[str, Spread], ingest: dict[str, Spread]
) -> dict[str, dict[int, float]]:
    costs = _cost_per_question(first, token)
    start = {"a": 0.0, "b": first["a"].median_s}
    return {
        name: {
            count: start.get(name, ingest["clustered"].median_s) + count * cost
            for count in QUESTION_COUNTS
        }
        for name, cost in costs.items()
    }


def _break_even(
    first: dict[str, Spread], token: dict[str, Spread], ingest: dict[str, Spread]
) -> int | None:
    """Fewest questions for which ingesting and asking in `centroid` is cheaper than (a)."""
    costs = _cost_per_question(first, token)
    saved = costs["a"] - costs["centroid"]
    return None if saved <= 0 else int(ingest["clustered"].median_s // saved) + 1

"""One question from token ids to an answer: prefill of the question, decode, evidence, recall.

Owns the loop of forwards and what is measured around it, on rank 0. Knows neither admission
(`coordinator.py`) nor how ranks carry a forward out (`worker.py`, `model/attention.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from orchestrator.batcher import Batcher
from orchestrator.cluster.executor import Executor
from orchestrator.errors import ContextTooLong, UsageError
from orchestrator.evidence import find_evidence, sentence_spans
from orchestrator.model.load import LoadedModel
from orchestrator.model.recorder import Recorder
from orchestrator.model.sampler import make_generator, sample
from orchestrator.model.tokenizer import TextStream
from orchestrator.selection import Decision, decide, selector_facts
from orchestrator.stack import library_versions, stack_manifest
from orchestrator.steps import AttentionPlan, BeginQuestion, EndQuestion, Forward
from orchestrator.types import Answer, AskOptions, Evidence, Score, Timing, Usage
from orchestrator.worker import HeldDocument

MAX_EVIDENCE_SPANS = 5
# One query in RECALL_PERIOD of each layer has its recall sampled, if that leaves enough pairs.
RECALL_PERIOD = 8
MIN_SAMPLED_PAIRS = 64


class AskedDocument:
    """An open document as answers need it: its text cut into sentences, its tokens into spans."""

    def __init__(self, held: HeldDocument) -> None:
        self.document, self.context = held.document, held.context

    @cached_property
    def sentences(self) -> list[tuple[int, int]]:
        """Character spans of the text's sentences."""
        return sentence_spans(self.document.text)

    @cached_property
    def evidence_spans(self) -> list[tuple[int, int]]:
        """Token spans with frame and steady zone marked (-1, -1): they are never evidence."""
        spans, context = self.document.spans, self.context
        stop = context.num_tokens - context.num_window
        return [span if context.num_sinks <= i < stop else (-1, -1) for i, span in enumerate(spans)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Everything that one question needs. ids: of its tokens; question_id: what ranks call it."""

    executor: Executor
    batcher: Batcher
    question_id: int
    document: AskedDocument
    ids: list[int]
    options: AskOptions

    @property
    def model(self) -> LoadedModel:
        """The model, as rank 0 has it."""
        return self.executor.worker.model


class Session:
    """A question in progress on all ranks: its decision, and the next token's logits.

    Use it as a context manager: leaving it makes the ranks forget the question.
    """

    def __init__(self, question: Question, *, num_answer_tokens: int) -> None:
        self.question = question
        model, context = question.model, question.document.context
        params = question.document.document.manifest.params
        self.decision = decide(
            question.options,
            num_tokens=context.num_tokens,
            num_steady=context.num_sinks + context.num_window,
            keys_per_cluster=int(params.selector.get("keys_per_cluster", 0)),
            device=model.decoder.device.type,
        )
        self.question_ids = question.ids
        self._check_room(num_answer_tokens)
        plan = attention_plan(
            self.decision,
            question.options,
            num_queries=len(self.question_ids),
            num_layers=len(model.cfg.full_layers),
        )
        question.executor.run(
            BeginQuestion(
                question_id=question.question_id,
                document=question.document.document.name,
                attention=plan,
                capacity_tokens=len(self.question_ids) + num_answer_tokens,
            )
        )
        self._is_open = True

    def forward(self, ids: list[int]) -> Tensor:
        """Logits [V] float32 after the last of `ids`; a single one takes a step with others'."""
        question = self.question
        if len(ids) == 1:
            return question.batcher.forward(question.question_id, ids[0])
        step = Forward(question_id=question.question_id, ids=tuple(ids))
        logits: Tensor = question.executor.run(step)
        return logits

    @property
    def recorder(self) -> Recorder:
        """What attention saw so far on rank 0."""
        return self.question.executor.worker.questions.recorder_of(self.question.question_id)

    def end(self) -> Recorder:
        """What attention saw, of all ranks together; nothing is forwarded after it."""
        recorder: Recorder = self._end(reports=True)
        return recorder

    def _end(self, *, reports: bool) -> Any:
        self._is_open = False
        self.question.batcher.leave(self.question.question_id)
        step = EndQuestion(question_id=self.question.question_id, reports=reports)
        return self.question.executor.run(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_open and self.question.executor.failure is None:
            self._end(reports=False)

    def _check_room(self, num_answer_tokens: int) -> None:
        limit = self.question.model.cfg.max_context_tokens
        num_document = self.question.document.context.num_tokens
        wanted = num_document + len(self.question_ids) + num_answer_tokens
        if wanted > limit:
            raise ContextTooLong(
                f"document, question and answer have {num_document} + {len(self.question_ids)} + "
                f"{num_answer_tokens} "
                f"tokens, the context of {self.question.model.name} holds {limit}; lower "
                f"--max-tokens"
            )


def attention_plan(
    decision: Decision, options: AskOptions, *, num_queries: int, num_layers: int
) -> AttentionPlan:
    """The attention plan of a resolved selection, for a question of num_queries tokens."""
    # The question alone fills a stratum of every layer, and gives enough samples.
    fullest = min(num_queries // 2, num_queries * num_layers // MIN_SAMPLED_PAIRS)
    return AttentionPlan(
        mode=decision.mode,
        keys=None if decision.mass is not None else decision.retrieved_keys or 0,
        mass=decision.mass,
        choice=options.choice,
        levels=decision.levels,
        recall_period=max(1, min(RECALL_PERIOD, fullest)),
        seed=options.sampling.seed,
        audit=options.audit,
    )


def answer_question(
    question: Question,
    *,
    started: float,
    load_s: float,
    open_s: float,
    on_token: Callable[[str], None] | None,
) -> Answer:
    """Generate until a stop token or `max_tokens`. `started` is when the question arrived.

    What `on_token` raises ends the question and goes on to the caller.
    """
    with Session(question, num_answer_tokens=question.options.max_tokens) as session:
        return _generate(session, started=started, load_s=load_s, open_s=open_s, on_token=on_token)


def _generate(
    session: Session,
    *,
    started: float,
    load_s: float,
    open_s: float,
    on_token: Callable[[str], None] | None,
) -> Answer:
    question, options = session.question, session.question.options
    generator = make_generator(options.sampling)
    stream = TextStream(question.model.tokenizer)
    answer_ids: list[int] = []
    text, finish_reason = "", "length"
    logits = session.forward(session.question_ids)
    first_token_s = 0.0
    while True:
        token = sample(logits, options.sampling, generator)
        first_token_s = first_token_s or time.perf_counter() - started
        if token in question.model.tokenizer.stop_ids:
            finish_reason = "stop"
            break
        answer_ids.append(token)
        text += _emit(stream.push(token), on_token)
        if len(answer_ids) == options.max_tokens:
            break
        logits = session.forward([token])
    text += _emit(stream.finish(), on_token)
    total_s = time.perf_counter() - started
    num_later = max(1, len(answer_ids) - (finish_reason == "length"))
    timing = Timing(
        load_s=load_s,
        open_s=open_s,
        ttft_s=first_token_s,
        tpot_s=(total_s - first_token_s) / num_later,
        total_s=total_s,
    )
    return _assemble(session, text.strip(), finish_reason, len(answer_ids), timing)


def score_answer(question: Question, answer: str, *, prefix: str) -> Score:
    """Natural-log loss per token of `answer` after `prefix`, given token by token, and the recall
    of that.

    `prefix` joins the question in its forward and is not scored.
    """
    tokenizer = question.model.tokenizer
    prefix_ids, answer_ids = list(tokenizer.encode(prefix)[0]), list(tokenizer.encode(answer)[0])
    if not answer_ids:
        raise UsageError(
            "the answer to score has no tokens; a score needs at least one; give its text"
        )
    with Session(question, num_answer_tokens=len(prefix_ids) + len(answer_ids)) as session:
        logits = session.forward(session.question_ids + prefix_ids)
        losses = [_loss(logits, answer_ids[0])]
        for given, token in pairwise(answer_ids):
            losses.append(_loss(session.forward([given]), token))
        recall = session.end().recall()
    return Score(nll_per_token=sum(losses) / len(losses), num_tokens=len(losses), recall=recall)


def _loss(logits: Tensor, token: int) -> float:
    return float(torch.logsumexp(logits, dim=0) - logits[token])


def _emit(piece: str, on_token: Callable[[str], None] | None) -> str:
    if piece and on_token is not None:
        on_token(piece)
    return piece


def _assemble(
    session: Session, text: str, finish_reason: str, num_answer: int, timing: Timing
) -> Answer:
    question, document = session.question, session.question.document
    recorder = session.end()
    mean_keys, max_keys = recorder.attended_keys()
    num_document, num_question = document.context.num_tokens, len(session.question_ids)
    return Answer(
        text=text,
        finish_reason=finish_reason,
        model=question.model.name,
        document_name=document.document.name,
        document_hash=document.document.hash,
        selection=session.decision.report,
        usage=Usage(
            prompt_tokens=num_document + num_question,
            cached_tokens=num_document,
            question_tokens=num_question,
            completion_tokens=num_answer,
            attended_keys_mean=mean_keys,
            attended_keys_max=max_keys,
            bytes_read=recorder.bytes_read(),
        ),
        timing=timing,
        recall=recorder.recall(),
        evidence=_evidence(document, recorder),
        stack=_stack(session),
    )


def _evidence(document: AskedDocument, recorder: Recorder) -> tuple[Evidence, ...]:
    spans = find_evidence(
        recorder.token_mass(),
        document.evidence_spans,
        document.sentences,
        max_spans=MAX_EVIDENCE_SPANS,
    )
    text = document.document.text
    return tuple(
        Evidence(start_char=start, end_char=end, score=score, text=text[start:end])
        for start, end, score in spans
    )


def _stack(session: Session) -> dict[str, object]:
    question, config = session.question, session.question.executor.worker.config
    params = question.document.document.manifest.params
    return stack_manifest(
        weights=question.model.fingerprint,
        dtype=config.dtype,
        device=config.device,
        backend=config.backend,
        selector=selector_facts(question.options, session.decision, index=params.selector),
        mesh=config.mesh,
        threads=config.threads,
        is_deterministic=config.is_deterministic,
        libraries=library_versions(),
    )

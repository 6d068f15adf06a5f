"""One question from token ids to an answer: prefill of the question, decode, evidence, recall.

Owns the loop of forwards and what is measured around it. Knows neither locks nor caches
(`engine.py`) nor how a layer attends (`model/attention.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from kv_store import Document
from orchestrator.config import EngineConfig
from orchestrator.errors import ContextTooLong, UsageError
from orchestrator.evidence import find_evidence, sentence_spans
from orchestrator.model.attention import AttentionPlan, DocumentContext, QuestionAttention
from orchestrator.model.load import LoadedModel
from orchestrator.model.recorder import Recorder
from orchestrator.model.sampler import make_generator, sample
from orchestrator.model.tokenizer import TextStream
from orchestrator.selection import Decision, decide, selector_facts
from orchestrator.stack import library_versions, stack_manifest
from orchestrator.types import Answer, AskOptions, Evidence, Score, Timing, Usage
from sparse_attn.api import Backend
from sparse_attn.select.base import Limit

MAX_EVIDENCE_SPANS = 5
# One query in RECALL_PERIOD of each layer has its recall sampled, if that leaves enough pairs.
RECALL_PERIOD = 8
MIN_SAMPLED_PAIRS = 64


@dataclass(frozen=True, kw_only=True)
class OpenDocument:
    """A document on disk (locked against removal) and its KV in memory."""

    document: Document
    context: DocumentContext

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
    """Everything that one question needs."""

    model: LoadedModel
    document: OpenDocument
    backend: Backend
    config: EngineConfig
    text: str
    options: AskOptions


class Session:
    """A question in progress: its decision, attention and recorder, and the next token's logits."""

    def __init__(self, question: Question, *, num_answer_tokens: int) -> None:
        self.question = question
        model, context = question.model, question.document.context
        params = question.document.document.manifest.params
        self.decision = decide(
            question.options,
            num_tokens=context.num_tokens,
            num_steady=context.num_sinks + context.num_window,
            keys_per_cluster=int(params.selector.get("keys_per_cluster", 0)),
        )
        self.question_ids = model.tokenizer.question(
            question.text, instruction=question.options.system
        )
        self._check_room(num_answer_tokens)
        plan = attention_plan(
            self.decision,
            question.options,
            num_queries=len(self.question_ids),
            num_layers=len(model.cfg.full_layers),
        )
        self.recorder = Recorder(context.resident, recall_period=plan.recall_period)
        self._attention = QuestionAttention(
            context,
            plan,
            question.backend,
            self.recorder,
            scale=model.cfg.attention_scale,
            windows=model.cfg.windows,
            capacity_tokens=len(self.question_ids) + num_answer_tokens,
        )
        self._position = context.num_tokens

    def forward(self, ids: list[int]) -> Tensor:
        """Logits [V] float32 after the last of `ids`."""
        decoder = self.question.model.decoder
        positions = torch.arange(self._position, self._position + len(ids), device=decoder.device)
        self._position += len(ids)
        with torch.inference_mode():
            hidden = decoder.forward(
                torch.tensor(ids, device=decoder.device), positions, self._attention
            )
            return decoder.logits(hidden[-1:])[0]

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
        limit=Limit(keys=decision.retrieved_keys or 0)
        if decision.mass is None
        else Limit(mass=decision.mass),
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
    """Generate until a stop token or `max_tokens`. `started` is when the question arrived."""
    options = question.options
    session = Session(question, num_answer_tokens=options.max_tokens)
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
    session = Session(question, num_answer_tokens=len(prefix_ids) + len(answer_ids))
    logits = session.forward(session.question_ids + prefix_ids)
    losses = [_loss(logits, answer_ids[0])]
    for given, token in pairwise(answer_ids):
        losses.append(_loss(session.forward([given]), token))
    return Score(
        nll_per_token=sum(losses) / len(losses),
        num_tokens=len(losses),
        recall=session.recorder.recall(),
    )


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
    mean_keys, max_keys = session.recorder.attended_keys()
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
            bytes_read=session.recorder.bytes_read(),
        ),
        timing=timing,
        recall=session.recorder.recall(),
        evidence=_evidence(session),
        stack=_stack(session),
    )


def _evidence(session: Session) -> tuple[Evidence, ...]:
    document = session.question.document
    spans = find_evidence(
        session.recorder.token_mass(),
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
    question = session.question
    params = question.document.document.manifest.params
    return stack_manifest(
        weights=question.model.fingerprint,
        dtype=question.config.dtype,
        device=question.config.device,
        backend=question.config.backend,
        selector=selector_facts(question.options, session.decision, index=params.selector),
        mesh=question.config.mesh,
        threads=question.config.threads,
        is_deterministic=question.config.is_deterministic,
        libraries=library_versions(),
    )

"""Seconds of one decode step on synthetic KV of a given length, beside what the bytes allow; of one
question, or of several that take their steps together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from orchestrator.answering import RECALL_PERIOD
from orchestrator.evaluation.decode_profile import StepProfile, profile_steps
from orchestrator.evaluation.synthetic import NOTICE, synthetic_context
from orchestrator.model.attention import Attention, make_attention
from orchestrator.model.context import DocumentContext
from orchestrator.model.load import LoadedModel
from orchestrator.model.recorder import Recorder
from orchestrator.model.sampler import find_greatest
from orchestrator.selection import decide
from orchestrator.steps import AttentionPlan
from orchestrator.types import AskOptions, Mode
from sparse_attn.api import Backend
from sparse_attn.select.centroid_build import CentroidParams

# The first compiles, the second is captured where there is a graph, the third settles.
WARM_STEPS = 3
# Of a profile: every layer's recall is sampled once in so many.
PROFILED_STEPS = RECALL_PERIOD


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiming:
    """One mode on one length; limit_s: step_bytes at the bandwidth that this run measured; build_s:
    of the documents; tokens_per_s: of all num_questions, which are on num_documents documents;
    profile: of steps beside those timed, where it was asked for.
    """

    notice: str
    model: str
    mode: str
    levels: int
    num_tokens: int
    kv_dtype: str
    keys_per_cluster: int
    clusters_per_group: int | None
    num_questions: int
    num_documents: int
    build_s: float
    bandwidth_bytes_per_s: float
    step_bytes: int
    limit_s: float
    median_s: float
    min_s: float
    max_s: float
    tokens_per_s: float
    profile: StepProfile | None

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def measure_decode(
    model: LoadedModel,
    backend: Backend,
    *,
    num_tokens: int,
    segment_tokens: int,
    modes: tuple[Mode, ...],
    budget: str,
    repeats: int,
    num_questions: int = 1,
    num_documents: int = 1,
    kv_dtype: str | None = None,
    clusters: CentroidParams | None = None,
    is_profiled: bool = False,
) -> list[DecodeTiming]:
    """Time forwards of one token of each question, in each mode, on the same synthetic documents.

    num_documents: on which the questions are, in turn; each is a document of its own in memory;
    kv_dtype: as in `IngestOptions`.
    """
    began = time.perf_counter()
    clusters = (clusters or CentroidParams()).for_document(num_tokens)
    contexts = [
        synthetic_context(
            model.cfg,
            num_tokens=num_tokens,
            segment_tokens=segment_tokens,
            dtype=model.decoder.dtype,
            device=model.decoder.device,
            seed=seed,
            kv_dtype=kv_dtype,
            clusters=clusters,
        )
        for seed in range(num_documents)
    ]
    bandwidth = measure_read_bandwidth(model.decoder.device)  # waits for what was queued
    build_s = time.perf_counter() - began
    timings = []
    for mode in modes:
        plan = _plan_of(mode, budget, contexts[0], clusters)
        asked = [contexts[i % num_documents] for i in range(num_questions)]
        seconds, step_bytes, profile = _time_questions(
            model, backend, asked, plan, repeats, profiled_at=bandwidth if is_profiled else None
        )
        timings.append(
            DecodeTiming(
                notice=NOTICE,
                model=model.name,
                mode=mode,
                levels=plan.levels,
                num_tokens=num_tokens,
                kv_dtype=contexts[0].resident.layout.kv_dtype,
                keys_per_cluster=clusters.keys_per_cluster,
                clusters_per_group=clusters.clusters_per_group,
                num_questions=num_questions,
                num_documents=num_documents,
                build_s=build_s,
                bandwidth_bytes_per_s=bandwidth,
                step_bytes=step_bytes,
                limit_s=step_bytes / bandwidth,
                median_s=statistics.median(seconds),
                min_s=min(seconds),
                max_s=max(seconds),
                tokens_per_s=num_questions / statistics.median(seconds),
                profile=profile,
            )
        )
    return timings


def _time_questions(
    model: LoadedModel,
    backend: Backend,
    asked: Sequence[DocumentContext],
    plan: AttentionPlan,
    repeats: int,
    *,
    profiled_at: float | None,
) -> tuple[list[float], int, StepProfile | None]:
    """Seconds of each step of a question on each of these documents, the bytes of one, and the
    profile of others, if at a bandwidth.
    """
    num_steps = WARM_STEPS + repeats + (PROFILED_STEPS if profiled_at else 0)
    recorders, attentions = [], []
    for seed, context in enumerate(asked):
        recorder = Recorder(context.resident, context.place, recall_period=plan.recall_period)
        recorders.append(recorder)
        attentions.append(
            make_attention(
                context,
                replace(plan, seed=seed),
                backend,
                recorder,
                scale=model.cfg.attention_scale,
                windows=model.cfg.windows,
                capacity_tokens=num_steps,
            )
        )
    with torch.inference_mode():
        step = _step_of(model, attentions, asked[0].num_tokens)
        for offset in range(WARM_STEPS):
            step(offset)
        timed = range(WARM_STEPS, WARM_STEPS + repeats)
        seconds = [_time_once(lambda o=offset: step(o)) for offset in timed]
        num_bytes = sum(recorder.bytes_read_here() for recorder in recorders)
        step_bytes = num_bytes // timed.stop + model.decoder.num_bytes
        if profiled_at is None:
            return seconds, step_bytes, None
        profile = profile_steps(
            lambda offset: step(timed.stop + offset),
            PROFILED_STEPS,
            limit_s=step_bytes / profiled_at,
        )
    return seconds, step_bytes, profile


def _plan_of(
    mode: Mode, budget: str, context: DocumentContext, clusters: CentroidParams
) -> AttentionPlan:
    decision = decide(
        AskOptions(mode=mode, budget=budget if mode == "centroid" else None),
        num_tokens=context.num_tokens,
        num_steady=context.num_steady,
        keys_per_cluster=clusters.keys_per_cluster,
        device=context.resident.device.type,
    )
    return AttentionPlan(
        mode=mode,
        keys=decision.retrieved_keys or 0,
        levels=decision.levels,
        recall_period=RECALL_PERIOD,
    )


def measure_read_bandwidth(device: torch.device, *, num_bytes: int = 1 << 30) -> float:
    """Bytes per second of summing a large tensor: what a streaming read can reach here."""
    x = torch.ones(num_bytes // 4, device=device)
    best_s = min(_time_once(lambda: float(x.sum())) for _ in range(4))
    return num_bytes / best_s


def _step_of(
    model: LoadedModel, attentions: Sequence[Attention], position: int
) -> Callable[[int], None]:
    """A step of all questions, so many tokens after a position; waits until it is over."""
    forward = _forward_of(model, attentions)
    tokens = [0] * len(attentions)

    def step(offset: int) -> None:
        logits = forward(tokens, [position + offset] * len(attentions))
        find_greatest(torch.stack(logits))[1].tolist()

    return step


def _forward_of(
    model: LoadedModel, attentions: Sequence[Attention]
) -> Callable[[Sequence[int], Sequence[int]], list[Tensor]]:
    """One token of each question: one forward where attention is by plans, else one after another,
    as `questions.py` does it.
    """
    decoder = model.decoder
    if all(attention.is_static for attention in attentions):
        from orchestrator.model.decode_batch import DecodeBatch
        from orchestrator.model.device_attention import DeviceAttention

        planned = [x for x in attentions if isinstance(x, DeviceAttention)]
        assert len(planned) == len(attentions)
        with torch.inference_mode():
            return DecodeBatch(decoder, planned).forward

    def forward(tokens: Sequence[int], positions: Sequence[int]) -> list[Tensor]:
        logits = []
        for attention, token, position in zip(attentions, tokens, positions, strict=True):
            ids = torch.tensor([token], device=decoder.device)
            attention.prepare(1)
            hidden = decoder.forward(ids, torch.full_like(ids, position), attention)
            logits.append(decoder.logits(hidden)[0])
            attention.advance(1)
        return logits

    return forward


def _time_once(function: object) -> float:
    assert callable(function)
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
